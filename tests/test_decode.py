"""Ids of every kind to bytes and text: arrays of all widths and layouts, buffers, lists; free ids, no memory, forks."""

from __future__ import annotations

import array
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bytekiln
from bytekiln import Tokenizer
from bytekiln.errors import ConfigError, TextError

SPECIAL = {"<|end|>": 290, "<|a special token of more than fifteen bytes|>": 293, "<日本>": 300}
"""Between them ids are free."""
IDS = [*range(290), *SPECIAL.values()]
DTYPES = ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", ">u2", ">i4", ">u8"]


def build() -> Tokenizer:
    trained = bytekiln.train_bpe_from_iterator(
        ["the kiln's warm " * 9 + "abcdefghijklmnopqrstuvwxyz " * 99], vocab_size=290
    )
    return Tokenizer.from_ranks(
        {token: id for id, token in trained.vocab.items()}, pattern="gpt2", special_tokens=SPECIAL
    )


TOKENIZER = build()


def joined(ids: list[int], *, skip: bool = False) -> bytes:
    """The specification."""
    return b"".join(TOKENIZER.id_to_token(id) for id in ids if not (skip and id in SPECIAL.values()))


def test_there_are_short_and_long_tokens() -> None:
    assert {1, 15, 16} <= {len(token) for token in TOKENIZER.vocab.values()}
    with pytest.raises(ConfigError, match="found no such token"):
        TOKENIZER.id_to_token(291)


@settings(max_examples=400)
@given(
    st.lists(st.sampled_from(IDS), max_size=70),
    st.sampled_from(DTYPES),
    st.sampled_from([1, 2, 3, -1, -2]),
    st.booleans(),
    st.booleans(),
)
def test_arrays_of_every_kind(ids: list[int], dtype: str, step: int, skip: bool, writable: bool) -> None:
    ids = [id for id in ids if id <= np.iinfo(dtype).max]
    held = np.zeros(abs(step) * len(ids), dtype)[::step]
    held[:] = ids
    held.flags.writeable = writable
    data = joined(ids, skip=skip)
    assert TOKENIZER.decode_bytes(held, skip_special_tokens=skip) == data
    assert TOKENIZER.decode(held, skip_special_tokens=skip) == data.decode(errors="replace")


@given(st.lists(st.sampled_from(IDS), max_size=70), st.booleans())
def test_what_else_holds_ids(ids: list[int], skip: bool) -> None:
    small = [id for id in ids if id < 128]
    misaligned = np.zeros(len(ids), dtype=[("a", "u1"), ("id", "<u4")])
    misaligned["id"] = ids
    others: list[Any] = [
        ids,
        tuple(ids),
        [np.int64(id) for id in ids],
        torch.tensor(ids, dtype=torch.int64),
        torch.tensor(ids, dtype=torch.int32),
        misaligned["id"],
        *(array.array(code, ids) for code in "HhIiLlQq"),
        *(memoryview(array.array(code, ids)) for code in "HQ"),
        memoryview(array.array("i", [id for id in ids for _ in range(2)]))[::2],
    ]
    for held in others:
        assert TOKENIZER.decode_bytes(held, skip_special_tokens=skip) == joined(ids, skip=skip)
    for held in (bytes(small), bytearray(small), memoryview(bytes(small)), array.array("B", small)):
        assert TOKENIZER.decode_bytes(held) == joined(small)
    assert TOKENIZER.decode_bytes(range(97, 104)) == b"abcdefg"
    assert TOKENIZER.decode_bytes([True, False, 65]) == joined([1, 0, 65])
    assert TOKENIZER.decode_bytes([65] * 5000 + [np.int64(66), True]) == joined([65] * 5000 + [66, 1])
    assert TOKENIZER.decode([65] * 5000 + [np.int64(66), True]) == joined([65] * 5000 + [66, 1]).decode()


@pytest.mark.parametrize("call", [Tokenizer.decode, Tokenizer.decode_bytes])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([65, 66, 291], r"ids\[2\]: found 291, an id that no token has; expected ids of tokens$"),
        (np.array([292, 299], np.uint16), r"ids\[0\]: found 292, an id that no token has"),
        (np.array([65, 301], np.uint32), r"ids\[1\]: found 301; expected ids below the vocabulary's size 301$"),
        (np.array([65, 2**64 - 1], np.uint64), r"ids\[1\]: found 18446744073709551615; expected ids below"),
        (
            np.array([65, 66, -(2**63)], np.int64),
            r"ids\[2\]: found -9223372036854775808; expected ids from 0 up to .* 301$",
        ),
        (np.array([65, -1], np.int8)[::-1], r"ids\[0\]: found -1; expected ids from 0"),
        ([65, 2**32 + 65], r"ids\[1\]: found 4294967361; expected ids below"),
        ([65, 291, -1, 2**40], r"ids\[1\]: found 291, an id"),
        ([65, -1, 291], r"ids\[1\]: found -1; expected ids from 0"),
        (torch.tensor([65, 66, -7]), r"ids\[2\]: found -7"),
        ([65] * 5000 + [291], r"ids\[5000\]: found 291"),
        ((*[65] * 5000, -3, 2**40), r"ids\[5000\]: found -3"),
        ([*[65] * 5000, 2**64], r"ids: found a number beyond 64 bits"),
    ],
)
def test_the_first_wrong_id_is_named(call: Callable[..., object], ids: object, message: str, skip: bool) -> None:
    with pytest.raises(ConfigError, match=message):
        call(TOKENIZER, ids, skip_special_tokens=skip)


