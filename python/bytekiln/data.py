"""Opening the data of a run. In: the paths that a config names. Out: `Data`, what training and evaluation read.

Everything is checked before anything is computed; the batches themselves come from `sources`. Called by `train`,
`evaluate` and `sample`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bytekiln.batch import Batch, to_device
from bytekiln.characters import AnyTokenizer, load_any
from bytekiln.config import DataConfig, RunConfig
from bytekiln.corruption import Corruption
from bytekiln.errors import ConfigError, FileError, FormatError, MismatchError
from bytekiln.overlap import LENGTH, overlap
from bytekiln.packing import document_ends
from bytekiln.prefetch import Prefetcher
from bytekiln.sources import EvalSource, TrainSource
from bytekiln.tokenfile import TokenFile, shards_of
from bytekiln.tokenizer import Tokenizer
from bytekiln.windows import Mixture, key_of, whole_shares

__all__ = [
    "AnyTokenizer",
    "Batch",
    "Data",
    "EvalSource",
    "Prefetcher",
    "TrainSource",
    "load_tokenizer",
    "open_data",
    "to_device",
    "train_paths",
    "vocabulary_of",
]

MASK_TOKENS = ("<mask>", "[MASK]", "<|mask|>")
"""Special tokens of a tokenizer that are its mask token."""


class Data(NamedTuple):
    """All that a run reads."""

    train: TrainSource
    val: EvalSource | None
    train_eval: EvalSource
    vocab_size: int
    """Tokens of the model's vocabulary, an added mask token included."""
    mask_id: int | None
    tokenizer_hash: str | None
    """Hash of the tokenizer that made the data, where a manifest or a given tokenizer tells."""
    notices: list[str]


def load_tokenizer(config: DataConfig) -> AnyTokenizer | None:
    """The tokenizer that the config names, if it names one.

    Raises:
        ConfigError: one of `vocab_path` and `merges_path` without the other.
        FileError, FormatError: as `Tokenizer.from_file`.
    """
    if config.tokenizer:
        return load_any(config.tokenizer)
    if bool(config.vocab_path) != bool(config.merges_path):
        missing = "merges_path" if config.vocab_path else "vocab_path"
        raise ConfigError(f"{missing}: found nothing; expected a file, since the tokenizer's other half is given")
    if config.vocab_path:
        return Tokenizer.from_vocab_and_merges(config.vocab_path, config.merges_path)
    return None


def open_data(config: RunConfig, tokenizer: AnyTokenizer | None) -> Data:
    """Open and check everything that training reads, before anything is computed.

    The vocabulary's size is the config's, else the tokenizer's, else that of the data's first manifest.

    Raises:
        ConfigError: no training data is named, nothing tells the vocabulary's size or where documents end.
        FileError, FormatError: a file is missing, malformed, too short, or has an id outside the vocabulary.
        MismatchError: tokenizer, training and validation data do not belong together.
    """
    d, context, mlm = config.data, config.model.context_length, config.training.objective == "mlm"
    if not d.train_data:
        raise ConfigError("train_data: found nothing; expected a token file (--train-data FILE, made by bpe-encode)")
    training = [_open(path, d) for path in train_paths(d.train_data)]
    validation = _open_validation(d) if d.val_data else None
    files = [*training, *([validation] if validation else [])]
    notices = [f.notice for f in files if f.notice]
    tokenizer_hash = _one_tokenizer(files, tokenizer, d)
    known, vocab_size, mask_id = vocabulary_of(config, tokenizer, files, notices)
    for f in files:
        f.check(known)
    eot = tokenizer.eot_id if tokenizer is not None else None
    eot = next((f.eot_id for f in files if f.eot_id is not None), None) if eot is None else eot
    if eot is None and (d.windows != "stream" or d.document_mask or d.num_documents):
        field = "windows" if d.windows != "stream" else "document_mask" if d.document_mask else "num_documents"
        raise ConfigError(
            f"{field}: found {getattr(d, field)}, but nothing names the id that ends documents; "
            "expected a tokenizer with an end-of-text token, or eot_id in a manifest"
        )
    shares = whole_shares(d.data_weights, len(training)) if d.data_weights else None
    tokens = _limited(training, d, eot, notices)
    kept = _not_cut_short(training, tokens, context, notices)
    training, tokens = [training[i] for i in kept], [tokens[i] for i in kept]
    shares = [shares[i] for i in kept] if shares is not None else None
    files = [*training, *([validation] if validation else [])]
    least, field = max((context, "context_length"), (config.eval_context, "eval_context_length"), key=lambda x: x[0])
    for f, ids in zip(files, [*tokens, *([validation.array] if validation else [])], strict=True):
        if f is validation:
            least, field = config.eval_context, "context_length" if config.eval_context == context else field
        if len(ids) < least + 1:
            rest = "" if len(ids) == len(f) else " left by max_tokens or num_documents"
            raise FormatError(
                f"{f.path}: found {len(ids)} tokens{rest}; expected at least {least + 1}, "
                f"a window of {field} and one target"
            )
    corruption = masks = None
    if mask_id is not None:
        special = set(tokenizer.special_tokens.values()) if tokenizer is not None else set[int]()
        special |= {eot} if eot is not None else set()
        if known - len(special | {mask_id}) < 1:
            raise ConfigError(f"vocab_size: found {known} tokens, all of them special; expected one to replace")
        share = config.training.mlm_share if mlm else d.token_corruption
        corruption = Corruption(share, mask_id, known, special, predict=mlm, key=key_of(config.training.seed, -1))
        masks = Corruption(share, mask_id, known, special, predict=True, key=key_of(-1)) if mlm else None
    train = TrainSource(training, tokens, shares, config, eot, corruption)
    train_eval = EvalSource(training, tokens, train.mixture, config, eot, masks)
    val = None
    if validation is not None:
        ids = _plain(validation.array)
        val = EvalSource([validation], [ids], Mixture([1]), config, eot, masks)
        notices += _overlaps(training, tokens, validation, ids)
    return Data(train, val, train_eval, vocab_size, mask_id, tokenizer_hash, notices)


