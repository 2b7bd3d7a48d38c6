"""lm-evaluation-harness and `lm-score` answer alike, question by question; the adapter's other requests."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import bytekiln.evaluate
import bytekiln.score.harness
from bytekiln.errors import BytekilnError, ConfigError
from bytekiln.sample import generate
from bytekiln.score.choices import plain_likelihoods
from bytekiln.score.runs import score_benchmark
from bytekiln.score.scorer import Scorer
from conftest import ROOT, SHARED
from score_models import WORDS, model, rows, saved, scorer, tokenizer, write_rows

pytestmark = pytest.mark.filterwarnings("ignore")  # of the harness and what it imports
# A pool of forks of a process with threads, for a bootstrap that nobody asks for, may hang.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", DISABLE_MULTIPROC="1")

CHOICE = {"output_type": "multiple_choice"}
ACC = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
NORM = [*ACC, {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True}]
QUESTION: dict[str, Any] = {**CHOICE, "metric_list": NORM}


def task(name: str) -> dict[str, Any]:
    """The harness's own settings of a task (its YAML files), its own functions included."""
    if name == "hellaswag":
        process = importlib.import_module("lm_eval.tasks.hellaswag.utils").process_docs
        return {
            **QUESTION, "process_docs": process, "doc_to_text": "{{query}}", "doc_to_target": "{{label}}",
            "doc_to_choice": "choices",
        }  # fmt: skip
    if name == "lambada":
        return {
            "output_type": "loglikelihood",
            "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
            "doc_to_target": "{{' '+text.split(' ')[-1]}}",
            "metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}, *ACC],
        }
    if name == "piqa":
        return {
            **QUESTION, "doc_to_text": "Question: {{goal}}\nAnswer:", "doc_to_target": "label",
            "doc_to_choice": "{{[sol1, sol2]}}",
        }  # fmt: skip
    if name == "arc_easy":
        return {
            **QUESTION, "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_target": "{{choices.label.index(answerKey)}}", "doc_to_choice": "{{choices.text}}",
        }  # fmt: skip
    own = importlib.import_module("lm_eval.tasks.winogrande.preprocess_winogrande")
    return {
        **CHOICE, "metric_list": ACC, "doc_to_text": own.doc_to_text, "doc_to_target": own.doc_to_target,
        "doc_to_choice": own.doc_to_choice,
    }  # fmt: skip


def driven(judge: Scorer, name: str, path: Path, cache: Path) -> dict[str, Any]:
    """The harness's result and samples of our model, on a local file, without network."""
    lm_eval = importlib.import_module("lm_eval")
    settings = {
        "task": f"local_{name}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(path)}, "cache_dir": str(cache)},
        "validation_split": "validation",
        **task(name),
    }
    # Without the index of the harness's thirteen thousand task files, which takes half a minute.
    manager = importlib.import_module("lm_eval.tasks").TaskManager(include_defaults=False)
    found = lm_eval.simple_evaluate(
        bytekiln.evaluate.HarnessLM(judge), tasks=[settings], log_samples=True, bootstrap_iters=2, task_manager=manager
    )
    return {"results": found["results"][f"local_{name}"], "samples": found["samples"][f"local_{name}"]}


def agree(judge: Scorer, name: str, path: Path, folder: Path) -> None:
    out = folder / f"{name}.jsonl"
    own = score_benchmark(judge, name, str(path), records=out, overwrite=True)
    theirs = driven(judge, name, path, folder / "cache")
    kept = {r["question"]: r for r in map(json.loads, out.read_text("utf-8").splitlines()[1:])}
    assert len(theirs["samples"]) == own.result["total_questions"] > 0
    for sample in theirs["samples"]:
        mine = kept[sample["doc_id"]]
        values = [float(r[0]) for r in sample["filtered_resps"]]
        assert values == pytest.approx(mine["loglikelihoods"], abs=2e-4)
        assert sample["acc"] == mine["correct"]
        if "acc_norm" in sample:
            assert sample["acc_norm"] == mine["correct_norm"]
    results = theirs["results"]
    assert results["acc,none"] == pytest.approx(own.result["accuracy"])
    assert results["acc_stderr,none"] == pytest.approx(own.result["stderr"])
    if own.result["acc_norm"] is not None:
        assert results["acc_norm,none"] == pytest.approx(own.result["acc_norm"])
    if own.result["perplexity"] is not None:
        assert results["perplexity,none"] == pytest.approx(own.result["perplexity"], rel=1e-4)


def others(name: str, count: int) -> list[dict[str, Any]]:
    """Rows of the other tasks in the harness's own fields."""
    made = []
    for i, row in enumerate(rows(count, seed=9)):
        a, b, *_ = row["endings"]
        made.append(
            {
                "lambada": {"text": f"{row['ctx_a']}  {a} {WORDS[i % 16]}"},
                "piqa": {"goal": row["ctx_a"], "sol1": a, "sol2": b + " and ash", "label": i % 2},
                "arc_easy": {
                    "question": row["ctx_a"], "choices": {"text": row["endings"], "label": ["A", "B", "C", "D"]},
                    "answerKey": "ABCD"[i % 4],
                },
                "winogrande": {
                    "sentence": f"{row['ctx_a']} so _ took {a} .", "option1": WORDS[i % 5], "option2": "red slip",
                    "answer": str(1 + i % 2),
                },
            }[name]
        )  # fmt: skip
    return made


@pytest.mark.parametrize("name", ["hellaswag", "lambada", "piqa", "arc_easy", "winogrande"])
def test_the_harness_answers_alike(name: str, tmp_path: Path) -> None:
    some = rows(50, seed=2) if name == "hellaswag" else others(name, 30)
    judge = scorer(3, context_length=40)  # some questions are longer, and cut off alike
    agree(judge, name, write_rows(tmp_path / "rows.jsonl", some), tmp_path)