@pytest.mark.parametrize(
    "ids",
    [
        np.array([1.0]),
        torch.tensor([1.0]),
        np.array([[65]]),
        torch.tensor([[65]]),
        np.array([True]),
        "A",
        65,
        {65},
        [b"A"],
    ],
)
def test_what_holds_no_ids_is_refused(ids: object) -> None:
    with pytest.raises(TypeError):
        TOKENIZER.decode_bytes(ids)  # type: ignore[arg-type]


def test_a_number_whose_own_code_changes_the_list() -> None:
    class Shrinks:
        def __index__(self) -> int:
            del ids[1:]
            return 65

    ids: list[Any] = [Shrinks(), 66, 67]
    with pytest.raises(IndexError):
        TOKENIZER.decode_bytes(ids)


def test_a_long_list_that_a_numbers_own_code_changes() -> None:
    """Plain ints are read where they lie, by several threads; the first that is none ends that."""

    class Adds:
        def __index__(self) -> int:
            ids.extend([66] * 10)
            return 65

    ids: list[Any] = [*[65] * 3_000_000, Adds(), 67]
    assert TOKENIZER.decode_bytes(ids) == joined([65] * 10) * 300_000 + joined([65, 67])


def test_many_ids_of_every_kind() -> None:
    """As many as two threads take part in."""
    rng = random.Random(7)
    ids = rng.choices(IDS, k=100_000) * 25
    for skip in (False, True):
        expected = joined(ids[:100_000], skip=skip) * 25
        for held in (ids, tuple(ids), *(np.array(ids, dtype) for dtype in ("u2", "i4", "u4", "i8"))):
            assert TOKENIZER.decode_bytes(held, skip_special_tokens=skip) == expected
        text = expected.decode(errors="replace")
        assert TOKENIZER.decode(np.array(ids, "u2"), skip_special_tokens=skip) == text
        assert TOKENIZER.decode(ids, errors="ignore", skip_special_tokens=skip) == expected.decode(errors="ignore")
    with pytest.raises(TextError, match=r"decoded byte \d+: invalid UTF-8"):
        TOKENIZER.decode(ids, errors="strict")
    wrong = np.array(ids, np.uint16)
    wrong[[1_900_000, 2_400_000]] = 291
    with pytest.raises(ConfigError, match=r"ids\[1900000\]: found 291"):
        TOKENIZER.decode(wrong)


def test_an_array_that_is_written_meanwhile() -> None:
    """Bytes or an error come out; the process lives."""
    long = SPECIAL["<|a special token of more than fifteen bytes|>"]
    ids = np.full(2_000_000, 65, np.uint16)
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            ids[::1000] = long
            ids[::1000] = 65

    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    try:
        for _ in range(30):
            try:
                seen.add(set(TOKENIZER.decode_bytes(ids)) >= {65})
            except ConfigError as error:
                assert "changed while it was decoded" in str(error)
    finally:
        stop.set()
        writer.join()
    assert seen <= {True}


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is Linux's")
@pytest.mark.parametrize("ids", ["np.full(SIZE, 65, np.uint8)", "[65] * SIZE"])
@pytest.mark.parametrize("call", ["decode", "decode_bytes"])
def test_no_memory_is_an_exception_and_no_end_of_the_process(ids: str, call: str) -> None:
    # More than what lies reserved in a process, by threads for instance, of which each has 64 MB: 40 MB had room there.
    size = 200_000_000 if ids.startswith("np") else 100_000_000
    ids = ids.replace("SIZE", str(size))
    code = f"""
import resource
import numpy as np
import bytekiln
from pathlib import Path
t = bytekiln.train_bpe_from_iterator(["the kiln is warm"], vocab_size=270)
ids = {ids}
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 20), resource.RLIM_INFINITY))
try:
    t.{call}(ids)
    print("it had room")
except MemoryError:
    print("MemoryError")
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(len(t.{call}(ids)))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, f"MemoryError\n{size}\n"), run.stderr[-500:]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_child_decodes_while_its_parent_does() -> None:
    tokenizer, ids = build(), np.full(3_000_000, 65, np.uint16)
    busy = threading.Thread(target=lambda: [tokenizer.decode_bytes(ids) for _ in range(20)])
    busy.start()
    for _ in range(10):
        child = os.fork()
        if child == 0:
            os._exit(0 if tokenizer.decode_bytes(ids[:1000]) == b"A" * 1000 else 1)
        assert os.waitpid(child, 0)[1] == 0
    busy.join()


def test_other_threads_run_while_many_ids_are_decoded() -> None:
    """A thread that only counts gets on during one call, which holds nothing of the interpreter's."""
    ids, counted, stop = np.full(30_000_000, 65, np.uint8), [0], threading.Event()

    def count() -> None:
        while not stop.is_set():
            counted[0] += 1
            time.sleep(1e-4)

    interval = sys.getswitchinterval()
    counter = threading.Thread(target=count)
    sys.setswitchinterval(10)  # nobody is made to give way: the counter gets in where the interpreter is released
    try:
        counter.start()
        before = counted[0]
        TOKENIZER.decode_bytes(ids)
        during = counted[0] - before
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        counter.join()
    assert during > 1
