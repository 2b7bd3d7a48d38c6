"""Likelihoods of continuations, and multiple choice by them.

In: a scorer and the questions of a benchmark. Out: of each answer its log-likelihood and whether greedy decoding would
have written it; accuracy with its interval. Called by `harness` and `cli_score`.

A question's answers share their context, so it is read once (`score.shared_prefix`), and nothing is filled up but for
attention. The head is applied where an answer's tokens are predicted and nowhere else; the first tokens of all answers
to a question are predicted at one place. Questions of about one length go together; what a batch holds depends on the
questions and the batch size alone. `plain_likelihoods` is the slow, readable specification, one sequence a pass.

Tried: a cache of keys and values for the contexts, copied for the answers. Only contexts of one length can be read
together then and answers are filled up, so the products see more tokens; it was the slower.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from bytekiln.characters import AnyTokenizer
from bytekiln.errors import ConfigError
from bytekiln.score.scorer import Scorer, token_scores
from bytekiln.score.shared_prefix import SharedPrefixReader, lay_out


class Request(NamedTuple):
    """What is asked: the likelihood of a continuation."""

    context: list[int]
    continuation: list[int]


class Answer(NamedTuple):
    """The sum of ln p over the continuation's tokens, and whether each was the most likely one."""

    loglikelihood: float
    greedy: bool


class Reading(NamedTuple):
    """A request as the model reads it."""

    inputs: list[int]
    targets: list[int]
    """Of the last positions."""


def encode_pair(tokenizer: AnyTokenizer, context: str, continuation: str) -> Request:
    """Ids of both, as the harness's `TemplateLM._encode_pair` and `loglikelihood` split them.

    Spaces at the end of a context go to the continuation. Both are encoded as one text, and the continuation's ids are
    those behind as many as the context has by itself. Without a context the end-of-text token stands for it.

    Raises:
        ConfigError: no context, and the tokenizer has no end-of-text token; or nothing is left to predict.
    """
    if not context:
        ids, eot = tokenizer.encode(continuation, allowed_special="all"), tokenizer.eot_id
        if eot is None:
            raise ConfigError("context: found none, and the tokenizer has no end-of-text token; expected some text")
        request = Request([eot], ids) if ids[:1] != [eot] else Request(ids[:1], ids[1:])
    else:
        stripped = context.rstrip()
        whole = tokenizer.encode(context + continuation, allowed_special="all")
        request = Request(tokenizer.encode(stripped, allowed_special="all"), [])
        request = request._replace(continuation=whole[len(request.context) :])
    if not request.context or not request.continuation:
        raise ConfigError(f"continuation: found {continuation[:40]!r} after {context[-40:]!r}; expected tokens of both")
    return request


def truncated(request: Request, context_length: int) -> Reading:
    """Inputs and targets; what does not fit is cut off from the left, as in the harness."""
    ids = (request.context + request.continuation)[-(context_length + 1) :]
    return Reading(ids[:-1], ids[1:][-len(request.continuation) :])


def is_truncated(request: Request, context_length: int) -> bool:
    """Whether the model cannot see all of it."""
    return len(request.context) + len(request.continuation) > context_length + 1


@torch.no_grad()
def plain_likelihoods(scorer: Scorer, requests: Sequence[Request]) -> list[Answer]:
    """The definition: every request in a pass of its own."""
    out = []
    for request in requests:
        inputs, targets = truncated(request, scorer.context_length)
        with scorer.autocast():
            logits_TxV = scorer.model(torch.tensor([inputs], device=scorer.device))[0].float()
        log_p_TxV = logits_TxV[-len(targets) :].log_softmax(-1)
        found = [float(log_p_TxV[i, t]) for i, t in enumerate(targets)]
        out.append(Answer(math.fsum(found), log_p_TxV.argmax(-1).tolist() == targets))
    return out


def jobs_of(scorer: Scorer, questions: Sequence[Sequence[Request]]) -> list[list[int]]:
    """Which questions are answered together, in the order of `likelihoods`: the longest first.

    A batch has `batch_size` answers, or one question with more.
    """
    lengths = [max(min(len(c) + len(a), scorer.context_length + 1) for c, a in requests) for requests in questions]
    jobs: list[list[int]] = []
    held = 0
    for q in sorted(range(len(questions)), key=lambda q: (-lengths[q], q)):
        if not jobs or held + len(questions[q]) > scorer.batch_size:
            jobs.append([])
            held = 0
        jobs[-1].append(q)
        held += len(questions[q])
    return jobs


def likelihoods(scorer: Scorer, questions: Sequence[Sequence[Request]]) -> Iterator[dict[int, list[Answer]]]:
    """The answers of every question, some questions at a time, in an order of our own.

    Args:
        scorer: the model.
        questions: the requests of each; those that begin alike profit.

    Yields:
        Number of a question → an answer a request.
    """
    reader = SharedPrefixReader(scorer.model)
    for job in jobs_of(scorer, questions):
        yield likelihoods_of(scorer, reader, questions, job)


@torch.no_grad()
def likelihoods_of(
    scorer: Scorer, reader: SharedPrefixReader, questions: Sequence[Sequence[Request]], job: Sequence[int]
) -> dict[int, list[Answer]]:
    """The answers to the questions with the numbers in `job`, in one pass."""
    groups = [[truncated(r, scorer.context_length) for r in questions[q]] for q in job]
    layout, paths = lay_out([[reading.inputs for reading in group] for group in groups])
    readings = [
        (path, reading)
        for of_group, group in zip(paths, groups, strict=True)
        for path, reading in zip(of_group, group, strict=True)
    ]
    asked = [place for path, reading in readings for place in path[-len(reading.targets) :]]
    targets = [target for _, reading in readings for target in reading.targets]
    place_N, which_N = np.unique(np.array(asked), return_inverse=True)
    device = scorer.device
    with scorer.autocast():
        x_TxD = reader.features(layout)
        nll_N, hit_N = token_scores(
            scorer,
            x_TxD[torch.from_numpy(place_N).to(device)],
            torch.tensor(targets, device=device),
            torch.from_numpy(which_N).to(device),
        )
    nll, hit, at = nll_N.tolist(), hit_N.tolist(), 0
    out: dict[int, list[Answer]] = {}
    for q, group in zip(job, groups, strict=True):
        out[q] = []
        for reading in group:
            until = at + len(reading.targets)
            out[q].append(Answer(-math.fsum(nll[at:until]), all(hit[at:until])))
            at = until
    return out
