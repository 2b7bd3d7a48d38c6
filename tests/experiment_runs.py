"""Experiments for the tests: real but very small runs, trained in the tests' own process, and their text."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Mapping
from pathlib import Path

from bytekiln import cli
from bytekiln.config import load_config
from bytekiln.train import train
from score_models import WORDS, rows, tokenizer, write_rows
from sweep_driver import write_result

FLAGS = (
    "--d-model 16 --num-layers 1 --num-heads 2 --d-ff 16 --num-experts 4 --context-length 24 --batch-size 2 "
    "--grad-accum-steps 2 --max-steps 6 --eval-interval 2 --num-eval-batches 1 --checkpoint-interval 2 "
    "--sample-tokens 0 --max-tokens 900 --num-documents 20 --precision fp32 --device cpu --no-compile"
).split()
DATA = ("--train-data", "train.npy", "--val-data", "val.npy", "--tokenizer", "tokenizer.json")


def write_data(folder: Path) -> None:
    """Tokenizer, token files and questions; what is said on the way is the commands' own."""
    (folder / "tokenizer.json").write_text(tokenizer().to_json(), "utf-8")
    for name, seed in (("train", 0), ("val", 1)):
        draw = random.Random(seed)
        text = "".join(" ".join(draw.choices(WORDS, k=20)) + "<|endoftext|>" for _ in range(40))
        (folder / f"{name}.txt").write_text(text, "utf-8")
        argv = [f"{name}.txt", "--tokenizer", "tokenizer.json", "--out", f"{name}.npy"]
        assert cli.run("bpe-encode", argv) == 0
    write_rows(folder / "h.jsonl", rows(12, seed=1))


class Ended:
    """A run that has ended when it begins."""

    def __init__(self, code: int) -> None:
        self.code = code

    def poll(self) -> int:
        return self.code

    def send(self, number: int) -> None:
        pass

    def kill(self) -> None:
        pass


class Trains:
    """Starts runs by training them here and now, and remembers which.

    Args:
        codes: exit status by the run's name, without training: 0 ends badly trained, 1 fails, 3 diverges at the very
            best loss.
        stop: name of a run that is stopped behind its second step by Ctrl-C, as the whole sweep is.
    """

    def __init__(self, codes: Mapping[str, int] | None = None, stop: str = "") -> None:
        self.codes, self.stop, self.started = codes or {}, stop, list[str]()

    def __call__(self, folder: Path, threads: int) -> Ended:
        self.started.append(folder.name)
        code = self.codes.get(folder.name)
        if code is not None:
            (folder / "log.txt").write_text("error: oh dear\n")
            (folder / "config.toml").write_bytes((folder / "trial.toml").read_bytes())
            if code == 0:
                write_result(folder, best_val_loss=10.0, final_val_loss=10.0)
            elif code == 3:
                write_result(folder, "diverged", best_val_loss=0.001, final_val_loss=None)
            return Ended(code)
        config = load_config(folder / "trial.toml")
        config = config.with_(out_dir=str(folder))
        if folder.name == self.stop:
            train(config, resume="auto", pause_at=2)
            os.kill(os.getpid(), signal.SIGINT)
            return Ended(130)
        return Ended(3 if train(config, resume="auto").status == "diverged" else 0)
