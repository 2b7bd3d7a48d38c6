"""`lm-score` as a user meets it: results, files, comparisons, faults, an interruption taken up again."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from bytekiln import cli_score
from bytekiln.errors import BytekilnError, ConfigError, FileError, FormatError, MismatchError, OutputExistsError
from bytekiln.score import runs as score_runs
from bytekiln.score import text as score_text
from bytekiln.score.runs import compared, score_data
from bytekiln.score.scorer import open_scorer
from bytekiln.tokenizer import encode_files
from score_models import model, rows, saved, tokenizer, write_rows
from test_scores import TEXT, text_file

RULED = (
    "model_name benchmark accuracy acc_norm stderr interval evaluation_time_seconds status total_questions "
    "correct_predictions"
).split()


@pytest.fixture
def run(tmp_path: Path) -> str:
    return str(saved(tmp_path / "run", 1))


@pytest.fixture
def questions(tmp_path: Path) -> str:
    return str(write_rows(tmp_path / "h.jsonl", rows(30, seed=1)))


def untimed(result: Any) -> Any:
    if isinstance(result, dict):
        return {k: untimed(v) for k, v in result.items() if k != "evaluation_time_seconds"}
    return [untimed(v) for v in result] if isinstance(result, list) else result


def test_the_files_fields_and_the_figures_of_people(run: str, questions: str, tmp_path: Path, capsys) -> None:
    out = tmp_path / "hellaswag.json"
    assert cli_score.score([run, "--hellaswag", questions, "--out", str(out), "--context_length=40"]) == 0
    found = json.loads(out.read_text("utf-8"))
    assert set(RULED) <= set(found) and found["status"] == "completed" and found["benchmark"] == "hellaswag"
    assert found["total_questions"] == 30 and found["correct_predictions"] == round(30 * found["accuracy"])
    assert found["interval"][0] <= found["accuracy"] <= found["interval"][1]
    assert found["stderr"] == pytest.approx(math.sqrt(found["accuracy"] * (1 - found["accuracy"]) / 29))
    assert found["model_name"] == "run" and found["context_length"] == 40 and found["truncated"] > 0
    lines = (tmp_path / "hellaswag.hellaswag.jsonl").read_text("utf-8").splitlines()
    assert len(lines) == 31 and {json.loads(x)["question"] for x in lines[1:]} == set(range(30))
    shown = capsys.readouterr().out
    assert f"acc       {100 * found['accuracy']:.2f} %" in shown and "95 % interval" in shown
    assert "run: step 3" in shown and "cut off from the left" in shown


def test_several_things_at_once_and_json_on_stdout(run: str, questions: str, tmp_path: Path, capsys) -> None:
    lambada = write_rows(tmp_path / "l.jsonl", [{"text": "the kiln and the clay"}, {"text": "a red slip"}])
    text = text_file(tmp_path)
    argv = [run, "--data", text, "--hellaswag", questions, "--lambada", str(lambada), "--limit", "7", "--json"]
    assert cli_score.score(argv) == 0
    first = json.loads(capsys.readouterr().out)["results"]
    assert [r["benchmark"] for r in first] == ["data", "hellaswag", "lambada"]
    assert first[1]["total_questions"] == 7 and first[1]["rows"] == 30
    assert first[2]["perplexity"] > 1 and first[2]["acc_norm"] is None
    assert cli_score.score(argv) == 0
    assert untimed(json.loads(capsys.readouterr().out)["results"]) == untimed(first), "deterministic"
    assert cli_score.score([*argv, "--seed", "5"]) == 0
    assert untimed(json.loads(capsys.readouterr().out)["results"][1]) != untimed(first[1])


def test_two_models_by_a_paired_test(run: str, questions: str, tmp_path: Path, capsys) -> None:
    other = str(saved(tmp_path / "other", 2, model(2, vocab_size=300), own=tokenizer(300)))
    text, out = text_file(tmp_path), tmp_path / "c.json"
    argv = [run, "--against", other, "--data", text, "--hellaswag", questions, "--out", str(out)]
    assert cli_score.score(argv) == 0
    data, hellaswag = json.loads(out.read_text("utf-8"))["results"]
    assert data["against"]["model_name"] == "other" and data["comparison"]["bits_per_byte"]["n"] == 40
    low, high = data["comparison"]["bits_per_byte"]["interval"]
    assert low <= data["comparison"]["bits_per_byte"]["difference"] <= high
    for measure in ("acc", "acc_norm"):
        found = hellaswag["comparison"][measure]
        assert found["test"] == "McNemar, exact" and 0 < found["p_value"] <= 1
    difference = hellaswag["accuracy"] - hellaswag["against"]["accuracy"]
    assert hellaswag["comparison"]["acc"]["difference"] == pytest.approx(difference)
    assert (tmp_path / "c.against-hellaswag.jsonl").exists() and (tmp_path / "c.data.jsonl").exists()
    shown = capsys.readouterr().out
    assert "run - other" in shown and "p = " in shown
    assert cli_score.score([run, "--against", run, "--hellaswag", questions]) == 0
    assert "not distinguishable" in capsys.readouterr().out


def test_a_given_tokenizer_is_for_each_model_that_has_none(
    run: str, questions: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two runs on token files alone keep no tokenizer; a run that has its own goes by that."""
    ours, theirs, strange = (tmp_path / f"{n}.json" for n in (280, 300, 270))
    for path in (ours, theirs, strange):
        tokenizer(int(path.stem)).save(path)
    bare = [str(saved(tmp_path / f"bare{i}", i, keeps_tokenizer=False)) for i in (1, 2)]
    wide = str(saved(tmp_path / "wide", 3, own=tokenizer(300)))

    def hashes(*argv: str) -> tuple[str, str]:
        assert cli_score.score([*argv, "--hellaswag", questions, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        return found["tokenizer_hash"], found["against"]["tokenizer_hash"]

    small, large = tokenizer(280).hash, tokenizer(300).hash
    assert hashes(bare[0], "--against", bare[1], "--tokenizer", str(ours)) == (small, small)
    assert hashes(run, "--against", bare[1], "--tokenizer", str(ours)) == (small, small)
    assert hashes(bare[0], "--against", wide, "--tokenizer", str(ours)) == (small, large)
    assert hashes(wide, "--against", bare[0], "--tokenizer", str(ours)) == (large, small)
    for first, second, given, words in (
        (run, wide, strange, "270.json: found tokenizer hash .*; expected that of run and wide"),
        (run, bare[0], strange, "270.json: found tokenizer hash .* with which .*bare1 was trained"),
        (bare[0], bare[1], theirs, "300.json: found tokenizer hash"),
    ):
        with pytest.raises(MismatchError, match=words):
            cli_score.score([first, "--against", second, "--tokenizer", str(given), "--hellaswag", questions])
    with pytest.raises(ConfigError, match=r"bare2: found no tokenizer\.json in the run; expected --tokenizer FILE"):
        cli_score.score([run, "--against", bare[1], "--hellaswag", questions])


@pytest.mark.parametrize("kind", ["hellaswag", "data"])
def test_an_interruption_is_taken_up_again(
    kind: str, run: str, questions: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    what = questions if kind == "hellaswag" else text_file(tmp_path, TEXT * 4)
    argv = [run, f"--{kind}", what, "--batch-size", "8", "--out"]
    whole, cut = tmp_path / "whole.json", tmp_path / "cut.json"
    assert cli_score.score([*argv, str(whole)]) == 0
    name = "likelihoods_of" if kind == "hellaswag" else "score_windows"
    real, calls = getattr(score_runs, name), []

    def broken(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(score_runs, name, broken)
    with pytest.raises(KeyboardInterrupt):
        cli_score.score([*argv, str(cut)])
    assert not cut.exists()
    records = tmp_path / f"cut.{kind}.jsonl"
    before = records.read_bytes()
    with pytest.raises(OutputExistsError, match=r"cut.*jsonl: exists already; expected --resume"):
        cli_score.score([*argv, str(cut)])
    records.write_bytes(before[:-7])  # the death came in the middle of a line
    calls.clear()
    monkeypatch.setattr(score_runs, name, lambda *args: calls.append(1) or real(*args))
    assert cli_score.score([*argv, str(cut), "--resume"]) == 0
    assert untimed(json.loads(cut.read_text("utf-8"))) == untimed(json.loads(whole.read_text("utf-8")))
    key = "question" if kind == "hellaswag" else "window"
    found = []
    for name_of in ("whole", "cut"):
        lines = (tmp_path / f"{name_of}.{kind}.jsonl").read_text("utf-8").splitlines()
        found.append(sorted(map(json.loads, lines), key=lambda r: r.get(key, -1)))
    assert found[0] == found[1]
    done = len(calls)
    assert cli_score.score([*argv, str(cut), "--resume"]) == 0
    assert len(calls) == done, "all was there"
    monkeypatch.setattr(score_runs, name, real)
    other = str(saved(tmp_path / "elsewhere", 9))
    with pytest.raises(MismatchError, match=r"jsonl: model: found sha256:.*another evaluation"):
        cli_score.score([other, *argv[1:], str(cut), "--resume"])
    with pytest.raises(MismatchError, match=r"(context_length|stride): found 48; expected 20"):
        cli_score.score([*argv, str(cut), "--resume", "--context-length", "20"])
    with pytest.raises(OutputExistsError, match="exists already"):
        cli_score.score([*argv, str(cut)])
    assert cli_score.score([*argv, str(cut), "--overwrite"]) == 0


def test_the_runs_own_validation_data(tmp_path: Path, capsys) -> None:
    text = text_file(tmp_path)
    encode_files(tokenizer(), [text], tmp_path / "val.npy")
    run = saved(tmp_path / "run", 1, val_data=str(tmp_path / "val.npy"))
    assert cli_score.score([str(run)]) == 0
    said = capsys.readouterr()
    assert "bits per byte" in said.out and "the run's validation data" in said.err


def test_implausible_losses_are_warned_of(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    argv = [run, "--data", text_file(tmp_path), "--json"]
    assert cli_score.score(argv) == 0
    said = capsys.readouterr()
    assert "implausible" not in said.err and json.loads(said.out)["warnings"] == []
    monkeypatch.setattr(score_text, "IMPLAUSIBLE_BITS", 50.0)
    assert cli_score.score(argv) == 0
    said = capsys.readouterr()
    assert "warning: " in said.err and "implausible loss" in said.err
    assert "implausible loss" in json.loads(said.out)["warnings"][0]


FAULTS: list[tuple[list[str], type[BytekilnError], str]] = [
    (["RUN", "--hellaswag", "missing.jsonl"], FileError, "missing.jsonl: no such file"),
    (["RUN", "--hellaswag", "BAD"], FormatError, "bad.jsonl: line 2: endings: found nothing"),
    (["RUN", "--piqa", "EMPTY"], FileError, "empty.jsonl: empty file"),
    (["RUN", "--data", "missing.txt"], FileError, "missing.txt: no such file"),
    (["RUN", "--data", "EMPTY"], FileError, "empty.jsonl: empty file"),
    (["missing-run", "--data", "EMPTY"], FileError, "missing-run: found nothing; expected a checkpoint"),
    (["RUN"], ConfigError, "expected --data FILE or a benchmark such as --hellaswag"),
    (["RUN", "--tokenizer", "OTHER", "--hellaswag", "GOOD"], MismatchError, "other.json: found tokenizer hash"),
    (
        ["RUN", "--context-length", "9999", "--hellaswag", "GOOD"],
        ConfigError,
        "context_length: found 9999; expected 1 to ",
    ),
    (["RUN", "--stride", "99", "--data", "TEXT"], ConfigError, "stride: found 99; expected 1 to 48"),
    (["RUN", "--hellaswag", "GOOD", "--limit", "-1"], ConfigError, "limit: found -1"),
    (["RUN", "--hellaswag", "GOOD", "--resume"], ConfigError, "found --resume without --out"),
    (["RUN", "--hellaswag", "GOOD", "--out", "o.json", "--resume", "--overwrite"], ConfigError, "expected one of them"),
    (["RUN", "--hellaswag", "GOOD", "--out", "nowhere/o.json"], FileError, "nowhere: no such folder"),
    (["RUN", "--hellaswag", "GOOD", "--out", "."], FileError, "is a directory"),
    (["RUN", "--hellaswag", "GOOD", "--out", "EMPTY"], OutputExistsError, "exists already"),
    (["RUN", "--helaswag", "GOOD"], ConfigError, "unknown flag --helaswag; did you mean --hellaswag"),
    (["RUN", "--hellaswag", "GOOD", "--device", "toaster"], ConfigError, "device"),
    (["RUN", "--hellaswag", "GOOD", "--precision", "fp8"], ConfigError, "precision: found 'fp8'"),
]


@pytest.mark.parametrize(("argv", "kind", "message"), FAULTS)
def test_faults(
    argv: list[str], kind: type[BytekilnError], message: str, run: str, questions: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    good = rows(2)
    write_rows(tmp_path / "bad.jsonl", [good[0], {k: v for k, v in good[1].items() if k != "endings"}])
    (tmp_path / "empty.jsonl").touch()
    tokenizer(270).save(tmp_path / "other.json")
    named = {"RUN": run, "GOOD": questions, "BAD": "bad.jsonl", "EMPTY": "empty.jsonl", "OTHER": "other.json"}
    named["TEXT"] = text_file(tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(kind, match=message.replace(".", r"\.")):
        cli_score.score([named.get(a, a) for a in argv])
    assert sorted(p.name for p in tmp_path.iterdir()) == before, "nothing half-written"


def test_as_a_command(command, run: str, questions: str, tmp_path: Path) -> None:
    told = command("lm-score", run, "--hellaswag", questions, "--data", text_file(tmp_path), "--out", "s.json")
    assert "hellaswag: 30 questions" in told.stdout and (tmp_path / "s.json").exists()
    command("lm-score", run, "--hellaswag", questions, "--out", "s.json", status=2)


def test_help_fits_a_screen_or_two(capsys) -> None:
    with pytest.raises(SystemExit):
        cli_score.score(["--help"])
    shown = capsys.readouterr().out
    assert "tokenizer of each model without one of its own" in shown
    lines = shown.splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= 110


def test_two_contexts_are_read_with_the_shorter_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A longer context is an advantage of its own, and a sample of windows would be another text."""
    names = [str(saved(tmp_path / name, seed)) for name, seed in (("a", 1), ("b", 2))]
    text = text_file(tmp_path)
    scorers = [open_scorer(n, context_length=c) for n, c in zip(names, (16, 32), strict=True)]
    apart = [score_data(s, str(text), limit=3) for s in scorers]
    with pytest.raises(MismatchError, match="context 16, stride 16, 3 windows and context 32"):
        compared(*apart)
    assert cli_score.score([names[0], "--against", names[0], "--data", str(text), "--limit", "3", "--json"]) == 0
    same = json.loads(capsys.readouterr().out)
    assert same["comparison"]["bits_per_byte"]["difference"] == 0 and same["model_name"] == names[0]
