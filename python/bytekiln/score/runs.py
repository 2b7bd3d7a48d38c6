"""Whole evaluations: a text or a benchmark, from a file to a result that JSON can hold.

In: scorers and files. Out: `Score`: the fields of a result file (docs/formats.md), and what a paired test needs. Called
by `cli_score` and by pipelines.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bytekiln.errors import BytekilnError, ConfigError, FormatError, MismatchError
from bytekiln.overlap import LENGTH, SAMPLES
from bytekiln.score.choices import Request, encode_pair, is_truncated, jobs_of, likelihoods_of
from bytekiln.score.overlap import overlap_with_training
from bytekiln.score.paired import accuracy_interval, compare_answers, compare_losses, standard_error
from bytekiln.score.records import Records
from bytekiln.score.scorer import Scorer
from bytekiln.score.shared_prefix import SharedPrefixReader
from bytekiln.score.tasks import Questions, read_questions
from bytekiln.score.text import (
    Stream,
    TextScore,
    WindowScore,
    batched,
    implausible,
    open_stream,
    score_windows,
    total,
    windows,
)

FORMAT, VERSION = "bytekiln-score", 1
Progress = Callable[[int, int], object]
"""Told what is done, and of how much."""


@dataclass(frozen=True)
class Score:
    """One model on one text or benchmark."""

    result: dict[str, Any]
    right: dict[str, list[bool]] | None = None
    """Of a benchmark: by measure, whether each question was answered right."""
    text: TextScore | None = None
    stream: Stream | None = None
    rows: tuple[int, ...] = ()
    """Numbers of the questions or windows that were scored."""


# --- benchmarks ----------------------------------------------------------------------------------------------------


def score_benchmark(
    scorer: Scorer,
    name: str,
    path: str,
    *,
    limit: int = 0,
    seed: int = 0,
    records: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = lambda *_: None,
) -> Score:
    """Answer the questions of a benchmark.

    Args:
        scorer: the model.
        name: key of `tasks.TASKS`.
        path: the file; "" for HellaSwag from the installed package.
        limit: as many questions, drawn at random; 0: all.
        seed: of the draw.
        records: file of JSON lines that keeps what each question got.
        resume: take `records` up.
        overwrite: start `records` anew.
        progress: told the questions done and in all.

    Raises:
        FileError, FormatError, ConfigError, TextError: as `read_questions` and `encode_pair`; the row is named.
        OutputExistsError, MismatchError: as `Records`.
    """
    questions = read_questions(name, path, limit=limit, seed=seed)
    requests = _requests(scorer, questions)
    about = {
        "benchmark": name,
        "data": f"sha256:{questions.sha256}",
        "limit": limit,
        "seed": seed,
        **scorer.settings(),
    }
    got: dict[int, dict[str, Any]] = {}
    with Records(records, about, "question", resume=resume, overwrite=overwrite) as kept:
        by_row = {q.row: i for i, q in enumerate(questions.rows)}
        got.update({by_row[row]: record for row, record in kept.found.items() if row in by_row})
        progress(len(got), len(requests))
        reader = SharedPrefixReader(scorer.model)
        # A batch is done over as a whole, so that every number is that of a run without interruption.
        for job in jobs_of(scorer, requests):
            if all(i in got for i in job):
                continue
            new = {}
            for i, answers in likelihoods_of(scorer, reader, requests, job).items():
                new[i] = _record(questions, i, [a.loglikelihood for a in answers], [a.greedy for a in answers])
            kept.add(record for i, record in new.items() if i not in got)
            got.update(new)
            progress(len(got), len(requests))
    ordered = [got[i] for i in range(len(requests))]
    return Score(
        _benchmark_result(scorer, questions, requests, ordered),
        {
            measure: [bool(r[key]) for r in ordered]
            for measure, key in (("acc", "correct"), ("acc_norm", "correct_norm"))
            if measure == "acc" or questions.task.normed
        },
        rows=tuple(q.row for q in questions.rows),
    )


def _requests(scorer: Scorer, questions: Questions) -> list[list[Request]]:
    if scorer.tokenizer is None:
        raise ConfigError(f"{scorer.name}: found no tokenizer.json in the run; expected --tokenizer FILE")
    requests = []
    for q in questions.rows:
        try:
            requests.append([encode_pair(scorer.tokenizer, *pair) for pair in q.pairs])
        except BytekilnError as exc:
            raise FormatError(f"{q.where}: {exc}") from None
    return requests


def _record(questions: Questions, i: int, found: list[float], greedy: list[bool]) -> dict[str, Any]:
    """What one question got; the first of equals is the answer, as numpy's argmax has it."""
    q, task = questions.rows[i], questions.task
    normed = [x / n for x, n in zip(found, q.lengths, strict=True)]
    answer, answer_norm = (max(range(len(x)), key=x.__getitem__) for x in (found, normed))
    return {
        "question": q.row,
        "loglikelihoods": found,
        "gold": q.gold,
        "answer": answer,
        "answer_norm": answer_norm,
        "correct": greedy[0] if task.greedy else answer == q.gold,
        "correct_norm": greedy[0] if task.greedy else answer_norm == q.gold,
    }


