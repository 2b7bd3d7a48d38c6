"""The analysis of sweeps: folders with known numbers in, exact sentences out."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from bytekiln.cli import run as cli_run
from bytekiln.errors import ConfigError
from bytekiln.metrics import MetricsFile, Row
from bytekiln.report.analysis import analysis
from bytekiln.report.build import analyse_sweep, analysed, read_report
from bytekiln.sweep.spec import changed, read_spec
from bytekiln.sweep.table import to_toml
from report_files import write_config, write_result, write_sweep

STEPS = 40
Loss = Callable[[int], float]


def falling(rate: float = 0.1) -> Loss:
    """From 4 by `rate` a step, flat from step 20 on."""
    return lambda s: 4.0 - rate * min(s - 1, 19)


def run(
    folder: Path, vals: Mapping[int, float], *, loss: Loss | None = None, gap: float = 0.0, steps: int = STEPS,
    status: str = "completed", why: str = "all steps done", result: Mapping[str, object] | None = None,
    norm: float = 1.0, **config: object,
) -> None:  # fmt: skip
    """A run folder.

    Args:
        folder: its place. vals: validation loss by step. loss: of training by step. steps: done.
        gap: by how much the loss on training data lies below that of validation.
        status, why, result: of `result.json`. norm: of every gradient. config: fields.
    """
    loss = loss or falling()
    write_config(folder, **config)
    rows = []
    lr = float(str(config.get("lr", 1e-3)))
    for s in range(steps + 1):
        told = {"val_loss": vals[s], "train_eval_loss": vals[s] - gap} if s in vals else {}
        if s == 0 and not told:
            continue
        trained = {} if s == 0 else {"loss": loss(s), "lr": lr * s / STEPS, "grad_norm": norm}
        rows.append(Row(s, 32 * s, 0.1 * s, **trained, **told))
    file = MetricsFile(folder / "metrics.csv")
    file.append(*rows)
    file.close()
    best = min(vals, key=lambda s: vals[s]) if vals else None
    last = max(vals) if vals else None
    write_result(
        folder, status, **{
            "why": why, "steps": steps, "best_val_loss": None if best is None else vals[best], "best_step": best,
            "final_val_loss": None if last is None else vals[last], "tokens": 32 * steps,
            "final_train_eval_loss": None if last is None else vals[last] - gap, **(result or {}),
        },
    )  # fmt: skip


def sweep(
    folder: Path, runs: Mapping[str, Mapping[str, object]], *, questions: str = "", baseline: str = "base"
) -> Path:
    """A sweep's folder.

    Args:
        folder: its place.
        runs: name -> what `run` takes; `variant` and `changes` beside it.
        questions: the table's lines. baseline: of the sweep.
    """
    entries = []
    for name, options in runs.items():
        told = dict(options)
        variant, changes = told.pop("variant", None), dict(told.pop("changes", {}))  # type: ignore[call-overload]
        status = str(told.get("status", "completed"))
        entries.append(
            {"name": name, "variant": variant, "changes": changes, "status": status, "run_dir": f"runs/{name}"}
        )
        if status not in ("pending", "failed"):
            run(folder / "runs" / name, **{**changes, **told})
        if status == "failed":
            entries[-1]["error"] = "error: out of memory"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(entries), "utf-8")
    spec = (
        f'format = "bytekiln-sweep"\nversion = 1\nquestion = "Why?"\nbaseline = "{baseline}"\n[questions]\n{questions}'
    )
    (folder / "sweep.toml").write_text(spec, "utf-8")
    return folder


def read(folder: Path) -> str:
    return analysis(read_report([folder]))


def seeded(name: str, best: list[float], **options: object) -> dict[str, dict[str, object]]:
    return {
        f"{name},seed={i}": {"variant": name, "changes": {"seed": i}, "vals": {0: 4.0, 40: v}, **options}
        for i, v in enumerate(best, 1)
    }


def test_every_line_of_the_template(tmp_path: Path) -> None:
    """Three seeds: best losses 1.70 1.80 1.90 against 1.82 1.93 2.00, so t = 0.11667 / (0.015275 / √3) = 13.23."""
    runs = seeded("base", [1.7, 1.8, 1.9]) | seeded(
        "no-rope", [1.82, 1.93, 2.0], loss=falling(0.05), gap=0.25, norm=3.0
    )
    text = read(sweep(tmp_path / "s", runs, questions='no-rope = "Does the model need positions? Without them"'))
    conclusion = (
        "Without them the best validation loss is 0.1167 higher than with base (1.9167 against 1.8000): more than "
        "chance, p = 0.0057 over 3 seeds."
    )
    assert f"## Answers\n\n- Does the model need positions? {conclusion}\n" in text
    slope = "+0.0000 ± 0.0000 nats a token per 1,000 steps over the last 10 %"
    template = f"""### no-rope

