"""Batches are pure functions of (seed, step, place) with the right targets; what is wrong is refused before step 1."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bytekiln import TokenFile, encode_files, train_bpe_from_iterator
from bytekiln.config import from_flat
from bytekiln.data import Batch, Data, Prefetcher, load_tokenizer, open_data, to_device, train_paths
from bytekiln.errors import BytekilnError, ConfigError, FileError, FormatError, MismatchError
from bytekiln.loss import IGNORED
from bytekiln.overlap import overlap
from bytekiln.sources import TrainSource
from lm_runs import VOCAB, tiny, tokens

EOT = 60


def opened(folder: Path, **values: object) -> Data:
    return open_data(tiny(folder, **{"sampling": "shuffled", **values}), None)


def documents_file(path: Path, count: int = 600, seed: int = 0, *, vocab: int = VOCAB) -> Path:
    """A token file in which id 60 ends documents, and nothing else is 60."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, EOT, count).astype(np.uint16)
    ids[rng.integers(0, count, count // 12)] = EOT
    return written(path, ids, vocab_size=vocab, eot_id=EOT)


def written(path: Path, ids: np.ndarray, **manifest: object) -> Path:
    np.save(path, ids)
    about = {"format": "bytekiln-tokens", "version": 1, "file": path.name, "dtype": str(ids.dtype), "tokens": len(ids)}
    path.with_name(path.name + ".json").write_text(json.dumps({**about, **manifest}), encoding="utf-8")
    return path


def joined(batches: list[Batch]) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """Windows of several batches in a row, padding of dynamic width cut off."""
    out: tuple[list[list[int]], ...] = ([], [], [])
    for b in batches:
        for i in range(len(b.inputs_BxT)):
            real = (b.targets_BxT[i] != IGNORED).nonzero()
            end = int(real.max()) + 1 if len(real) else 0
            for into, tensor in zip(out, (b.inputs_BxT, b.targets_BxT, b.documents_BxT), strict=True):
                into.append([] if tensor is None else tensor[i, :end].tolist())
    return out  # type: ignore[return-value]


# --- training batches -----------------------------------------------------------------------------------------


def test_targets_are_one_token_later(tmp_path: Path) -> None:
    ids = np.load(tokens(tmp_path / "d.npy")).astype(np.int64)
    train = opened(tmp_path, train_data=str(tmp_path / "d.npy"), sampling="sequential").train
    b = train.batch(0, 0, 0, 80)
    assert b.inputs_BxT.shape == b.targets_BxT.shape == (80, 8)
    assert b.inputs_BxT.dtype == b.targets_BxT.dtype == torch.int64
    assert b.documents_BxT is None
    assert b.count == 640
    assert b.inputs_BxT.is_contiguous()
    assert b.inputs_BxT[:74].flatten().tolist() == ids[:592].tolist()
    assert b.targets_BxT[:74].flatten().tolist() == ids[1:593].tolist()
    assert b.inputs_BxT[74:].tolist() == b.inputs_BxT[:6].tolist(), "the 75th window begins a second epoch"


def test_random_windows_keep_their_stream(tmp_path: Path) -> None:
    """The stream of nanoGPT's and the course's sampling is part of the format: a resumed run relies on it."""
    ids = np.load(tokens(tmp_path / "d.npy")).astype(np.int64)
    train = opened(tmp_path, train_data=str(tmp_path / "d.npy"), sampling="random", seed=1).train
    for first in (0, 7 * 64, 12345):
        found = train.batch(7, first, 0, 4).inputs_BxT.tolist()
        assert found == [ids[s : s + 8].tolist() for s in (428, 570, 525, 64)]
    assert found != train.batch(8, 0, 0, 4).inputs_BxT.tolist()


def test_every_random_start_is_possible_and_none_beyond(tmp_path: Path) -> None:
    file = written(tmp_path / "d.npy", np.arange(20, dtype=np.uint16))
    train = opened(tmp_path, train_data=str(file), sampling="random").train
    seen = {int(i) for step in range(60) for i in train.batch(step, 0, 0, 8).inputs_BxT[:, 0]}
    assert seen == set(range(12))


def test_shuffled_windows_use_every_token_once_an_epoch(tmp_path: Path) -> None:
    file = written(tmp_path / "d.npy", np.arange(1, 604, dtype=np.uint16), vocab_size=700)
    train = opened(tmp_path, train_data=str(file), vocab_size=0).train
    assert train.windows_per_epoch == 75
    b = train.batch(0, 0, 0, 75)
    assert sorted(b.inputs_BxT.flatten().tolist()) == list(range(1, 601))
    assert b.inputs_BxT.flatten().tolist() != list(range(1, 601))
    assert (b.targets_BxT == b.inputs_BxT + 1).all()
    later = [train.batch(0, n, 0, 1).inputs_BxT[0, 0].item() % 8 for n in range(75, 225)]
    assert len(set(later)) > 1, "later epochs begin at another phase"


KINDS: list[dict[str, object]] = [
    {"sampling": "random"},
    {"sampling": "shuffled"},
    {"sampling": "sequential"},
    {"windows": "packed"},
    {"windows": "packed", "sampling": "sequential", "document_mask": True},
    {"windows": "padded", "context_length": 16},
    {"document_mask": True},
    {"token_corruption": 0.2},
    {"objective": "mlm"},
    {"objective": "mlm", "windows": "padded"},
]


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: " ".join(map(str, k.values())))
def test_batches_do_not_depend_on_ranks_or_micro_steps(tmp_path: Path, kind: dict[str, object], several: bool) -> None:
    """64 × 1 are 16 × 4, and 4 ranks that take turns with micro-steps of 16, in order, at any step."""
    files = [documents_file(tmp_path / f"{n}.npy", 600 + 200 * n, n) for n in range(3 if several else 1)]
    settings = {"train_data": ",".join(map(str, files)), "vocab_size": 0, **kind}
    whole_run, ranks = opened(tmp_path, **settings).train, [opened(tmp_path, **settings).train for _ in range(4)]
    for step, first in ((0, 0), (5, 960), (6, 10**9 + 7)):
        whole = joined([whole_run.batch(step, first, 0, 64)])
        assert joined([whole_run.batch(step, first, 16 * m, 16) for m in range(4)]) == whole
        assert joined([ranks[m % 4].batch(step, first, 4 * m, 4) for m in range(16)]) == whole
        singly = [ranks[m % 4].batch(step, first, m, 1) for m in reversed(range(64))]
        assert joined(singly[::-1]) == whole
    assert whole_run.batch(5, 960, 0, 64).count == sum(len(t) - t.count(IGNORED) for t in joined(
        [whole_run.batch(5, 960, 0, 64)])[1])  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: " ".join(map(str, k.values())))