def _benchmark_result(
    scorer: Scorer, questions: Questions, requests: list[list[Request]], got: list[dict[str, Any]]
) -> dict[str, Any]:
    n, task = len(got), questions.task
    right, normed = (sum(bool(r[key]) for r in got) for key in ("correct", "correct_norm"))
    length = scorer.context_length
    perplexity = None
    if task.greedy:  # the harness's: e to the mean of -ln p of the whole word
        mean = -math.fsum(r["loglikelihoods"][0] for r in got) / n
        perplexity = math.exp(mean) if mean < 700 else None
    result = {
        "format": FORMAT,
        "version": VERSION,
        "model_name": scorer.name,
        "benchmark": task.name,
        "status": "completed",
        "accuracy": right / n,
        "acc_norm": normed / n if task.normed else None,
        "stderr": standard_error(right, n),
        "interval": list(accuracy_interval(right, n)),
        "acc_norm_stderr": standard_error(normed, n) if task.normed else None,
        "acc_norm_interval": list(accuracy_interval(normed, n)) if task.normed else None,
        "perplexity": perplexity,
        "total_questions": n,
        "correct_predictions": right,
        "rows": questions.of,
        "truncated": sum(is_truncated(r, length) for q in requests for r in q),
        "data": questions.path,
        "data_sha256": questions.sha256,
        **_about(scorer),
    }
    # Of every question the end of its right answer: as many tokens as `overlap` looks up at a time.
    long_enough = [
        ids[-LENGTH:]
        for q, r in zip(questions.rows, requests, strict=True)
        if len(ids := r[q.gold].context + r[q.gold].continuation) >= LENGTH
    ]
    if len(long_enough) > SAMPLES:
        long_enough = [long_enough[i * len(long_enough) // SAMPLES] for i in range(SAMPLES)]
    ends_N = np.array([id for part in long_enough for id in part], np.int64)
    result["warnings"] = overlap_with_training(scorer, ends_N, questions.path, "questions")
    return result


# --- text ----------------------------------------------------------------------------------------------------------


def score_data(
    scorer: Scorer,
    path: str,
    *,
    stride: int = 0,
    dtype: str | None = None,
    limit: int = 0,
    seed: int = 0,
    records: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = lambda *_: None,
) -> Score:
    """Score a token file or a text in windows; arguments as `score_benchmark`, and

    Args:
        stride: tokens from one window to the next; 0: the context, disjoint windows.
        dtype: of a raw token file without manifest.
        limit: as many windows, drawn at random; 0: all.

    Raises:
        ConfigError: the stride is larger than the context.
        FileError, FormatError, TextError, MismatchError, OutputExistsError: as `open_stream` and `Records`.
    """
    context = scorer.context_length
    stride = stride or context
    if not 1 <= stride <= context:
        raise ConfigError(f"stride: found {stride}; expected 1 to {context}, the context")
    if limit < 0:
        raise ConfigError(f"limit: found {limit}; expected 0 or more")
    stream = open_stream(scorer, path, dtype)
    plan = windows(len(stream.ids), context, stride)
    chosen = list(range(len(plan)))
    if limit and limit < len(plan):
        chosen = sorted(random.Random(seed).sample(chosen, limit))
    about = {
        "benchmark": "data",
        "data": f"sha256:{stream.sha256}",
        "stride": stride,
        "limit": limit,
        "seed": seed,
        **scorer.settings(),
    }
    got: dict[int, WindowScore] = {}
    with Records(records, about, "window", resume=resume, overwrite=overwrite) as kept:
        for i, r in kept.found.items():
            units = [(int(u), float(nll), int(count)) for u, nll, count in r["units"]]
            got[i] = WindowScore(i, r["tokens"], r["nll"], r["correct"], units)
        progress(len(got), len(chosen))
        for batch in batched(plan, chosen, scorer.batch_size):
            if all(i in got for i in batch):
                continue
            new = score_windows(scorer, stream, plan, batch)
            kept.add(w._asdict() for w in new if w.window not in got)
            got.update({w.window: w for w in new})
            progress(len(got), len(chosen))
    found = total(stream, plan, got)
    warning = implausible(found)
    result = {
        "format": FORMAT,
        "version": VERSION,
        "model_name": scorer.name,
        "benchmark": "data",
        "status": "completed",
        "loss": found.loss,
        "perplexity": found.perplexity,
        "bits_per_byte": found.bits_per_byte,
        "accuracy": found.accuracy,
        "tokens": found.tokens,
        "bytes": None if found.bytes is None else round(found.bytes),
        "windows": len(chosen),
        "stride": stride,
        "data": stream.name,
        "data_sha256": stream.sha256,
        **_about(scorer),
        "warnings": [f"{path}: {warning}"] if warning else [],
    }
    result["warnings"] += overlap_with_training(scorer, stream.ids, path, "windows")
    return Score(result, text=found, stream=stream, rows=tuple(chosen))


def _about(scorer: Scorer) -> dict[str, Any]:
    return {
        "context_length": scorer.context_length,
        "batch_size": scorer.batch_size,
        "precision": scorer.precision,
        "step": scorer.step,
        "model_checksum": scorer.checksum,
        "tokenizer_hash": scorer.tokenizer_hash,
    }


# --- beside each other ---------------------------------------------------------------------------------------------


def compared(a: Score, b: Score, *, seed: int = 0) -> dict[str, Any]:
    """Two models on the same questions or the same text: measure → difference, interval, p-value and methods.

    Texts are compared in bits per byte over the same stretches of text, whatever the tokenizers; where the bytes are
    unknown in nats a token, which asks for the same tokens.

    Raises:
        MismatchError: they were not asked the same.
    """
    if a.right is not None and b.right is not None:
        if a.rows != b.rows or a.result["data_sha256"] != b.result["data_sha256"]:
            raise MismatchError("comparison: found other questions; expected the same file and the same sample")
        return {name: compare_answers(a.right[name], b.right[name]).as_json() for name in a.right}
    assert a.text is not None and b.text is not None and a.stream is not None and b.stream is not None
    same_tokens = np.array_equal(a.stream.ids, b.stream.ids)
    read = [(s.result["context_length"], s.result["stride"], s.rows) for s in (a, b)]
    if same_tokens and read[0] != read[1]:
        what = " and ".join(
            f"context {context}, stride {stride}, {len(rows)} windows" for context, stride, rows in read
        )
        raise MismatchError(f"comparison: found {what}; expected the same windows of the same text")
    by_bytes = a.stream.bytes_N is not None and b.stream.bytes_N is not None
    if not same_tokens:
        sums = [None if s.stream is None or s.stream.bytes_N is None else int(s.stream.bytes_N.sum()) for s in (a, b)]
        if not by_bytes or sums[0] != sums[1] or a.stream.units != b.stream.units:
            raise MismatchError(
                f"comparison: found {sums[0]} and {sums[1]} bytes of text in {a.stream.units} and {b.stream.units}; "
                "expected the same text behind both models' tokens"
            )
        if a.result["windows"] != len(windows(len(a.stream.ids), a.result["context_length"], a.result["stride"])):
            raise MismatchError("comparison: found --limit and two tokenizers; expected the whole text")
    units = max(len(a.text.nll_U), len(b.text.nll_U))
    cost = [_padded(s.text.nll_U, units) for s in (a, b) if s.text is not None]
    # A token belongs to the stretch that it begins in, and the first is never predicted: so two tokenizers' stretches
    # differ by parts of a token.
    weights = [_padded(s.text.weight_U, units) for s in (a, b) if s.text is not None]
    weight_U = (weights[0] + weights[1]) / 2
    scale = math.log(2) if by_bytes else 1.0
    found = compare_losses(cost[0] / scale, cost[1] / scale, weight_U, seed=seed)
    name = "bits_per_byte" if by_bytes else "loss"
    return {name: {**found.as_json(), "units": a.stream.units}}


def _padded(values_U: NDArray[np.float64], units: int) -> NDArray[np.float64]:
    return np.pad(values_U, (0, units - len(values_U)))
