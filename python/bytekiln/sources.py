"""Where batches come from: windows of token files, by number for training, in a fixed list for evaluation.

In: ids of files, checked by `data`. Out: `Batch`es. A training batch is a pure function of (seed, step, number of the
step's first window, places in the step), so ranks, threads and micro-steps never change it. Called by the loop.

Targets: in stream windows the token behind each position, across the ends of documents as the file has it, with and
without a document mask; `packing` says what they are in packed and padded windows. Evaluation always reads stream
windows, so that losses compare whatever a model was trained on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bytekiln.batch import Batch
from bytekiln.config import RunConfig
from bytekiln.corruption import Corruption
from bytekiln.errors import FormatError
from bytekiln.loss import IGNORED
from bytekiln.packing import Pieces, Rows, packed_plan, padded_plan
from bytekiln.tokenfile import TokenFile
from bytekiln.windows import (
    Mixture,
    Numbers,
    key_of,
    random_starts,
    sequential_starts,
    shuffled,
    shuffled_starts,
    spread_starts,
)

FIRST_AND_LAST_BYTES = 1 << 20
"""How much of each end of a file is hashed."""
_BLOCK = 1024
"""Windows whose places are worked out together and kept: what it costs then is nothing beside reading them."""


class Stream:
    """Windows at any start of a file."""

    def __init__(self, tokens: NDArray[Any], context: int, *, shifted: bool, eot: int | None) -> None:
        """Take the ids; `shifted`: targets are one token later; `eot`: number the documents that it ends."""
        self.tokens, self.shifted, self.eot = tokens, shifted, eot
        self._window_NxT = np.lib.stride_tricks.sliding_window_view(tokens, context + shifted)

    def read(self, start_B: Numbers) -> Rows:
        """The windows that start there."""
        ids = self._window_NxT[start_B]
        inputs = (ids[:, :-1] if self.shifted else ids).astype(np.int64)
        targets = ids[:, 1:].astype(np.int64) if self.shifted else inputs
        if self.eot is None:
            return Rows(inputs, targets, None, None)
        ends = (inputs == self.eot).astype(np.int32)
        return Rows(inputs, targets, np.cumsum(ends, axis=1, dtype=np.int32) - ends, None)


class TrainSource:
    """Training windows by their numbers.

    Attributes:
        files: the token files, in the order of the config.
    """

    def __init__(
        self, files: Sequence[TokenFile], tokens: Sequence[NDArray[Any]], shares: Sequence[int] | None,
        config: RunConfig, eot: int | None, corruption: Corruption | None,
    ) -> None:  # fmt: skip
        """Take the files and the part of their ids that is trained on; plans packed and padded windows.

        Args:
            files: the token files.
            tokens: of each, the ids that are read.
            shares: of the windows, a whole number for each file; None: by the number of its windows.
            config: of the run.
            eot: the id that ends documents, where anything asks for it.
            corruption: of the inputs.

        Raises:
            FormatError: documents in which nothing can be predicted.
        """
        d, context = config.data, config.model.context_length
        self.files, self._corruption = list(files), corruption
        self._seed, self._context, self._sampling = config.training.seed, context, d.sampling
        mlm = config.training.objective == "mlm"
        self._documents, self._hide_padding = d.document_mask, mlm and d.windows != "stream"
        self._readers: list[Stream | Pieces] = []
        for file, ids in zip(files, tokens, strict=True):
            if d.windows == "stream":
                self._readers.append(Stream(ids, context, shifted=not mlm, eot=eot if d.document_mask else None))
                continue
            assert eot is not None
            padded = d.windows == "padded"
            plan = padded_plan(ids, eot, context, shifted=not mlm) if padded else packed_plan(ids, eot, context)
            if not plan.windows:
                raise FormatError(f"{file.path}: found empty documents only; expected tokens to predict")
            self._readers.append(Pieces(ids, plan, context, fill=eot, dynamic=padded))
        self._sizes = [
            r.plan.windows if isinstance(r, Pieces) else (len(r.tokens) - 1) // context for r in self._readers
        ]
        self._starts = np.array([len(ids) - context for ids in tokens], np.int64)
        self.mixture = Mixture(self._sizes if shares is None else shares)
        self._blocks: dict[int, tuple[Numbers, Numbers]] = {}

    @property
    def windows_per_epoch(self) -> int:
        """Windows of all files, each once."""
        return sum(self._sizes)

    def batch(self, step: int, first: int, place: int, count: int) -> Batch:
        """Windows place … place+count-1 of a step.

        Args:
            step: the optimizer step; only `random` uses it.
            first: number in the run of the step's first window.
            place: place in the step of the first window wanted.
            count: windows wanted, at least one.
        """
        number_B = np.arange(first + place, first + place + count)
        if self._sampling == "random":
            file_B = self.mixture.split(number_B)[0]
            place_B = random_starts(self._seed, step, place, count, self._starts[file_B])
        else:
            file_B, place_B = self._places(first + place, count)
        if len(self.files) == 1:
            rows = self._readers[0].read(place_B)
        else:
            rows = _joined(
                [(f, r.read(place_B[file_B == f])) for f, r in enumerate(self._readers) if f in file_B], file_B
            )
        if not self._documents:
            rows = rows._replace(documents_BxT=_padding(rows) if self._hide_padding else None)
        return _batch(rows, number_B, self._corruption)

    def _places(self, begin: int, count: int) -> tuple[Numbers, Numbers]:
        """File, and place in it, of windows begin … begin+count-1."""
        first, last = begin // _BLOCK, (begin + count - 1) // _BLOCK
        if first == last:
            file_N, place_N = self._block(first)
        else:
            parts = [self._block(block) for block in range(first, last + 1)]
            file_N, place_N = (np.concatenate(half) for half in zip(*parts, strict=True))
        offset = begin - first * _BLOCK
        return file_N[offset : offset + count], place_N[offset : offset + count]

    def _block(self, block: int) -> tuple[Numbers, Numbers]:
        found = self._blocks.get(block)
        if found is None:
            file_N, index_N = self.mixture.split(np.arange(block * _BLOCK, (block + 1) * _BLOCK))
            place_N = np.empty_like(index_N)
            for file in np.unique(file_N).tolist():
                chosen = file_N == file
                place_N[chosen] = self._order(file, index_N[chosen])
            found = file_N, place_N
            # Two threads may both come here; the answer is the same, and a dict's own operations are atomic.
            self._blocks = {**dict(list(self._blocks.items())[-7:]), block: found}
        return found

    def _order(self, file: int, index_N: Numbers) -> Numbers:
        key, size, reader = key_of(self._seed, file), self._sizes[file], self._readers[file]
        if isinstance(reader, Pieces):
            return index_N % size if self._sampling == "sequential" else shuffled(index_N, size, key)
        if self._sampling == "sequential":
            return sequential_starts(index_N, len(reader.tokens), self._context)
        return shuffled_starts(index_N, len(reader.tokens), self._context, key)

    def fingerprint(self) -> str:
        """What a resumed run compares: the manifests' checksums, else hashes of length, type and both ends."""
        return _together([_fingerprint(f) for f in self.files])

    def ends(self) -> str:
        """A hash of length, type and both ends of what the files really hold, whatever their manifests claim."""
        return _together([_ends(f) for f in self.files])