def test_batches_made_ahead_are_the_same(tmp_path: Path, kind: dict[str, object]) -> None:
    settings = {"train_data": str(documents_file(tmp_path / "d.npy", 900)), "vocab_size": 0, **kind}
    direct = opened(tmp_path, **settings).train
    with Prefetcher(opened(tmp_path, **settings).train, 3, worth_s=0) as ahead:
        for step in range(12):
            first = 24 * step if step < 6 else 144 + 48 * (step - 6)  # the batch grows
            requests = [(step, first, 6 * m, 6) for m in range(4 if step < 6 else 8)]
            assert joined(ahead.get(requests)) == joined([direct.batch(*r) for r in requests])


@given(first=st.integers(0, 5000), count=st.integers(1, 2500))
@settings(max_examples=25)
def test_runs_of_windows_over_the_borders_of_blocks(
    tmp_path_factory: pytest.TempPathFactory, first: int, count: int
) -> None:
    folder = tmp_path_factory.getbasetemp() / "blocks"
    train = opened(folder).train
    whole = train.batch(0, first, 0, count).inputs_BxT
    for place in {0, count // 2, count - 1}:
        assert whole[place].tolist() == train.batch(0, first + place, 0, 1).inputs_BxT[0].tolist()


def test_other_seeds_see_other_windows(tmp_path: Path) -> None:
    for kind in KINDS:
        if kind.get("sampling") != "sequential":
            file = documents_file(tmp_path / "d.npy")
            a, b = (
                opened(tmp_path, train_data=str(file), vocab_size=0, seed=seed, **kind).train.batch(0, 0, 0, 16)
                for seed in (1, 2)
            )
            assert joined([a]) != joined([b])


# --- several files --------------------------------------------------------------------------------------------


def marked(tmp_path: Path, sizes: tuple[int, ...]) -> list[Path]:
    """Files whose every token is the file's number."""
    return [written(tmp_path / f"{n}.npy", np.full(s, n, np.uint16), vocab_size=61) for n, s in enumerate(sizes)]


def test_several_files_by_size_give_each_of_their_windows_once(tmp_path: Path) -> None:
    files = marked(tmp_path, (801, 161, 41))
    for sampling in ("shuffled", "sequential", "random"):
        train = opened(tmp_path, train_data=",".join(map(str, files)), sampling=sampling).train
        assert train.windows_per_epoch == 125
        firsts = train.batch(0, 0, 0, 125).inputs_BxT[:, 0]
        assert torch.bincount(firsts).tolist() == [100, 20, 5]
        prefix = torch.stack([firsts == n for n in range(3)]).cumsum(1)
        exact = torch.arange(1, 126)[None, :] * torch.tensor([[100], [20], [5]]) / 125
        assert (prefix - exact).abs().max() < 1


def test_weights_decide_shares(tmp_path: Path) -> None:
    a, b = marked(tmp_path, (801, 161))
    train = opened(tmp_path, train_data=f"{a}, {b}", data_weights="0.25,0.75").train
    for first in (0, 4000):
        assert torch.bincount(train.batch(0, first, 0, 400).inputs_BxT[:, 0]).tolist() == [100, 300]
    refused(ConfigError, tmp_path, "data_weights", train_data=f"{a},{b}", data_weights="1")


def test_a_path_with_a_comma_that_exists_is_one_file(tmp_path: Path) -> None:
    a, b = marked(tmp_path, (801, 161))
    assert train_paths(f"{a},{b}") == [str(a), str(b)]
    strange = tmp_path / "a.npy,b.npy"
    written(strange, np.full(99, 5, np.uint16))
    assert train_paths(str(strange)) == [str(strange)]
    assert len(opened(tmp_path, train_data=str(strange)).train.files) == 1
    assert train_paths(" ,") == [" ,"]


def test_shards_are_opened_by_the_name_that_they_were_given(tmp_path: Path) -> None:
    tokenizer = train_bpe_from_iterator(
        ["the kiln is warm " * 9], vocab_size=VOCAB + 200, special_tokens=["<|endoftext|>"]
    )
    text = tmp_path / "t.txt"
    text.write_text("".join(f"the kiln {n} is warm<|endoftext|>" for n in range(400)))
    whole = encode_files(tokenizer, text, tmp_path / "whole.npy").array
    shards = encode_files(tokenizer, text, tmp_path / "s.npy", shard_tokens=(len(whole) - 1) // 3)
    assert isinstance(shards, list) and len(shards[-1]) < 4  # less than a window
    names = [str(f.path) for f in shards]
    other = tokens(tmp_path / "other.npy", 500)
    assert train_paths(str(tmp_path / "s.npy")) == names
    assert train_paths(f"{other},{tmp_path / 's.npy'}") == [str(other), *names]
    assert train_paths(str(tmp_path / "none.npy")) == [str(tmp_path / "none.npy")]
    settings = {"vocab_size": tokenizer.n_vocab, "val_data": ""}
    data = opened(tmp_path, train_data=str(tmp_path / "s.npy"), **settings)
    assert [f.path.name for f in data.train.files] == ["s_00000.npy", "s_00001.npy", "s_00002.npy"]
    assert any(re.search(r"s_00003\.npy: not read, a shard of \d+ tokens", notice) for notice in data.notices)
    one = encode_files(tokenizer, text, tmp_path / "v.npy", shard_tokens=10**6)
    assert isinstance(one, list) and len(one) == 1
    validated = opened(tmp_path, train_data=names[0], **settings | {"val_data": str(tmp_path / "v.npy")}).val
    assert validated is not None and [f.path for f in validated.files] == [one[0].path]
    with pytest.raises(FileError, match=r"s\.npy: is in 4 shards, s_00000\.npy and so on; expected one of them"):
        TokenFile.open(tmp_path / "s.npy")
    refused(ConfigError, tmp_path, "val_data", "4 shards", train_data=names[0], val_data=str(tmp_path / "s.npy"))
    Path(names[1]).unlink()
    refused(FileError, tmp_path, "s_00001.npy: no such file", train_data=str(tmp_path / "s.npy"))


def test_every_file_is_checked(tmp_path: Path) -> None:
    a, b = marked(tmp_path, (801, 161))
    bad = written(tmp_path / "bad.npy", np.full(99, 70, np.uint16))
    refused(FormatError, tmp_path, "bad.npy", "id 70", train_data=f"{a},{bad}")
    refused(FormatError, tmp_path, "short.npy", train_data=f"{a},{tokens(tmp_path / 'short.npy', 5)}")
    refused(FileError, tmp_path, "none.npy: no such file", train_data=f"{a},{tmp_path}/none.npy,{b}")


def test_every_type_of_file_gives_the_same_batches(tmp_path: Path) -> None:
    ids = np.load(tokens(tmp_path / "d.npy", manifest=False))
    expected = opened(tmp_path, train_data=str(tmp_path / "d.npy")).train.batch(3, 9, 0, 5)
    for dtype in ("uint16", "uint32", "int32", "int64"):
        ids.astype(dtype).tofile(tmp_path / "d.bin")
        np.save(tmp_path / "e.npy", ids.astype(dtype))
        for name, said in (("d.bin", {"data_dtype": dtype}), ("e.npy", {})):
            found = opened(tmp_path, train_data=str(tmp_path / name), **said).train.batch(3, 9, 0, 5)
            assert found.inputs_BxT.tolist() == expected.inputs_BxT.tolist()
            assert found.targets_BxT.tolist() == expected.targets_BxT.tolist()
    assert any("read as uint16" in n for n in opened(tmp_path, train_data=str(raw(tmp_path, ids))).notices)


def raw(tmp_path: Path, ids: np.ndarray) -> Path:
    ids.astype("uint16").tofile(tmp_path / "raw.bin")
    return tmp_path / "raw.bin"


# --- documents ------------------------------------------------------------------------------------------------


def test_document_numbers_of_stream_windows(tmp_path: Path) -> None:
    ids = np.array([1, EOT, EOT, 2, 3, 4, EOT, 5, 6, 7, 8, 9, 10, 11, 12, 13, EOT, 1], np.uint16)
    file = written(tmp_path / "d.npy", ids, eot_id=EOT)
    data = opened(tmp_path, train_data=str(file), document_mask=True, sampling="sequential", val_data="")
    for b in (data.train.batch(0, 0, 0, 2), next(data.train_eval.batches(2, 0))):
        assert b.documents_BxT is not None
        assert b.documents_BxT.dtype == torch.int32
        # The end-of-text token belongs to the document that it ends, and predicts the first token of the next.
        assert b.documents_BxT.tolist() == [[0, 0, 1, 2, 2, 2, 2, 3], [0] * 8]
        assert b.targets_BxT[0].tolist() == ids[1:9].tolist()
        assert b.count == 16


def test_packed_windows_of_a_source(tmp_path: Path) -> None:
    ids = [1, 2, EOT, 3, EOT, 4, 5, 6, 7, EOT, *range(10, 21), EOT]
    file = written(tmp_path / "d.npy", np.array(ids, np.uint16), eot_id=EOT)
    data = opened(
        tmp_path, train_data=str(file), windows="packed", document_mask=True, sampling="sequential", val_data=""
    )
    b = data.train.batch(0, 0, 0, 3)
    assert data.train.windows_per_epoch == 3
    assert b.inputs_BxT.tolist() == [
        [1, 2, EOT, 4, 5, 6, 7, EOT],
        [3, EOT, 18, 19, 20, EOT, EOT, EOT],
        [10, 11, 12, 13, 14, 15, 16, 17],
    ]
    N = IGNORED
    assert b.targets_BxT.tolist() == [
        [2, EOT, 4, 5, 6, 7, EOT, N],
        [EOT, N, 19, 20, EOT, N, N, N],
        [11, 12, 13, 14, 15, 16, 17, 18],
    ]
    assert b.documents_BxT is not None
    assert b.documents_BxT.tolist() == [[0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 2, 2], [0] * 8]
    assert b.count == 7 + 4 + 8


def test_masked_windows_hide_their_padding(tmp_path: Path) -> None:
    """Attention from both sides would see padding; without document_mask it may see other documents."""
    ids = np.tile(np.array([*range(1, 25), EOT, *range(1, 10), EOT], np.uint16), 10)
    file = written(tmp_path / "d.npy", ids, eot_id=EOT, vocab_size=VOCAB)
    for windows in ("packed", "padded"):
        b = opened(
            tmp_path, train_data=str(file), vocab_size=0, objective="mlm", windows=windows, context_length=40
        ).train
        whole = b.batch(0, 0, 0, 40)
        assert whole.documents_BxT is not None
        assert whole.documents_BxT.unique().tolist() == [0, 1]
        padding = whole.documents_BxT == 1
        assert (whole.targets_BxT[padding] == IGNORED).all()
        assert (padding.int().diff(dim=1) >= 0).all()
        assert (whole.inputs_BxT[padding] == EOT).all()
    assert opened(tmp_path, train_data=str(file), vocab_size=0, windows="padded").train.batch(0, 0, 0, 9)[2] is None


def test_padded_batches_of_several_files_are_as_wide_as_the_widest(tmp_path: Path) -> None:
    short = written(tmp_path / "a.npy", np.array([1, 2, 3, EOT] * 30, np.uint16), eot_id=EOT)
    long = written(tmp_path / "b.npy", np.array([*[5] * 79, EOT] * 3, np.uint16), eot_id=EOT)
    both = opened(
        tmp_path, train_data=f"{short},{long}", windows="padded", context_length=96, data_weights="1,1", val_data="",
        document_mask=True,
    ).train  # fmt: skip
    b = both.batch(0, 0, 0, 4)
    assert b.inputs_BxT.shape == (4, 96)
    assert b.count == 2 * 3 + 2 * 79
    assert b.documents_BxT is not None
    for i in range(4):
        length = int((b.targets_BxT[i] != IGNORED).sum())
        assert b.documents_BxT[i].tolist() == [0] * length + [1] * (96 - length)


def test_a_row_that_filled_its_own_file_gets_padding_of_its_own_document(tmp_path: Path) -> None:
    full = written(tmp_path / "a.npy", np.array([*[1] * 32, EOT] * 4, np.uint16), eot_id=EOT)
    long = written(tmp_path / "b.npy", np.array([*[5] * 79, EOT] * 3, np.uint16), eot_id=EOT)
    values = {"windows": "padded", "context_length": 96, "data_weights": "1,1", "document_mask": True, "val_data": ""}
    b = opened(tmp_path, train_data=f"{full},{long}", **values).train.batch(0, 0, 0, 2)
    assert b.documents_BxT is not None
    numbers = sorted(b.documents_BxT.tolist(), key=sum)
    assert numbers == [[0] * 79 + [1] * 17, [0] * 32 + [1] * 64]


def test_documents_need_an_end_of_text_id(tmp_path: Path) -> None:
    for field, value in (("windows", "packed"), ("document_mask", True), ("num_documents", 3)):
        refused(ConfigError, tmp_path, field, "ends documents", **{field: value})
    nothing = written(tmp_path / "n.npy", np.full(40, EOT, np.uint16), eot_id=EOT)
    refused(FormatError, tmp_path, "n.npy", "empty documents", train_data=str(nothing), windows="padded")


# --- limits ---------------------------------------------------------------------------------------------------


def test_limits_keep_the_first_tokens_and_documents(tmp_path: Path) -> None:
    ids = np.tile(np.array([1, 2, 3, 4, EOT], np.uint16), 40)
    file = written(tmp_path / "d.npy", ids, eot_id=EOT)
    common = {"train_data": str(file), "sampling": "sequential"}
    assert opened(tmp_path, **common, max_tokens=41).train.windows_per_epoch == 5
    assert opened(tmp_path, **common, num_documents=10).train.windows_per_epoch == 6
    assert opened(tmp_path, **common, num_documents=10, max_tokens=25).train.windows_per_epoch == 3
    data = opened(tmp_path, **common, max_tokens=500)
    assert data.train.windows_per_epoch == 24
    assert any("max_tokens: found 200" in n and "500" in n for n in data.notices)
    assert any("num_documents: found 40" in n for n in opened(tmp_path, **common, num_documents=41).notices)
    refused(FormatError, tmp_path, "d.npy: found 8 tokens left by", **common, max_tokens=8)
    limited = opened(tmp_path, **common, max_tokens=41)
    assert sum(b.count for b in limited.train_eval.batches(4, 0)) == 40, "train_eval reads the same part"


def test_limits_count_over_the_files_in_order(tmp_path: Path) -> None:
    ids = np.tile(np.array([1, 2, 3, 4, EOT], np.uint16), 20)
    a, b = (written(tmp_path / f"{n}.npy", ids, eot_id=EOT) for n in "ab")
    common = {"train_data": f"{a},{b}", "sampling": "sequential"}
    assert opened(tmp_path, **common, max_tokens=125).train.windows_per_epoch == 12 + 3
    assert opened(tmp_path, **common, num_documents=25).train.windows_per_epoch == 12 + 3


@pytest.mark.parametrize(
    ("limit", "left"), [({"num_documents": 20}, 0), ({"max_tokens": 100}, 0), ({"max_tokens": 107}, 7)]
)
def test_a_file_that_the_limits_empty_is_left_out(limit: dict[str, int], left: int, tmp_path: Path) -> None:
    ids = np.tile(np.array([1, 2, 3, 4, EOT], np.uint16), 20)
    a, b = (written(tmp_path / f"{n}.npy", ids, eot_id=EOT) for n in "ab")
    common = {"sampling": "sequential", "batch_size": 4}
    data = opened(tmp_path, train_data=f"{a},{b}", data_weights="0.9,0.1", **common, **limit)
    alone = opened(tmp_path, train_data=str(a), **common)
    told = [n for n in data.notices if "not read" in n]
    assert told == [f"{b}: not read, max_tokens or num_documents leave {left} tokens of it"]
    assert data.train.files == data.train_eval.files and [f.path for f in data.train.files] == [a]
    assert data.train.windows_per_epoch == alone.train.windows_per_epoch == 12
    assert torch.equal(data.train.batch(0, 0, 0, 24).inputs_BxT, alone.train.batch(0, 0, 0, 24).inputs_BxT)
    assert [b.count for b in data.train_eval.batches(4, 0)] == [b.count for b in alone.train_eval.batches(4, 0)]
    refused(FormatError, tmp_path, "a.npy: found 8 tokens left by", train_data=f"{a},{b}", max_tokens=8)
    short = written(tmp_path / "short.npy", ids[:7], eot_id=EOT)
    refused(FormatError, tmp_path, "short.npy: found 7 tokens; expected", train_data=f"{a},{short}")


def test_weights_stay_with_their_files_where_one_is_left_out(tmp_path: Path) -> None:
    ids = np.arange(1, 101, dtype=np.uint16) % EOT
    a, b, c = (written(tmp_path / f"{n}.npy", ids, eot_id=EOT) for n in "abc")
    train = opened(tmp_path, train_data=f"{a},{b},{c}", data_weights="1,3,4", max_tokens=200).train
    assert train.mixture.shares == (1, 3)
    refused(ConfigError, tmp_path, "data_weights", train_data=f"{a},{b}", data_weights="1,3,4", max_tokens=100)


def test_names_of_many_files_may_be_long(tmp_path: Path) -> None:
    names = [f"{'x' * 90}{i}.npy" for i in range(60)]
    assert train_paths(" , ".join(names)) == names
    assert train_paths("a.npy, b.npy ,c.npy") == ["a.npy", "b.npy", "c.npy"]


# --- masks ----------------------------------------------------------------------------------------------------


def test_a_mask_token_is_added_once_and_found_again(tmp_path: Path) -> None:
    bare = str(tokens(tmp_path / "bare.npy", manifest=False))
    for said in ({"vocab_size": 0}, {"vocab_size": VOCAB}, {"vocab_size": VOCAB, "train_data": bare, "val_data": ""}):
        for kind in ({"objective": "mlm"}, {"token_corruption": 0.1}):
            data = opened(tmp_path, **said, **kind)
            assert (data.vocab_size, data.mask_id) == (VOCAB + 1, VOCAB)
            assert any(f"mask token: id {VOCAB}" in n for n in data.notices)
            again = opened(tmp_path, **{**said, "vocab_size": data.vocab_size}, **kind)
            assert (again.vocab_size, again.mask_id) == (VOCAB + 1, VOCAB), "as a resumed run has it"
    roomy = opened(tmp_path, vocab_size=64, objective="mlm")
    assert (roomy.vocab_size, roomy.mask_id) == (64, VOCAB)
    assert opened(tmp_path).mask_id is None
    wide = written(tmp_path / "w.npy", np.arange(40, dtype=np.uint16), vocab_size=90)
    refused(ConfigError, tmp_path, "vocab_size", "mask token", train_data=str(wide), vocab_size=61, objective="mlm")


@pytest.mark.parametrize("name", ["<mask>", "[MASK]", "<|mask|>"])
def test_the_tokenizers_own_mask_token_is_used(tmp_path: Path, name: str) -> None:
    specials = ["<|endoftext|>", name]
    tokenizer = train_bpe_from_iterator(["the kiln"], vocab_size=260, special_tokens=specials)
    (tmp_path / "t.txt").write_text("the kiln<|endoftext|>" * 30)
    for split in ("train", "val"):
        encode_files(tokenizer, tmp_path / "t.txt", tmp_path / f"{split}.npy")
    data = open_data(tiny(tmp_path, vocab_size=0, objective="mlm"), tokenizer)
    assert data.vocab_size == tokenizer.n_vocab
    assert data.mask_id == tokenizer.special_tokens[name]
    b = data.train.batch(0, 0, 0, 200)
    chosen = b.targets_BxT[b.targets_BxT != IGNORED]
    assert tokenizer.eot_id not in chosen.tolist()
    assert (b.inputs_BxT == data.mask_id).sum() > 0


def test_a_window_is_masked_otherwise_each_time_it_comes(tmp_path: Path) -> None:
    for kind in ({"objective": "mlm"}, {"token_corruption": 0.3}):
        train = opened(tmp_path, sampling="sequential", **kind).train
        epoch = train.windows_per_epoch
        now, later = train.batch(0, 0, 0, epoch), train.batch(9, 0, epoch, epoch)
        assert now.inputs_BxT.tolist() != later.inputs_BxT.tolist()
        as_first = train.batch(9, epoch, 0, epoch)
        assert joined([later]) == joined([as_first]), "the number in the run counts, not the place in the step"


def test_corruption_is_for_training_only(tmp_path: Path) -> None:
    data, plain = opened(tmp_path, token_corruption=0.3), opened(tmp_path)
    assert data.val is not None
    assert plain.val is not None
    a, b = data.train.batch(0, 0, 0, 60), plain.train.batch(0, 0, 0, 60)
    assert a.targets_BxT.tolist() == b.targets_BxT.tolist()
    assert ((a.inputs_BxT == VOCAB) | (a.inputs_BxT == b.inputs_BxT)).all()
    assert (a.inputs_BxT == VOCAB).float().mean().item() == pytest.approx(0.3, abs=0.08)
    for mine, theirs in ((data.val, plain.val), (data.train_eval, plain.train_eval)):
        for x, y in zip(mine.batches(3, 2), theirs.batches(3, 2), strict=True):
            assert x.inputs_BxT.tolist() == y.inputs_BxT.tolist()


# --- evaluation -----------------------------------------------------------------------------------------------


@given(count=st.integers(9, 90), batch_size=st.integers(1, 5), mask=st.booleans())
@settings(max_examples=30)
def test_the_whole_file_has_every_target_once(
    tmp_path_factory: pytest.TempPathFactory, count: int, batch_size: int, mask: bool
) -> None:
    folder = tmp_path_factory.getbasetemp() / "whole"
    folder.mkdir(exist_ok=True)
    ids = np.arange(count).astype(np.uint16)
    file = written(folder / "val.npy", ids, eot_id=EOT, vocab_size=100)
    train = written(folder / "train.npy", ids, vocab_size=100)
    data = opened(folder, train_data=str(train), val_data=str(file), vocab_size=0, document_mask=mask)
    assert data.val is not None
    batches = list(data.val.batches(batch_size, 0))
    targets = torch.cat([b.targets_BxT for b in batches])
    assert sorted(targets[targets != IGNORED].tolist()) == list(range(1, count))
    assert all(b.inputs_BxT.shape[1] == 8 for b in batches)
    assert sum(b.count for b in batches) == count - 1
    real = targets != IGNORED
    assert (torch.cat([b.inputs_BxT for b in batches])[real] + 1 == targets[real]).all()
    assert all((b.documents_BxT is not None) == mask for b in batches)


def test_evaluation_has_its_own_context(tmp_path: Path) -> None:
    """Windows of 20 where training has 8: the same targets once each, as many tokens in a batch, and longer files."""
    ids = np.arange(100, dtype=np.uint16)
    file = written(tmp_path / "v.npy", ids, vocab_size=100)
    train = written(tmp_path / "t.npy", ids, vocab_size=100)
    paths = {"train_data": str(train), "val_data": str(file), "vocab_size": 0}
    data = opened(tmp_path, **paths, eval_context_length=20, max_seq_len=20, batch_size=5)
    assert data.val is not None
    config = tiny(tmp_path, **paths, eval_context_length=20, max_seq_len=20, batch_size=5)
    assert (config.eval_context, config.eval_batch_size, tiny(tmp_path, batch_size=5).eval_batch_size) == (20, 2, 5)
    for source in (data.val, data.train_eval):
        batches = list(source.batches(2, 0))
        assert {b.inputs_BxT.shape[1] for b in batches} == {20}
        targets = torch.cat([b.targets_BxT for b in batches])
        assert sorted(targets[targets != IGNORED].tolist()) == list(range(1, 100))
        assert source.windows(2, 0) == len(targets) == 5
        assert source.windows(2, 1) == 2 == len(next(source.batches(2, 1)).inputs_BxT)
    assert data.train.batch(0, 0, 0, 3).inputs_BxT.shape == (3, 8)
    short = written(tmp_path / "s.npy", ids[:20], vocab_size=100)
    refused(FormatError, tmp_path, "s.npy: found 20 tokens; expected at least 21", "eval_context_length",
            **{**paths, "val_data": str(short)}, eval_context_length=20, max_seq_len=20)  # fmt: skip
    assert opened(tmp_path, **{**paths, "val_data": str(short)}, eval_context_length=4).val is not None
    refused(ConfigError, tmp_path, "eval_context_length: found 20; expected at most max_seq_len, 8",
            eval_context_length=20, max_seq_len=8)  # fmt: skip


def test_evaluation_spreads_over_the_file_and_never_changes(tmp_path: Path) -> None:
    ids = np.arange(600, dtype=np.uint16)
    file = written(tmp_path / "v.npy", ids, vocab_size=600)
    for seed in (1, 2):
        data = opened(tmp_path, train_data=str(file), val_data=str(file), vocab_size=0, seed=seed)
        for source in (data.val, data.train_eval):
            assert source is not None
            batches = list(source.batches(3, 2))
            assert [len(b.inputs_BxT) for b in batches] == [3, 3]
            assert torch.cat([b.inputs_BxT[:, 0] for b in batches]).tolist() == [0, 118, 236, 354, 472, 591]
            assert sum(len(b.inputs_BxT) for b in source.batches(7, 1000)) == 74, "no window twice"
            assert sum(b.count for b in source.batches(7, 1000)) == 592


def test_masks_of_evaluation_are_always_the_same(tmp_path: Path) -> None:
    def seen(batch_size: int, num_batches: int, seed: int) -> dict[tuple[int, ...], tuple[int, ...]]:
        data = opened(tmp_path, objective="mlm", seed=seed)
        assert data.val is not None
        batches = [(b.inputs_BxT[i], b.targets_BxT[i]) for b in data.val.batches(batch_size, num_batches)
                   for i in range(len(b.inputs_BxT))]  # fmt: skip
        original = (torch.where(t != IGNORED, t, i).tolist() for i, t in batches)
        return {tuple(o): tuple(t.tolist()) for o, (_, t) in zip(original, batches, strict=True)}

    a = seen(4, 6, seed=1)
    assert a == seen(3, 8, seed=2), "neither the batch size nor the seed of the run"
    everything = seen(4, 0, seed=1)
    assert everything
    assert sum(t != IGNORED for row in a.values() for t in row) >= len(a)


def test_several_files_are_evaluated_by_their_shares(tmp_path: Path) -> None:
    files = marked(tmp_path, (801, 161, 41))
    data = opened(tmp_path, train_data=",".join(map(str, files)))
    firsts = torch.cat([b.inputs_BxT[:, 0] for b in data.train_eval.batches(5, 5)])
    assert torch.bincount(firsts).tolist() == [20, 4, 1]
    assert sum(b.count for b in data.train_eval.batches(5, 0)) == 800 + 160 + 40


def test_bytes_per_token(tmp_path: Path) -> None:
    data = opened(tmp_path, vocab_size=0)
    assert data.val is not None
    assert data.val.bytes_per_token == data.train_eval.bytes_per_token == 3.0
    assert data.vocab_size == VOCAB
    assert data.tokenizer_hash == "sha256:" + "ab" * 32
    bare = opened(tmp_path, train_data=str(tokens(tmp_path / "b.npy", manifest=False)))
    assert bare.train_eval.bytes_per_token is None


# --- refusals and notices -------------------------------------------------------------------------------------


def refused(kind: type[BytekilnError], folder: Path, *words: str, **values: object) -> None:
    with pytest.raises(kind) as found:
        opened(folder, **values)
    for word in words:
        assert word in str(found.value)


def test_refusals_name_the_file(tmp_path: Path) -> None:
    refused(ConfigError, tmp_path, "train_data: found nothing", train_data="")
    refused(FileError, tmp_path, "none.npy: no such file", "bpe-encode", train_data=str(tmp_path / "none.npy"))
    refused(FormatError, tmp_path, "train.npy", "601", context_length=600, max_seq_len=600)
    refused(FormatError, tmp_path, "train.npy", "50", vocab_size=50)
    short = tokens(tmp_path / "short.npy", 5)
    refused(FormatError, tmp_path, "short.npy", "5 tokens", val_data=str(short))
    bare = tokens(tmp_path / "bare.npy", manifest=False)
    refused(
        ConfigError, tmp_path, "vocab_size: unknown", "--tokenizer", vocab_size=0, train_data=str(bare), val_data=""
    )
    other = tokens(tmp_path / "other.npy")
    manifest = other.with_name("other.npy.json")
    manifest.write_text(manifest.read_text().replace("ab" * 32, "cd" * 32))
    refused(MismatchError, tmp_path, "other.npy", "sha256:cdcd", "sha256:abab", val_data=str(other))


def test_tokenizer_that_did_not_make_the_data_is_refused(tmp_path: Path, command: Callable[..., object]) -> None:
    maker, other = (train_bpe_from_iterator([t], vocab_size=258) for t in ("the kiln", "wet clay"))
    maker.save(tmp_path / "maker.json")
    other.save(tmp_path / "other.json")
    (tmp_path / "text.txt").write_text("the kiln is warm " * 40, encoding="utf-8")
    for split in ("train", "val"):
        encode_files(maker, tmp_path / "text.txt", tmp_path / f"{split}.npy")
    config = tiny(tmp_path, vocab_size=0, tokenizer=str(tmp_path / "maker.json"))
    assert open_data(config, maker).vocab_size == 258
    with pytest.raises(MismatchError) as found:
        open_data(config.with_(tokenizer=str(tmp_path / "other.json")), other)
    for word in ("other.json", "train.npy", maker.hash[:19], other.hash[:19]):
        assert word in str(found.value)
    flags = (
        "--train-data",
        tmp_path / "train.npy",
        "--tokenizer",
        tmp_path / "other.json",
        "--out-dir",
        tmp_path / "r",
    )
    said = command("lm-train", "demo", *flags, status=2).stderr
    assert "other.json" in said
    assert "train.npy" in said
    assert not (tmp_path / "r").exists()


def test_fingerprint_follows_the_content(tmp_path: Path) -> None:
    def source(*files: Path) -> TrainSource:
        return opened(tmp_path, train_data=",".join(map(str, files))).train

    a, b = (tokens(tmp_path / f"{n}.npy", manifest=False) for n in "ab")
    c = tokens(tmp_path / "c.npy", seed=5, manifest=False)
    assert source(a).fingerprint() == source(b).fingerprint() != source(c).fingerprint()
    assert source(a).fingerprint() == source(a).ends()
    assert source(a, c).fingerprint() == source(b, c).fingerprint()
    assert len({source(*x).fingerprint() for x in ((a,), (a, c), (c, a), (a, b))}) == 4
    about = json.loads((tokens(tmp_path / "d.npy").with_name("d.npy.json")).read_text())
    (tmp_path / "d.npy.json").write_text(json.dumps({**about, "checksum": "xxh3-128:00"}))
    assert source(tmp_path / "d.npy").fingerprint() == "xxh3-128:00"
    assert source(tmp_path / "d.npy").ends() == source(tmp_path / "d.npy").ends() != "xxh3-128:00"


def test_half_a_tokenizer_is_refused() -> None:
    with pytest.raises(ConfigError, match="merges_path"):
        load_tokenizer(from_flat({"vocab_path": "vocab.json"}).data)


def test_the_same_data_for_training_and_validation_is_told(tmp_path: Path) -> None:
    def told(**values: object) -> list[str]:
        return [n for n in opened(tmp_path, **values).notices if " %" in n]

    rng = np.random.default_rng(0)
    train = tmp_path / "train.npy"
    ids = rng.integers(0, VOCAB, 20_000).astype(np.uint16)
    written(train, ids, checksum="xxh3-128:11", sources=[{"name": "a.txt", "bytes": 30, "checksum": "x:1"}])
    fresh = rng.integers(0, VOCAB, 5000).astype(np.uint16)
    val = str(written(tmp_path / "val.npy", fresh))
    assert told(val_data=val) == []
    assert "100 %" in told(val_data=str(train))[0]
    assert "25 %" in told(val_data=str(train), max_tokens=5000)[0]
    copy = written(tmp_path / "val_copy.npy", ids, checksum="xxh3-128:11")
    assert "100 %" in told(val_data=str(copy))[0]
    sources = [{"name": "a.txt", "bytes": 30, "checksum": "x:1"}, {"name": "b.txt", "bytes": 90, "checksum": "x:2"}]
    written(tmp_path / "val.npy", fresh, sources=sources)
    assert "25 % of its text (a.txt)" in told(val_data=val)[0]
    half = np.concatenate([fresh, ids[3333:8333]])
    leaky = str(written(tmp_path / "val_leaky.npy", half))
    found = re.search(r"(\d+) of 156 sampled windows of 64 tokens \((\d+) %\)", told(val_data=leaky)[0])
    assert found
    assert int(found[1]) in (77, 78, 79)
    assert int(found[2]) in (49, 50, 51)
    assert told(val_data=leaky, max_tokens=3000) == [], "only what is trained on counts"


@given(seed=st.integers(0, 50), at=st.integers(0, 70_000), vocab=st.sampled_from([4, 65, 60_000, 10**6]))
@settings(max_examples=40)
def test_overlap_finds_a_window_at_any_offset(seed: int, at: int, vocab: int) -> None:
    rng = np.random.default_rng(seed)
    dtype = np.uint16 if vocab <= 1 << 16 else np.uint32
    training, val = rng.integers(0, vocab, 70_064).astype(dtype), rng.integers(0, vocab, 640).astype(dtype)
    assert overlap([training], val) == (0, 10, 1.0)
    start = 64 * (seed % 10)
    training[at : at + 64] = val[start : start + 64]
    assert overlap([training], val) == (1, 10, 1.0)
    training[at + seed % 64] ^= 1
    assert overlap([training], val)[0] == 0, "one token differs"


def test_overlap_of_large_data_takes_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    val = rng.integers(0, 65, 20_000).astype(np.uint16)
    training = np.concatenate([rng.integers(0, 65, 10_000_000).astype(np.uint16), val])
    began = time.process_time()
    assert overlap([training], val) == (256, 256, 1.0)
    seconds = time.process_time() - began
    assert seconds < 1, f"10 M tokens took {seconds} s"
    same = np.full(3_000_000, 7, np.uint16)
    began = time.process_time()
    assert overlap([same], same[:20_000]) == (256, 256, 1.0)
    assert time.process_time() - began < 2, "text that repeats itself"
    monkeypatch.setattr("bytekiln.overlap.LARGEST_SCAN", 4_000_000)
    found = overlap([training], val)
    assert found.scanned == pytest.approx(0.4, abs=0.15)
    assert found.found == 256, "the last stretch reaches the end"


def test_batches_move_to_a_device(tmp_path: Path) -> None:
    b = opened(tmp_path).train.batch(0, 0, 0, 3)
    assert to_device(b, torch.device("cpu")).inputs_BxT.data_ptr() == b.inputs_BxT.data_ptr()
    moved = to_device(b._replace(documents_BxT=torch.zeros(3, 8, dtype=torch.int32)), torch.device("meta"))
    assert moved.count == b.count
    assert {t.device.type for t in moved[:3]} == {"meta"}


class Recorded:
    """Stands for a tensor on its way to CUDA, which this machine has not."""

    def __init__(self) -> None:
        self.did: list[object] = []

    def is_pinned(self) -> bool:
        return "pin" in self.did

    def pin_memory(self) -> Recorded:
        self.did.append("pin")
        return self

    def to(self, device: torch.device, *, non_blocking: bool) -> Recorded:
        self.did += [str(device), non_blocking]
        return self


def test_cuda_copies_go_through_pinned_memory_without_waiting() -> None:
    a, b, c = Recorded(), Recorded(), Recorded()
    for documents in (c, None):
        moved = to_device(Batch(a, b, documents, 3), torch.device("cuda:0"))  # type: ignore[arg-type]
    assert moved.documents_BxT is None
    assert a.did == b.did == ["pin", "cuda:0", True, "cuda:0", True], "what is pinned already is not pinned again"
    assert c.did == ["pin", "cuda:0", True]
