"""Token files to batches. In: paths of token files. Out: (inputs, targets) as int64 tensors.

Where a window starts is a pure function of (seed, step, place in the effective batch): a resumed run sees
what the unbroken one saw, and 16 windows in 4 micro-steps are the same as 64 in one. Called by `train`
and `sample`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bytekiln.config import DataConfig, RunConfig
from bytekiln.errors import ConfigError, FileError, FormatError, MismatchError
from bytekiln.tokenfile import TokenFile
from bytekiln.tokenizer import Tokenizer

FIRST_AND_LAST_BYTES = 1 << 20
"""How much of each end of a file is hashed."""


class TokenData:
    """One token file as a source of windows of `context_length` inputs and their targets, one token later."""

    def __init__(self, file: TokenFile, context_length: int) -> None:
        """Take a file that is long enough.

        Raises:
            FormatError: fewer tokens than one window and its last target.
        """
        if len(file) < context_length + 1:
            raise FormatError(
                f"{file.path}: found {len(file)} tokens; expected at least {context_length + 1}, "
                "a window of context_length and one target"
            )
        self.file, self.context_length = file, context_length

    def __len__(self) -> int:
        """Tokens in the file."""
        return len(self.file)

    def batch(self, starts_B: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """The windows that start at `starts_B`, as (inputs_BxT, targets_BxT) int64 on the CPU."""
        window = np.arange(self.context_length + 1)
        tokens = torch.from_numpy(self.file.array[starts_B[:, None] + window].astype(np.int64))
        return tokens[:, :-1], tokens[:, 1:]

    def random_starts(self, seed: int, step: int, count: int) -> NDArray[np.int64]:
        """Starts of the `count` windows of an optimizer step, drawn with replacement from every possible start.

        Philox is a counter-based generator (Salmon et al. 2011): step t reads its own stretch of the stream, and
        numpy keeps raw streams stable from version to version. The remainder's bias is below 1e-9.
        """
        raw = np.random.Philox(key=seed, counter=[0, 0, step, 0]).random_raw(count)
        return (raw % np.uint64(len(self.file) - self.context_length)).astype(np.int64)

    def spread_starts(self, count: int) -> NDArray[np.int64]:
        """Starts of at most `count` windows that do not overlap, spread evenly over the file, always the same."""
        fitting = (len(self.file) - 1) // self.context_length
        if count >= fitting:
            return np.arange(fitting, dtype=np.int64) * self.context_length
        last = len(self.file) - 1 - self.context_length
        return np.arange(count, dtype=np.int64) * last // max(count - 1, 1)

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes of text in a token, where the manifest knows."""
        return self.file.text_bytes / len(self.file) if self.file.text_bytes else None

    def fingerprint(self) -> str:
        """What a resumed run compares: the manifest's checksum, else a hash of length, type and both ends."""
        if self.file.manifest is not None and self.file.manifest.get("checksum"):
            return str(self.file.manifest["checksum"])
        return self.ends()

    def ends(self) -> str:
        """A hash of length, type and both ends of what the file really holds, whatever its manifest claims."""
        ends = hashlib.sha256(f"{len(self.file)} {np.dtype(self.file.dtype).name}".encode())
        count = FIRST_AND_LAST_BYTES // np.dtype(self.file.dtype).itemsize
        for part in (self.file.array[:count], self.file.array[-count:]):
            ends.update(np.ascontiguousarray(part).tobytes())
        return f"sha256-of-ends:{ends.hexdigest()}"


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a batch; on CUDA through pinned memory and without waiting for the copy."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def load_tokenizer(config: DataConfig) -> Tokenizer | None:
    """The tokenizer that the config names, if it names one.

    Raises:
        ConfigError: one of `vocab_path` and `merges_path` without the other.
        FileError, FormatError: as `Tokenizer.from_file`.
    """
    if config.tokenizer:
        return Tokenizer.from_file(config.tokenizer)
    if bool(config.vocab_path) != bool(config.merges_path):
        missing = "merges_path" if config.vocab_path else "vocab_path"
        raise ConfigError(f"{missing}: found nothing; expected a file, since the tokenizer's other half is given")
    if config.vocab_path:
        return Tokenizer.from_vocab_and_merges(config.vocab_path, config.merges_path)
    return None


def open_data(config: RunConfig, tokenizer: Tokenizer | None) -> tuple[TokenData, TokenData | None, int]:
    """Open and check everything that training reads, before anything is computed.

    Returns:
        Training data, validation data if given, and the vocabulary's size: of the config, else of the tokenizer,
        else of the training data's manifest.

    Raises:
        ConfigError: no training data is named, or nothing tells the vocabulary's size.
        FileError, FormatError: a file is missing, malformed, too short, or has an id outside the vocabulary.
        MismatchError: tokenizer, training and validation data do not belong together.
    """
    if not config.data.train_data:
        raise ConfigError("train_data: found nothing; expected a token file (--train-data FILE, made by bpe-encode)")
    files = [_open(p, config.data) for p in (config.data.train_data, config.data.val_data) if p]
    hashes: dict[str, str] = {str(f.path): f.tokenizer_hash for f in files if f.tokenizer_hash}
    if tokenizer is not None:
        hashes[config.data.tokenizer or config.data.vocab_path] = tokenizer.hash
    for where, found in hashes.items():
        other, expected = next(iter(hashes.items()))
        if found != expected:
            raise MismatchError(
                f"{where}: found tokenizer hash {_short(found)}; expected {_short(expected)}, that of {other}"
            )
    vocab_size = config.model.vocab_size or (tokenizer.n_vocab if tokenizer else 0) or files[0].vocab_size or 0
    if not vocab_size:
        raise ConfigError(
            f"vocab_size: unknown, {files[0].path} has no manifest; expected --tokenizer FILE or --vocab-size N"
        )
    if tokenizer is not None and tokenizer.n_vocab > vocab_size:
        raise MismatchError(
            f"vocab_size: found {vocab_size}; expected at least {tokenizer.n_vocab}, "
            f"the size of {config.data.tokenizer or config.data.vocab_path}"
        )
    for f in files:
        f.check(vocab_size)
    data = [TokenData(f, config.model.context_length) for f in files]
    return data[0], data[1] if len(data) > 1 else None, vocab_size


def _open(path: str, config: DataConfig) -> TokenFile:
    if not Path(path).exists():
        raise FileError(
            f"{path}: no such file; expected a token file, made by: "
            f"bpe-encode TEXT --tokenizer tokenizer.json --out {path}"
        )
    return TokenFile.open(path, dtype=config.data_dtype or None)


def _short(digest: str) -> str:
    kind, _, value = digest.rpartition(":")
    return f"{kind}:{value[:12]}…" if kind else digest[:16]