def train_paths(text: str) -> list[str]:
    """The files that `train_data` names: one that exists under the whole text, else parts between commas.

    A part that is no file may be what `bpe-encode --shard-tokens` was told to write: its shards.
    """
    if os.path.exists(text):  # noqa: PTH110 - Path.exists raises where a list of many files is no possible name
        return [text]
    parts = [part.strip() for part in text.split(",") if part.strip()] or [text]
    return [file for part in parts for file in shards_of(part) or [part]]


def _open(path: str, config: DataConfig) -> TokenFile:
    if not Path(path).exists():
        raise FileError(
            f"{path}: no such file; expected a token file, made by: "
            f"bpe-encode TEXT --tokenizer tokenizer.json --out {path}"
        )
    return TokenFile.open(path, dtype=config.data_dtype or None)


def _open_validation(config: DataConfig) -> TokenFile:
    """The one file of validation data; of shards, one that is alone."""
    files = [config.val_data] if Path(config.val_data).exists() else shards_of(config.val_data) or [config.val_data]
    if len(files) > 1:
        raise ConfigError(
            f"val_data: found {len(files)} shards of {config.val_data}; expected one file, as bpe-encode writes it "
            "without --shard-tokens"
        )
    return _open(files[0], config)


def _one_tokenizer(files: Sequence[TokenFile], tokenizer: AnyTokenizer | None, config: DataConfig) -> str | None:
    """The hash of the tokenizer that everything was made with, as far as anything tells."""
    hashes: dict[str, str] = {str(f.path): f.tokenizer_hash for f in files if f.tokenizer_hash}
    if tokenizer is not None:
        hashes[config.tokenizer or config.vocab_path or "the run's tokenizer"] = tokenizer.hash
    for where, found in hashes.items():
        other, expected = next(iter(hashes.items()))
        if found != expected:
            raise MismatchError(
                f"{where}: found tokenizer hash {_short(found)}; expected {_short(expected)}, that of {other}"
            )
    return next(iter(hashes.values()), None)


def vocabulary_of(
    config: RunConfig, tokenizer: AnyTokenizer | None, files: Sequence[TokenFile], notices: list[str]
) -> tuple[int, int, int | None]:
    """(ids that the data may have, size of the model's vocabulary, id of the mask token where one is needed).

    The mask is the tokenizer's own, else the first id behind what the tokenizer, the manifest or, without either, the
    files use; the vocabulary grows by one where the config leaves no room. So a resumed run, whose config has the size
    that was settled, finds the same id.
    """
    stated = config.model.vocab_size
    told = next((f for f in files if f.vocab_size), None)
    known = tokenizer.n_vocab if tokenizer is not None else (told and told.vocab_size) or 0
    source = config.data.tokenizer or config.data.vocab_path or "the tokenizer" if tokenizer is not None else ""
    size = stated or known
    if not size:
        why = "has no manifest" if files[0].manifest is None else "has a manifest that does not name it"
        raise ConfigError(f"vocab_size: unknown, {files[0].path} {why}; expected --tokenizer FILE or --vocab-size N")
    if tokenizer is not None and known > size:
        raise MismatchError(f"vocab_size: found {size}; expected at least {known}, the size of {source}")
    if config.training.objective != "mlm" and not config.data.token_corruption:
        return size, size, None
    if tokenizer is not None:
        for name in MASK_TOKENS:
            if (id := tokenizer.special_tokens.get(name)) is not None:
                return known, size, id
    if known > size:
        raise ConfigError(
            f"vocab_size: found {size}; expected at least {known}, as the manifest of {told and told.path} has it, "
            "since a mask token comes behind"
        )
    known = known or min(size, max(f.max_id for f in files) + 1)
    size = max(size, known + 1)
    notices.append(f"mask token: id {known}, added behind the {known} tokens of the data; the model has {size}")
    return known, size, known