class EvalSource:
    """Windows to evaluate on, always the same: stream windows, with documents and masks as the run has them.

    Attributes:
        files: the token files.
    """

    def __init__(
        self, files: Sequence[TokenFile], tokens: Sequence[NDArray[Any]], mixture: Mixture, config: RunConfig,
        eot: int | None, corruption: Corruption | None,
    ) -> None:  # fmt: skip
        """Take the files, the part of their ids that is read, and how windows are shared out among them."""
        self.files, self._tokens, self._mixture, self._corruption = list(files), list(tokens), mixture, corruption
        self._context, self._shifted = config.eval_context, config.training.objective != "mlm"
        eot = eot if config.data.document_mask else None
        self._readers = [Stream(ids, self._context, shifted=self._shifted, eot=eot) for ids in tokens]

    def fingerprint(self) -> str:
        """What a resumed run compares, as `TrainSource` has it."""
        return _together([_fingerprint(f) for f in self.files])

    def batches(self, batch_size: int, num_batches: int) -> Iterator[Batch]:
        """The batches of an evaluation; the last may have fewer windows.

        Args:
            batch_size: windows in a batch.
            num_batches: as many windows that do not overlap, spread evenly over the data (a shorter file: all that
                fit). 0: the whole data, every target exactly once; a file's last window then overlaps with the one
                before it, where its targets are ignored, so that all windows are equally long.
        """
        file_W, start_W, seen_W = self._windows(batch_size * num_batches)
        for at in range(0, len(start_W), batch_size):
            file_B, start_B, seen_B = (x[at : at + batch_size] for x in (file_W, start_W, seen_W))
            parts = [(f, r.read(start_B[file_B == f])) for f, r in enumerate(self._readers) if f in file_B]
            rows = parts[0][1] if len(self.files) == 1 else _joined(parts, file_B)
            yield _batch(rows, start_B + (file_B << 48), self._corruption, seen_B)

    def windows(self, batch_size: int, num_batches: int) -> int:
        """Windows that `batches` gives."""
        return len(self._windows(batch_size * num_batches)[0])

    def _windows(self, count: int) -> tuple[Numbers, Numbers, Numbers]:
        """File, start and number of leading positions that count elsewhere, of each window; count 0: of all."""
        file, start, seen = [], [], []
        for f, ids in enumerate(self._tokens):
            if count:
                start_N = spread_starts(self._mixture.counts(count)[f], len(ids), self._context)
                seen_N = np.zeros_like(start_N)
            else:
                positions = len(ids) - self._shifted
                even_N = np.arange(0, positions, self._context)
                start_N = np.minimum(even_N, positions - self._context)
                seen_N = even_N - start_N
            file.append(np.full(len(start_N), f))
            start.append(start_N)
            seen.append(seen_N)
        return np.concatenate(file), np.concatenate(start), np.concatenate(seen)

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes of text in a token, where the manifests know."""
        known = [f.text_bytes for f in self.files if f.text_bytes]
        return sum(known) / sum(map(len, self.files)) if len(known) == len(self.files) else None


def _joined(parts: Sequence[tuple[int, Rows]], file_B: Numbers) -> Rows:
    """Windows of several files in one batch, as wide as the widest; what is added to a row is padding."""
    width = max(rows.inputs_BxT.shape[1] for _, rows in parts)
    shape = (len(file_B), width)
    inputs, targets = np.zeros(shape, np.int64), np.full(shape, IGNORED, np.int64)
    documents = None if parts[0][1].documents_BxT is None else np.zeros(shape, np.int32)
    lengths = None if parts[0][1].lengths_B is None else np.zeros(len(file_B), np.int64)
    for file, rows in parts:
        chosen, own = file_B == file, rows.inputs_BxT.shape[1]
        inputs[chosen, :own], targets[chosen, :own] = rows.inputs_BxT, rows.targets_BxT
        if documents is not None and rows.documents_BxT is not None:
            last_B = rows.documents_BxT[:, -1:]
            if own < width and rows.lengths_B is not None:
                last_B = last_B + (rows.lengths_B == own)[:, None]
            documents[chosen] = np.concatenate([rows.documents_BxT, np.repeat(last_B, width - own, axis=1)], axis=1)
        if lengths is not None and rows.lengths_B is not None:
            lengths[chosen] = rows.lengths_B
    return Rows(inputs, targets, documents, lengths)


def _padding(rows: Rows) -> NDArray[np.int32] | None:
    """0 for tokens and 1 for padding: what attention from both sides needs where it may cross documents."""
    assert rows.lengths_B is not None
    return (np.arange(rows.inputs_BxT.shape[1]) >= rows.lengths_B[:, None]).astype(np.int32)


def _batch(rows: Rows, number_B: Numbers, corruption: Corruption | None, seen_B: Numbers | None = None) -> Batch:
    """Rows as tensors, corrupted by the rule; the first `seen_B` targets of each window are ignored."""
    inputs, targets, documents_BxT, lengths_B = rows
    if corruption is not None:
        inputs, targets = corruption.apply(inputs, targets, number_B, lengths_B)
    if seen_B is not None and seen_B.any():
        targets = np.where(np.arange(targets.shape[1]) < seen_B[:, None], IGNORED, targets)
    return Batch(
        torch.from_numpy(inputs),
        torch.from_numpy(targets),
        None if documents_BxT is None else torch.from_numpy(documents_BxT),
        int(np.count_nonzero(targets != IGNORED)),
    )


def _fingerprint(file: TokenFile) -> str:
    checksum = file.manifest.get("checksum") if file.manifest is not None else None
    return str(checksum) if checksum else _ends(file)


def _ends(file: TokenFile) -> str:
    ends = hashlib.sha256(f"{len(file)} {np.dtype(file.dtype).name}".encode())
    count = FIRST_AND_LAST_BYTES // np.dtype(file.dtype).itemsize
    for part in (file.array[:count], file.array[-count:]):
        ends.update(np.ascontiguousarray(part).tobytes())
    return f"sha256-of-ends:{ends.hexdigest()}"


def _together(hashes: Sequence[str]) -> str:
    """One file's own hash, or one over those of several."""
    if len(hashes) == 1:
        return hashes[0]
    return f"sha256-of-{len(hashes)}-files:{hashlib.sha256(chr(10).join(hashes).encode()).hexdigest()}"