def test_on_real_questions(shared_bytes, tmp_path: Path) -> None:
    lines = shared_bytes("hellaswag/hellaswag_val.jsonl.xz").splitlines(keepends=True)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join(lines[::201]))
    agree(scorer(4, max_seq_len=400, context_length=400), "hellaswag", path, tmp_path)


@pytest.mark.slow
def test_on_a_thousand_real_questions(shared_bytes, tmp_path: Path) -> None:
    lines = shared_bytes("hellaswag/hellaswag_val.jsonl.xz").splitlines(keepends=True)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join(lines[::10]))
    agree(scorer(5, max_seq_len=600, context_length=600), "hellaswag", path, tmp_path)


class Request:
    """What the adapter uses of the harness's `Instance`."""

    def __init__(self, *args: Any, doc_id: int | None = None) -> None:
        self.args, self.doc_id, self.task_name = args, doc_id, "t"


def adapter(judge: Scorer) -> Any:
    return bytekiln.score.harness.HarnessLM(judge)


def test_requests_in_any_order() -> None:
    judge = scorer(6)
    lm = adapter(judge)
    asked = [("a kiln", " is hot"), ("a kiln", " is"), ("wet clay", "."), ("a kiln", " is hot"), ("", "red slip")]
    expected = plain_likelihoods(judge, [bytekiln.score.harness.encode_pair(tokenizer(), *pair) for pair in asked])
    for doc_ids in ([None] * 5, [0, 0, 1, 2, 3]):
        found = lm.loglikelihood([Request(*a, doc_id=d) for a, d in zip(asked, doc_ids, strict=True)])
        assert [v for v, _ in found] == pytest.approx([a.loglikelihood for a in expected], abs=1e-4)
        assert [g for _, g in found] == [a.greedy for a in expected]
    assert lm.loglikelihood([]) == [] and lm.truncated == 0
    lm.loglikelihood([Request("clay " * 80, "red")])
    assert lm.truncated == 1


@torch.no_grad()
def test_rolling_counts_every_token_once() -> None:
    judge = scorer(6, context_length=12)
    text = "the potter turns the wheel and the bowl grows " * 3
    (found,) = adapter(judge).loglikelihood_rolling([Request(text)])
    own = tokenizer()
    ids = [own.eot_id, *own.encode(text)]
    # Disjoint windows of 12 behind the token before; the last one looks back as far as it can.
    expected, done = 0.0, 1
    while done < len(ids):
        end = min(done + 12, len(ids))
        start = done - 1 if end < len(ids) or done == 1 else end - 13
        log_p = judge.model(torch.tensor([ids[start : end - 1]]))[0].log_softmax(-1)
        expected += sum(float(log_p[t - 1 - start, ids[t]]) for t in range(done, end))
        done = end
    assert found == pytest.approx(expected, abs=1e-3)


def test_generation_stops_where_it_is_told() -> None:
    judge, own = scorer(6), tokenizer()
    plain = own.decode(list(generate(judge.model, own.encode("a kiln"), max_new_tokens=20, eot_id=own.eot_id)))
    del plain
    (text,) = adapter(judge).generate_until([Request("a kiln", {"until": [], "max_gen_toks": 12})])
    assert text
    stop = text[2:4]
    (cut,) = adapter(judge).generate_until([Request("a kiln", {"until": [stop], "max_gen_toks": 12})])
    assert cut == text[: text.index(stop)]
    (long,) = adapter(judge).generate_until([Request("clay " * 80, {"until": "\x00", "max_gen_toks": 4})])
    assert isinstance(long, str)


def test_a_run_by_its_path_and_by_the_harness_arguments(tmp_path: Path) -> None:
    run = saved(tmp_path / "run", 1)
    lm = bytekiln.evaluate.HarnessLM.create_from_arg_string(
        f"run={run},context_length=20", {"batch_size": "auto", "device": "cpu", "max_batch_size": None}
    )
    assert lm.max_length == 20 and lm.scorer.batch_size == 32 and lm.tokenizer_name == tokenizer().hash
    assert isinstance(lm, importlib.import_module("lm_eval.api.model").LM)
    with pytest.raises(ConfigError, match="run: found nothing"):
        bytekiln.evaluate.HarnessLM()
    with pytest.raises(ConfigError, match="found no tokenizer"):
        adapter(Scorer(model(), None, "bare"))


def test_without_the_harness_one_line_says_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    bytekiln.score.harness._adapter.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(BytekilnError, match=r'pip install "bytekiln\[eval\]"'):
        _ = bytekiln.evaluate.HarnessLM
    for module in (bytekiln.evaluate, bytekiln.score.harness):
        with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
            _ = module.Nothing


def test_importing_the_adapter_loads_no_harness() -> None:
    code = "import bytekiln.score.harness, bytekiln.evaluate, sys; sys.exit('lm_eval' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
@pytest.mark.alone
def test_three_times_the_harness_own_model(shared_bytes) -> None:
    """On own time, since other work on the machine hits the clock; the bench has the committed figures."""
    shared_bytes("hellaswag/hellaswag_val.jsonl.xz", 1)
    assert (SHARED / "gpt2").is_dir()
    run = subprocess.run(
        [sys.executable, str(ROOT / "benches" / "harness.py"), "--rows", "60", "--rounds", "2", "--json"],
        capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    found = json.loads(run.stdout)
    same = found["agreement"]
    assert same["same_acc_answers"] == same["same_acc_norm_answers"] == same["questions"] == 60
    assert found["ratio"]["own_min_s"] > 2.5
