"""Likelihoods of answers: those of one sequence a pass, however they are read together; chance and knowledge."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bytekiln.characters import CharTokenizer
from bytekiln.errors import ConfigError
from bytekiln.score.choices import (
    Request,
    encode_pair,
    is_truncated,
    jobs_of,
    likelihoods,
    plain_likelihoods,
    truncated,
)
from bytekiln.score.runs import score_benchmark
from bytekiln.score.scorer import Scorer
from bytekiln.score.shared_prefix import lay_out
from bytekiln.score.tasks import read_questions
from score_models import rows, scorer, taught, tokenizer, write_rows

MODELS: dict[str, dict[str, Any]] = {
    "rope": {},
    "learned": {"position": "learned", "norm": "layer", "ffn": "gelu", "bias": True, "tie_embeddings": True},
    "none": {"position": "none", "norm_position": "post"},
    "gqa": {"num_heads": 4, "num_kv_heads": 2, "qk_norm": True, "logit_softcap": 10.0},
    "window": {"sliding_window": 5},
    "moe": {"ffn": "moe", "num_experts": 4, "expert_top_k": 2, "d_ff": 16},
    "modded": {"value_embeddings": True, "residual_lambdas": True, "embedding_norm": True, "pad_vocab": True},
    "longer": {"max_seq_len": 64},
}


def questions(count: int, seed: int = 0) -> list[list[Request]]:
    """Random ids; some share all of the context, some a part of it, some nothing."""
    draw = random.Random(seed)

    def ids(least: int, most: int) -> list[int]:
        return [draw.randrange(256) for _ in range(draw.randint(least, most))]

    out = []
    for i in range(count):
        context = ids(1, 20)
        contexts = [context] * 4 if i % 3 else [context + ids(1, 3) for _ in range(2)]
        first = ids(1, 1)
        out.append([Request(c, (first if i % 2 else []) + ids(1, 9)) for c in contexts])
    out.append([Request(ids(5, 5), ids(2, 2))])
    out.append([Request(ids(40, 60), ids(5, 9)) for _ in range(2)] + [Request(ids(2, 2), ids(60, 60))])
    return out


def answered(judge: Scorer, asked: list[list[Request]]) -> list[list[tuple[float, bool]]]:
    found: dict[int, list[tuple[float, bool]]] = {}
    for some in likelihoods(judge, asked):
        assert not set(some) & set(found)
        found.update(some)
    return [found[i] for i in range(len(asked))]


@pytest.mark.parametrize("name", MODELS)
def test_as_one_sequence_a_pass(name: str) -> None:
    judge, asked = scorer(**MODELS[name]), questions(12)
    found = answered(judge, asked)
    for requests, answers in zip(asked, found, strict=True):
        for (value, greedy), expected in zip(answers, plain_likelihoods(judge, requests), strict=True):
            assert value == pytest.approx(expected.loglikelihood, abs=2e-4)
            assert greedy == expected.greedy
    assert any(is_truncated(r, judge.context_length) for q in asked for r in q)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_the_batch_decides_rounding_only(batch_size: int) -> None:
    asked = questions(9)
    plain, other = answered(scorer(), asked), answered(scorer(batch_size=batch_size), asked)
    for a, b in zip(plain, other, strict=True):
        assert [x[0] for x in a] == pytest.approx([x[0] for x in b], abs=1e-4)
    assert answered(scorer(), asked) == plain  # and twice the same is the same to the bit


def test_the_models_own_weights_are_left_alone() -> None:
    judge = scorer()
    before = {k: v.clone() for k, v in judge.model.state_dict().items()}
    config, ids = judge.model.config, torch.arange(10)[None]
    logits = judge.model(ids)
    answered(judge, questions(4))
    assert judge.model.config is config and torch.equal(judge.model(ids), logits)
    assert all(torch.equal(v, before[k]) for k, v in judge.model.state_dict().items())


SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=4)


@given(groups=st.lists(SEQUENCES, min_size=1, max_size=4))
@settings(max_examples=60)
def test_the_row_holds_every_sequence(groups: list[list[list[int]]]) -> None:
    layout, paths = lay_out(groups)
    ids, positions = layout.ids_T.tolist(), layout.positions_T.tolist()
    row = 0
    for group, of_group in zip(groups, paths, strict=True):
        for sequence, path in zip(group, of_group, strict=True):
            assert [ids[p] for p in path] == sequence and [positions[p] for p in path] == list(range(len(sequence)))
            assert layout.path_BxS[row, : len(path)].tolist() == path
            row += 1
    assert layout.path_BxS.flatten()[layout.home_T].tolist() == list(range(len(ids)))


def test_what_is_shared_is_read_once() -> None:
    layout, _ = lay_out([[[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 6, 7]], [[1, 2]]])
    assert layout.ids_T.tolist() == [1, 2, 3, 4, 5, 6, 7, 1, 2]


@pytest.mark.parametrize("context", ["a kiln", "a kiln  ", "x"])
@pytest.mark.parametrize("continuation", [" is hot", "s", " ", "."])
def test_pairs_are_split_as_the_harness_does_it(context: str, continuation: str) -> None:
    own = tokenizer()
    got = encode_pair(own, context, continuation)
    assert got.context + got.continuation == own.encode(context + continuation)
    assert got.context == own.encode(context.rstrip())


def test_without_a_context_the_end_of_text_token_stands_for_it() -> None:
    own = tokenizer()
    assert encode_pair(own, "", "kiln") == Request([own.eot_id], own.encode("kiln"))
    ids = own.encode("kiln")
    assert encode_pair(own, "", "<|endoftext|>kiln") == Request([own.eot_id], ids)
    with pytest.raises(ConfigError, match="no end-of-text token"):
        encode_pair(CharTokenizer("kiln"), "", "kiln")
    with pytest.raises(ConfigError, match="continuation: found ''"):
        encode_pair(own, "kiln", "")


def test_what_does_not_fit_is_cut_off_from_the_left() -> None:
    request = Request([1, 2, 3, 4], [5, 6])
    assert truncated(request, 5) == ([1, 2, 3, 4, 5], [5, 6]) and not is_truncated(request, 5)
    assert truncated(request, 3) == ([3, 4, 5], [5, 6]) and is_truncated(request, 3)
    assert truncated(request, 1) == ([5], [6])


def test_the_longest_go_first_and_no_batch_is_too_large() -> None:
    asked = questions(20)
    jobs = jobs_of(scorer(batch_size=9), asked)
    assert sorted(q for job in jobs for q in job) == list(range(len(asked)))
    assert all(sum(len(asked[q]) for q in job) <= 9 for job in jobs)


def test_a_random_model_scores_chance(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "h.jsonl", rows(200, seed=3))
    result = score_benchmark(scorer(1), "hellaswag", str(path)).result
    for name in ("interval", "acc_norm_interval"):
        low, high = result[name]
        assert low < 0.25 < high and high - low < 0.14
    assert result["total_questions"] == 200


def test_a_random_model_scores_chance_on_the_real_questions(shared_bytes) -> None:
    from conftest import SHARED

    shared_bytes("hellaswag/hellaswag_val.jsonl.xz", 1)
    path = str(SHARED / "hellaswag" / "hellaswag_val.jsonl.xz")
    judge = scorer(2, context_length=64, max_seq_len=64)
    result = score_benchmark(judge, "hellaswag", path, limit=150).result
    low, high = result["interval"]
    assert low < 0.25 < high
    assert result["rows"] == 10042 and result["truncated"] > 0


def test_a_model_that_was_taught_the_answers_scores_high(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "h.jsonl", rows(24, seed=5))
    asked = read_questions("hellaswag", path)
    pairs = [encode_pair(tokenizer(), *q.pairs[q.gold]) for q in asked.rows]
    judge = Scorer(taught([tuple(p) for p in pairs]), tokenizer(), "taught")
    result = score_benchmark(judge, "hellaswag", str(path)).result
    assert result["accuracy"] > 0.9 and result["acc_norm"] > 0.9
    assert result["correct_predictions"] == round(24 * result["accuracy"])
    assert result["interval"][0] > 0.7
