"""Whether what is scored was trained on, as far as the training files are there to look in.

In: a scorer, whose run names its training data, and ids. Out: sentences. Called by `score.runs`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bytekiln import _core
from bytekiln.data import train_paths
from bytekiln.errors import BytekilnError
from bytekiln.overlap import LENGTH, overlap
from bytekiln.score.scorer import Scorer
from bytekiln.tokenfile import TokenFile


def overlap_with_training(scorer: Scorer, ids: NDArray[Any], path: str, what: str) -> list[str]:
    """Sentences about text that the model was trained on.

    Args:
        scorer: the model.
        ids: what is scored; `overlap` samples windows of 64 tokens of it.
        path: the file that it came from.
        what: "windows" of a text, or "questions", of which every 64 tokens are one.
    """
    if scorer.config is None or not scorer.config.data.train_data:
        return []
    warnings, training = [], []
    for name in train_paths(scorer.config.data.train_data):
        try:
            file = TokenFile.open(name, dtype=scorer.config.data.data_dtype or None)
        except BytekilnError:
            warnings.append(f"{name}: the training data is not there; whether {path} overlaps with it is unknown")
            continue
        if what == "windows" and (said := _same_source(file, path)):
            return [*warnings, said]
        training.append(file.array.view(np.ndarray))
    found = overlap(training, ids) if training else None
    if found is not None and found.found:
        warnings.append(
            f"{path}: {found.found} of {found.sampled} sampled {what} occur in the training data, "
            f"{LENGTH} tokens alike; the score tells of memory too"
        )
    return warnings


def _same_source(training: TokenFile, path: str) -> str | None:
    """A sentence where a file is the training data, or a text that went into it."""
    if training.path.resolve() == Path(path).resolve():
        return f"{path}: is the training data; the score tells of memory only"
    manifest = training.manifest or {}
    sums = {manifest.get("checksum"), *(s.get("checksum") for s in manifest.get("sources") or [])} - {None}
    try:
        offset = TokenFile.open(path).offset if Path(f"{path}.json").is_file() else 0
        own = _core.payload_checksum(path, offset)
    except BytekilnError:
        return None
    if own in sums or "sha256:" + hashlib.sha256(Path(path).read_bytes()).hexdigest() in sums:
        return f"{path}: went into the training data {training.path}; the score tells of memory only"
    return None
