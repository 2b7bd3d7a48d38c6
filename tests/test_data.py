"""Windows: pure functions of (seed, step, place), right by one, and refused before the first step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bytekiln import encode_files, train_bpe_from_iterator
from bytekiln.config import from_flat
from bytekiln.data import TokenData, open_data
from bytekiln.errors import BytekilnError, ConfigError, FileError, FormatError, MismatchError
from bytekiln.tokenfile import TokenFile
from lm_runs import VOCAB, tiny, tokens


def data(folder: Path, count: int = 600, context: int = 8) -> TokenData:
    return TokenData(TokenFile.open(tokens(folder / "d.npy", count)), context)


def test_targets_are_one_token_later(tmp_path: Path) -> None:
    d = data(tmp_path)
    inputs, targets = d.batch(np.array([0, 5, 600 - 9]))
    ids = np.load(tmp_path / "d.npy").astype(np.int64)
    assert inputs.shape == targets.shape == (3, 8)
    assert str(inputs.dtype) == "torch.int64"
    assert inputs[1].tolist() == ids[5:13].tolist()
    assert targets[1].tolist() == ids[6:14].tolist()
    assert targets[2, -1] == ids[-1]


def test_starts_are_a_function_of_seed_step_and_place(tmp_path: Path) -> None:
    d = data(tmp_path)
    a = d.random_starts(1, 7, 64)
    assert (a == d.random_starts(1, 7, 64)).all()
    assert (a[:16] == d.random_starts(1, 7, 16)).all(), "a place does not depend on the batch's size"
    assert (a != d.random_starts(1, 8, 64)).any()
    assert (a != d.random_starts(2, 7, 64)).any()
    assert a.tolist()[:4] == [428, 570, 525, 64], "the stream is part of the format: a resumed run relies on it"


def test_every_start_is_possible_and_none_beyond(tmp_path: Path) -> None:
    d = data(tmp_path, count=20)
    seen = {int(s) for step in range(60) for s in d.random_starts(0, step, 8)}
    assert seen == set(range(12))
    assert data(tmp_path, count=9).random_starts(0, 0, 5).tolist() == [0] * 5


@given(count=st.integers(9, 400), wanted=st.integers(1, 60))
def test_evaluation_windows_never_overlap(tmp_path_factory: pytest.TempPathFactory, count: int, wanted: int) -> None:
    folder = tmp_path_factory.getbasetemp()
    starts = data(folder, count).spread_starts(wanted)
    assert 1 <= len(starts) == min(wanted, (count - 1) // 8)
    assert starts[0] == 0
    assert starts[-1] + 9 <= count
    assert (np.diff(starts) >= 8).all()


def refused(kind: type[BytekilnError], folder: Path, *words: str, **values: object) -> None:
    with pytest.raises(kind) as found:
        open_data(tiny(folder, **values), None)
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
    assert open_data(config, maker)[2] == 258
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


def test_vocabulary_comes_from_the_manifest(tmp_path: Path) -> None:
    train, val, vocab = open_data(tiny(tmp_path, vocab_size=0), None)
    assert vocab == VOCAB
    assert val is not None
    assert train.bytes_per_token == val.bytes_per_token == 3.0


def test_fingerprint_follows_the_content(tmp_path: Path) -> None:
    a = TokenData(TokenFile.open(tokens(tmp_path / "a.npy", manifest=False)), 8)
    b = TokenData(TokenFile.open(tokens(tmp_path / "b.npy", manifest=False)), 8)
    c = TokenData(TokenFile.open(tokens(tmp_path / "c.npy", seed=5, manifest=False)), 8)
    assert a.fingerprint() == b.fingerprint() != c.fingerprint()
    about = json.loads((tokens(tmp_path / "d.npy").with_name("d.npy.json")).read_text())
    (tmp_path / "d.npy.json").write_text(json.dumps({**about, "checksum": "xxh3-128:00"}))
    assert TokenData(TokenFile.open(tmp_path / "d.npy"), 8).fingerprint() == "xxh3-128:00"


def test_half_a_tokenizer_is_refused() -> None:
    from bytekiln.data import load_tokenizer

    with pytest.raises(ConfigError, match="merges_path"):
        load_tokenizer(from_flat({"vocab_path": "vocab.json"}).data)
