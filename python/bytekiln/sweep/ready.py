"""Whether the runs of a sweep have what they need, before the first one begins.

In: trials. Out: nothing, or an error that says what is missing and what makes it. Called by `cli_sweep`, searches and
pipelines; imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bytekiln.errors import ConfigError, FileError
from bytekiln.known import KNOWN
from bytekiln.sweep.spec import Trial
from bytekiln.tokenfile import shards_of


def checked_data(trials: Sequence[Trial], dataset: str = "") -> None:
    """Every run has data that is there, before the first one starts.

    Raises:
        ConfigError: a run names none.
        FileError: a file is missing or empty; says what makes it, where a dataset's name stands for it.
    """
    seen: set[str] = set()
    for trial in trials:
        d = trial.config.data
        if not d.train_data:
            raise ConfigError(f"run {trial.name}: train_data: found none; expected --train-data FILE")
        for text in (*d.train_data.split(","), d.val_data, d.tokenizer):
            path = Path(text)
            if text and text not in seen and path.is_file() and not path.stat().st_size:
                raise FileError(f"{path}: empty file; expected the data of the sweep")
            named = text in KNOWN if text == d.tokenizer else bool(shards_of(text))
            if text and text not in seen and not path.exists() and not named:
                of = dataset if dataset and path.name.startswith(f"{dataset}_") else ""
                if path.parts[-3:-1] == ("data", "processed"):  # of a dataset that one variant names
                    of = of or path.stem.rpartition("_")[0]
                how = f"make it with: bpe-train --dataset {of} && bpe-encode --dataset {of}"
                if of.endswith("-char"):
                    how = f"make it with: bpe-encode TEXT --characters --dataset {of}"
                raise FileError(f"{path}: no such file; {how if of else 'expected the data of the sweep'}")
            seen.add(text)
