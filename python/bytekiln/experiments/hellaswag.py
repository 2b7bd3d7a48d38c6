"""HellaSwag as the last stage of an experiment: a run answers, unless it has.

In: a run's folder and the questions. Out: a JSON file (the fields of `lm-score`, docs/formats.md), and
beside it what each question got, from which an interrupted evaluation goes on. Called by `exp9`.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from bytekiln.console import Progress, notice
from bytekiln.errors import MismatchError
from bytekiln.metrics import write_atomically
from bytekiln.prepare import find_device
from bytekiln.report.places import read_json
from bytekiln.score.runs import score_benchmark
from bytekiln.score.scorer import open_scorer
from bytekiln.score.tasks import read_questions
from bytekiln.sweep.folder import trouble

SEED = 0
"""Of the draw, where not all questions are asked."""


def answer(
    run: Path, out: Path, records: Path, *, model: str, questions: str, limit: int, device: str
) -> dict[str, Any]:
    """Answer the questions with a run's best checkpoint and write the result; what is done is read only.

    Args:
        run: the run's folder.
        out: the result; its folder is made where it is missing.
        records: what each question got.
        model: what the result calls the model.
        questions: the file; empty: the rows of the installed package.
        limit: so many questions, drawn; 0: all.
        device: as in a run's config.

    Raises:
        BytekilnError: no whole checkpoint, no tokenizer, a file that cannot be read or written.
    """
    try:
        out.parent.mkdir(exist_ok=True)
    except OSError as exc:
        raise trouble(out.parent, exc) from None
    scorer = open_scorer(str(run), device=find_device(device), notice=notice)
    asked = {"limit": limit, "seed": SEED}
    same = {
        "status": "completed",
        "model_checksum": scorer.checksum,
        "data_sha256": read_questions("hellaswag", questions, limit=1).sha256,
        **asked,
    }
    before = read_json(out)
    if isinstance(before, dict) and all(before.get(k) == v for k, v in same.items()):
        notice(f"{out}: done")
        return before
    began = time.perf_counter()
    with Progress(f"{model} hellaswag", unit="questions") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done)

        how: dict[str, Any] = {"records": records, "progress": progress, **asked}
        try:
            score = score_benchmark(scorer, "hellaswag", questions, resume=True, **how)
        except MismatchError:  # the records are of another checkpoint or another draw
            score = score_benchmark(scorer, "hellaswag", questions, overwrite=True, **how)
    took = round(time.perf_counter() - began, 3)
    for warning in score.result["warnings"]:
        notice(f"warning: {warning}")
    answers = {**score.result, "model_name": model, "evaluation_time_seconds": took, **asked}
    write_atomically(out, json.dumps(answers, indent=1, allow_nan=False).encode() + b"\n")
    return answers