Does the model need positions?

- Early fall of the loss: slow: 0.1000 in the first 5 steps, 0.50 times the 0.2000 of base
- Converged: yes, as far as the noise tells ({slope}); but its validation loss was lowest at the last step
- Stability: 0 spikes above 3 σ (0.1 by chance), σ 0.0000, largest gradient norm 3, means over the runs
- Validation loss: 1.9167 ± 0.0907 at the end, best 1.9167 ± 0.0907 at step 40
- Training against validation loss: 1.6667 against 1.9167 at the end, gap +0.2500
- Cost: 4.0 s a run, 1,000 tokens a second, 9,000 parameters
- Conclusion: {conclusion}
"""
    assert template in text
    assert "### base\n\n- Early fall of the loss: 0.2000 in the first 5 steps\n" in text
    assert "- Conclusion: this is the baseline.\n" in text
    assert "Partial" not in text and "diverged" not in text and "## Size" not in text


@pytest.mark.parametrize(
    ("base", "other", "sentence"),
    [
        ([2.0], [2.5], "With b the best validation loss is 0.5000 higher than with base (2.5000 against 2.0000): one "
                       "run each cannot tell an effect from noise."),
        ([2.0, 2.2, 2.1], [2.1, 2.0, 2.1], "With b the best validation loss is 0.0333 lower than with base (2.0667 "
                                           "against 2.1000): not distinguishable from noise, p = 0.74 over 3 seeds."),
        ([2.0, 2.01], [1.0, 1.2], "With b the best validation loss is 0.9050 lower than with base (1.1000 against "
                                  "2.0050): far above the spread over seeds, but two seeds are too few to confirm it."),
        ([2.0], [2.0], "With b the best validation loss is that of base to four digits (2.0000): one run each cannot "
                       "tell an effect from noise."),
    ],
)  # fmt: skip
def test_what_a_difference_is_worth(tmp_path: Path, base: list[float], other: list[float], sentence: str) -> None:
    assert f"- Conclusion: {sentence}\n" in read(sweep(tmp_path / "s", seeded("base", base) | seeded("b", other)))


def test_rates_that_diverge_are_results(tmp_path: Path) -> None:
    why = "step 7: found loss nan and gradient norm nan; expected finite numbers"
    runs: dict[str, dict[str, object]] = {
        "lr=1e-3": {"changes": {"lr": 1e-3}, "vals": {0: 4.0, 40: 2.0}},
        "lr=3e-3": {"changes": {"lr": 3e-3}, "vals": {0: 4.0, 40: 1.5}, "norm": 9.0},
        "lr=10": {"changes": {"lr": 10.0}, "vals": {0: 4.0}, "steps": 6, "status": "diverged", "why": why},
    }
    text = read(sweep(tmp_path / "s", runs, baseline="lr=1e-3"))
    assert "1 of 3 variants diverged.\n- lr=10: diverged at step 6 (found loss nan and gradient norm nan)" in text
    limit = "The largest rate that trained is 3e-3, the next one is 10: the limit lies in between. "
    assert limit.strip() in text
    assert "| lr=3e-3 | 0 | 0.1 | 0.0000 | 9 |" in text
    calm = "Most stable by each of these numbers: lr=1e-3. Lowest loss: lr=3e-3, 1.5000."
    assert calm in text
    assert "| lr=10 | diverged | — | — | — | — | 6 |" in text
    assert "- Validation loss: none after the first step\n- Training against validation loss: not measured\n" in text
    assert "- Converged: no: diverged at step 6\n" in text
    assert "- Conclusion: With lr=10 training diverged at step 6.\n" in text


def test_a_variant_of_which_one_seed_diverges(tmp_path: Path) -> None:
    runs = seeded("base", [2.0, 2.1]) | seeded("b", [2.0, 2.2])
    runs["b,seed=2"] |= {"status": "diverged", "steps": 30}
    text = read(sweep(tmp_path / "s", runs))
    assert "- Converged: no: diverged at step 30 in 1 of 2 runs\n" in text
    assert "; it diverged at step 30 in 1 of 2 runs.\n" in text


def test_the_same_effective_batch(tmp_path: Path) -> None:
    def apart(s: int) -> float:
        return falling()(s) + (0.25 if s == 13 else 0.0)

    vals = {0: 4.0, 40: 2.0}
    runs: dict[str, dict[str, object]] = {
        "base": {"variant": "base", "vals": vals, "batch_size": 64, "grad_accum_steps": 1, "dropout": 0.2},
        "accum": {"variant": "accum", "vals": vals, "batch_size": 16, "grad_accum_steps": 4, "dropout": 0.2,
                  "loss": apart, "result": {"tokens_per_s": 1500.0}},
        "exact": {"variant": "exact", "vals": vals, "batch_size": 64, "grad_accum_steps": 1},
        "exact-accum": {"variant": "exact-accum", "vals": vals, "batch_size": 16, "grad_accum_steps": 4,
                        "num_eval_batches": 7, "loss": lambda s: falling()(s) + 2e-7},
        "drift": {"variant": "drift", "vals": vals, "batch_size": 32, "grad_accum_steps": 2,
                  "loss": lambda s: falling()(s) + (0.0625 if s > 30 else 0.0)},
        "other": {"variant": "other", "vals": vals, "batch_size": 16, "grad_accum_steps": 2},
    }  # fmt: skip
    text = read(sweep(tmp_path / "s", runs))
    assert (
        "- base (64 × 1) and accum (16 × 4): both 64 sequences a step. The largest difference of their training losses "
        "in 40 steps is 0.25, at step 13: their dropout masks (0.2) are drawn a micro-step and differ. Final "
        "validation losses: 2.0000 and 2.0000. accum reads 1.50 times as many tokens a second.\n"
    ) in text
    assert (
        "exact-accum (16 × 4): both 64 sequences a step. The largest difference of their training losses in 40 steps "
        in text
    )
    assert ": they coincide, but for rounding." in text and " steps is 2e-07, at step " in text
    drift = "is 0.062, at step 31: up to step 30 they lie within 0.001, from there on what fp32 rounds has grown."
    assert drift in text
    assert text.count("sequences a step. The largest") == 4


def test_overfitting(tmp_path: Path) -> None:
    runs: dict[str, dict[str, object]] = {
        "base": {"variant": "base", "vals": {0: 4.0, 20: 1.6, 40: 2.0}, "gap": 0.75, "dropout": 0.0},
        "dropout": {"variant": "dropout", "vals": {0: 4.0, 20: 1.7, 40: 1.6}, "gap": 0.125, "dropout": 0.2},
    }
    text = read(sweep(tmp_path / "s", runs))
    assert "| base | 1.2500 | 2.0000 | +0.7500 | 1.6000 | 20 | +0.4000 |" in text
    assert (
        "base over-fits: from step 20 on its validation loss rises by 0.4000, and ends 0.7500 above that on training "
        "data. The gap is smallest with dropout, +0.1250, and largest with base, +0.7500."
    ) in text


def test_schedules(tmp_path: Path) -> None:
    """Of 200 steps the first 10 and the last 20: one falls half as fast, and 0.01 a step at the end."""
    vals, long = {0: 4.0, 200: 2.0}, {"steps": 200, "max_steps": 200}
    runs: dict[str, dict[str, object]] = {
        "base": {"variant": "base", "vals": vals, "loss": falling(), "warmup_steps": 0, **long},
        "both": {"variant": "both", "vals": vals, "warmup_steps": 10, **long,
                 "loss": lambda s: falling(0.05)(s) - 0.01 * max(0, s - 180)},
    }  # fmt: skip
    text = read(sweep(tmp_path / "s", runs))
    # The mean of steps 6 to 10 lies 0.1 x 7 below the first; halves of ten steps lie 0.1 apart.
    assert "In the first 10 steps the loss falls most with base, -0.7000." in text
    assert "In the last 20 it falls most with both, -0.1000." in text
    assert "| both | 2.5e-05 to 0.00025 | -0.3500 | 0.0045 to 0.005 | -0.1000 | 2.0000 |" in text


def test_sizes_and_what_a_doubling_brings(tmp_path: Path) -> None:
    runs: dict[str, dict[str, object]] = {
        name: {"variant": name, "vals": {0: 4.0, 40: loss}, "num_layers": layers, "result": {"parameters": size}}
        for name, layers, size, loss in (("large", 4, 8000, 1.5), ("base", 1, 1000, 2.0), ("small", 2, 2000, 1.8))
    }
    text = read(sweep(tmp_path / "s", runs))
    assert "| small | 2 × 16 | 2,000 | 1.8000 | -0.2000 | 1,000 | 4 |" in text
    assert (
        "A doubling of the parameters changes the best validation loss by -0.2000 from base to small and -0.1500 from "
        "small to large. Each further doubling brings less."
    ) in text


def test_batch_sizes_at_the_same_step_and_at_the_same_tokens(tmp_path: Path) -> None:
    runs: dict[str, dict[str, object]] = {
        f"batch_size={n}": {
            "changes": {"batch_size": n}, "vals": {0: 4.0, 20: mid, 40: end},
            "result": {"tokens": 40 * 8 * n, "tokens_per_s": 100.0 * n},
        }
        for n, mid, end in ((4, 3.0, 2.5), (8, 2.75, 2.0))
    }  # fmt: skip
    text = read(sweep(tmp_path / "s", runs, baseline="batch_size=4"))
    assert "| run | sequences a step | steps/s | tokens/s | val at step 40 | val at 1,280 tokens | spikes |" in text
    assert "| batch_size=8 | 8 | 12.5 | 800 | 2.0000 | 2.7500 | 0 |" in text
    assert (
        "batch_size=8 reads most tokens a second, 800. At the same step batch_size=8 has the lowest validation loss, "
        "2.0000. At the same number of tokens batch_size=4 has the lowest validation loss, 2.5000. At the same step a "
        "larger batch has read more text."
    ) in text
    other = "The evaluations read different numbers of windows, 400 with batch_size=4 and 800 with batch_size=8:"
    assert other in text


def test_other_texts_are_compared_in_bits(tmp_path: Path) -> None:
    runs: dict[str, dict[str, object]] = {
        "base": {"variant": "base", "vals": {40: 2.0}, "result": {"final_bits_per_byte": 1.25}},
        "owt": {"variant": "owt", "vals": {40: 5.0}, "val_data": "owt.npy", "vocab_size": 1024,
                "result": {"final_bits_per_byte": 2.0}},
    }  # fmt: skip
    text = read(sweep(tmp_path / "s", runs, questions='owt = "Is web text harder? On it"'))
    assert (
        "- Is web text harder? On it a byte of validation text costs 0.7500 bits more than with base (2.0000 against "
        "1.2500); the losses a token, 5.0000 and 2.0000, are of different texts.\n"
    ) in text
    assert "| owt | 1,024 | 5.0000 | 72.1 % | 2.0000 |" in text  # 5 / ln 1024


def test_a_sweep_that_is_not_done(tmp_path: Path) -> None:
    runs = seeded("base", [2.0]) | seeded("b", [2.1]) | seeded("c", [2.2])
    runs["b,seed=1"]["status"], runs["c,seed=1"]["status"] = "failed", "pending"
    text = read(sweep(tmp_path / "s", runs))
    assert "Partial: 2 of 3 runs have no result that counts: b,seed=1 (failed) and c,seed=1 (pending)." in text
    assert "### b\n\nHas made no step: failed. error: out of memory." in text
    assert "### c\n\nHas made no step: pending." in text


def test_names_do_not_break_tables(tmp_path: Path) -> None:
    run(tmp_path / "a|b", {40: 2.0})
    run(tmp_path / "c", {40: 2.0}, lr=3e-3)
    rows = [line for line in read(tmp_path).splitlines() if line.startswith("| a")]
    assert [(r.count("|"), r[:7]) for r in rows] == [(10, "| a/b |"), (6, "| a/b |")]


def test_questions_of_a_spec() -> None:
    base = {"vocab_size": 61, "d_model": 16, "num_layers": 1, "num_heads": 2, "context_length": 8}
    table = {"base": base, "variant": {"no-rope": {"position": "none"}}, "questions": {"no-rope": "Why? Without"},
             "baseline": "base", "scale": {"cpu": {"baseline": "no-rope"}}}  # fmt: skip
    spec = read_spec(table, "a.toml", "a", Path())
    assert tomllib.loads(to_toml(spec.plain()))["questions"] == {"no-rope": "Why? Without"}
    assert changed(spec, scale="cpu").baseline == "no-rope"
    with pytest.raises(ConfigError, match=r"a.toml: questions: found no-rop; did you mean no-rope\?"):
        read_spec({**table, "questions": {"no-rop": "Why?"}}, "a.toml", "a", Path())
    with pytest.raises(ConfigError, match=r"a.toml: questions: found 'Why'; expected a table"):
        read_spec({**table, "questions": "Why"}, "a.toml", "a", Path())


# --- files --------------------------------------------------------------------------------------------------------


def test_the_end_of_a_sweep_writes_analysis_and_picture(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s", {"base": ("base", {}, 3.0), "b": ("b", {"lr": 3e-3}, 2.5)}, baseline="base")
    said: list[str] = []
    with analysed(folder, said.append):
        pass
    assert said == [f"analysis: {folder}/analysis.md", f"picture: {folder}/comparison.png"]
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "With b the best validation loss is" in (folder / "analysis.md").read_text("utf-8")
    assert analyse_sweep(folder) == [folder / "analysis.md", folder / "comparison.png"]  # written anew


def test_what_goes_wrong_in_it_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    with analysed(tmp_path / "nothing", said.append):
        pass
    assert len(said) == 1 and said[0].startswith(f"analysis: not written: {tmp_path}/nothing: no such folder")
    folder = sweep(tmp_path / "s", seeded("base", [2.0]))

    def broken(_: object) -> str:
        raise ZeroDivisionError("a\nb")

    monkeypatch.setattr("bytekiln.report.build.analysis", broken)
    with analysed(folder, said.append):
        pass
    assert said[1] == "analysis: not written: a"


def test_after_an_interruption_and_not_after_a_refusal(tmp_path: Path) -> None:
    folder = sweep(tmp_path / "s", seeded("base", [2.0]))
    with pytest.raises(ValueError, match="refused"), analysed(folder, print):
        raise ValueError("refused")
    assert not (folder / "analysis.md").exists()
    with pytest.raises(KeyboardInterrupt), analysed(folder, print):
        raise KeyboardInterrupt
    assert (folder / "analysis.md").exists()


def test_the_flag_of_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = sweep(tmp_path / "s", seeded("base", [2.0]) | seeded("b", [2.1]))
    assert cli_run("lm-report", [str(folder), "--analysis"]) == 0
    assert f"analysis: {folder}/analysis.md" in capsys.readouterr().out
    assert cli_run("lm-report", [str(folder), "--analysis"]) == 0  # its own folder: anew each time
    other = tmp_path / "words.md"
    assert cli_run("lm-report", [str(folder), "--analysis", str(other)]) == 0
    assert other.read_text("utf-8") == (folder / "analysis.md").read_text("utf-8")
    assert cli_run("lm-report", [str(folder), "--analysis", str(other)]) == 2
    assert cli_run("lm-report", [str(folder), "--analysis", "words.txt"]) == 2
    assert "--analysis: found words.txt; expected FILE.md" in capsys.readouterr().err