def _limited(files: Sequence[TokenFile], config: DataConfig, eot: int | None, notices: list[str]) -> list[NDArray[Any]]:
    """The ids of each file that `max_tokens` and `num_documents` leave, counted over the files in their order."""
    tokens, left, documents = [], config.max_tokens, config.num_documents
    for f in files:
        ids = _plain(f.array)
        if config.max_tokens:
            ids = ids[:left]
            left -= len(ids)
        if config.num_documents and eot is not None:
            ends = document_ends(ids, eot, enough=documents)[:documents] if documents and len(ids) else np.zeros(0, int)
            documents -= len(ends)
            ids = ids[: int(ends.max(initial=0))]
        tokens.append(ids)
    for name, missing in (("max_tokens", left), ("num_documents", documents)):
        if missing:
            asked = getattr(config, name)
            limit = " within max_tokens" if name == "num_documents" and config.max_tokens else ""
            notices.append(f"{name}: found {asked - missing:,} in the training data{limit}; {asked:,} were asked for")
    return tokens


def _not_cut_short(
    files: Sequence[TokenFile], tokens: Sequence[NDArray[Any]], context: int, notices: list[str]
) -> list[int]:
    """Which files are read: not those of which `max_tokens` or `num_documents` leave less than a window.

    All of them where nothing would be left, or where a file is too short by itself: then it is refused by name. The
    last one of several shards is what was left, and may be as short as that.
    """
    last = [bool((f.manifest or {}).get("shard", {}).get("number")) for f in files]
    enough = [
        len(ids) > context or (len(ids) == len(f) and not of_many)
        for f, ids, of_many in zip(files, tokens, last, strict=True)
    ]
    if not any(enough):
        return list(range(len(files)))
    for f, ids, is_read in zip(files, tokens, enough, strict=True):
        if not is_read and len(ids) == len(f):
            notices.append(f"{f.path}: not read, a shard of {len(ids):,} tokens, less than a window and one more")
        elif not is_read:
            notices.append(f"{f.path}: not read, max_tokens or num_documents leave {len(ids):,} tokens of it")
    return [i for i, is_read in enumerate(enough) if is_read]


def _overlaps(
    training: Sequence[TokenFile], tokens: Sequence[NDArray[Any]], validation: TokenFile, ids: NDArray[Any]
) -> list[str]:
    """What training and validation data have in common, in a sentence, where they have anything."""
    val = validation.path
    for f, used in zip(training, tokens, strict=True):
        checksums = [(x.manifest or {}).get("checksum") for x in (f, validation)]
        if f.path.resolve() == val.resolve() or (checksums[0] and checksums[0] == checksums[1]):
            share = len(used) / len(f)
            return [
                f"{val}: the same as {f.path}, {_percent(share)} of it training data; its loss tells of memory only"
            ]
        ours, theirs = [(x.manifest or {}).get("sources") or [] for x in (f, validation)]
        seen = {s.get("checksum") for s in ours} - {None}
        if common := [s for s in theirs if s.get("checksum") in seen]:
            names = ", ".join(str(s.get("name")) for s in common)
            share = sum(int(s.get("bytes") or 0) for s in common) / max(
                1, sum(int(s.get("bytes") or 0) for s in theirs)
            )
            return [
                f"{val}: {_percent(share)} of its text ({names}) went into {f.path} too; "
                "expected other text to validate on"
            ]
    found, sampled, scanned = overlap(tokens, ids)
    if not found:
        return []
    part = "" if scanned > 0.999 else f" ({_percent(scanned)} of it was read)"
    return [
        f"{val}: {found} of {sampled} sampled windows of {LENGTH} tokens ({_percent(found / sampled)}) occur in the "
        f"training data{part}; expected other text to validate on"
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.01 else f"{100 * share:.0f} %"


def _plain(array: NDArray[Any]) -> NDArray[Any]:
    """The same memory without `np.memmap`'s own class, which makes every index slower by some microseconds."""
    return array.view(np.ndarray)


def _short(digest: str) -> str:
    kind, _, value = digest.rpartition(":")
    return f"{kind}:{value[:12]}…" if kind else digest[:16]
