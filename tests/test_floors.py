"""The house keeps its floors: a module imports only from lower ones, and light things stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import bytekiln

PACKAGE = Path(bytekiln.__file__).parent

FLOORS = [
    ["errors", "signals"],
    [
        "_core",
        "detach",
        "paired",
        "report_curves",
        "report_places",
        "report_rows",
        "search_plan",
        "stability",
        "student",
        "tasks",
    ],
    ["console", "rate_fit"],
    ["section", "tokenfile"],
    ["model_config", "training_config", "sweep_journal"],
    ["fields"],
    ["config", "tokenizer"],
    ["__init__", "stack_rules", "sweep_axes"],
    ["atomic", "search", "sweep_model", "sweep_table", "transfer"],
    ["characters", "bpe_flags", "score_records", "sweep_spec"],
    ["characters_file", "metrics", "inspection", "hardware", "accounting", "schedule", "ranks", "guard", "bundle"],
    ["kernels", "sweep_results"],
    [
        "attention",
        "muon",
        "averaging",
        "loss",
        "batch",
        "windows",
        "overlap",
        "layer_warnings",
        "run_state",
        "report_runs",
        "search_files",
        "sweep_process",
        "sweep_progress",
    ],
    [
        "model",
        "optim",
        "packing",
        "corruption",
        "prefetch",
        "preview",
        "tracking",
        "layer_stats",
        "report_groups",
        "sweep_folder",
        "sweep_ray",
    ],
    [
        "sources",
        "objective",
        "checkpoint",
        "result",
        "hf_config",
        "hf_weights",
        "report_rates",
        "shared_prefix",
        "sweep_view",
    ],
    ["data", "convert", "sample", "adopt", "report_data", "report_model", "stack_model", "sweep"],
    ["evaluate", "prepare", "samples_file", "footprint", "horizon", "report_pictures", "report_tables", "scores"],
    ["learner", "runfolder", "choices", "report_sections", "score_overlap", "score_text"],
    ["record", "plan", "validation", "bare_run", "harness", "report_html", "score_runs"],
    ["train", "range_test"],
    ["report", "demo_text", "sampling", "run_flags", "search_picture", "search_runs", "stack_run"],
    ["cli_bpe", "cli_lm", "cli_plan", "demo", "cli_report", "cli_score", "search_asked", "stack"],
    ["cli_search", "cli_sweep"],
    ["cli"],
]
"""From the ground up. Modules of one floor never import each other."""
FLOOR = {module: floor for floor, modules in enumerate(FLOORS) for module in modules}
MODULES = sorted(p.stem for p in PACKAGE.glob("*.py"))


def imports(source: str) -> set[tuple[int, str]]:
    """(line, module of the package) of every import anywhere in `source`, in functions and `if` blocks too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            names = [node.module or ""]
            if node.module == "bytekiln":
                names = [f"bytekiln.{a.name}" if a.name in FLOOR else "bytekiln" for a in node.names]
        for name in names:
            head, _, rest = name.partition(".")
            if head == "bytekiln":
                found.add((node.lineno, rest.split(".")[0] or "__init__"))
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module: str) -> None:
    assert module in FLOOR, f"{module} has no floor yet; give it one in FLOORS and in CONTRIBUTING.md"
    for line, other in sorted(imports((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))):
        assert other in FLOOR, f"{module}.py:{line}: imports {other}, which has no floor"
        assert FLOOR[other] < FLOOR[module], (
            f"{module}.py:{line}: floor {FLOOR[module]} imports {other} of floor {FLOOR[other]}"
        )


def test_the_walk_sees_hidden_imports() -> None:
    source = (
        "def f():\n    if True:\n        from bytekiln import train, Tokenizer\n        import bytekiln.model as m\n"
    )
    assert imports(source) == {(3, "train"), (3, "__init__"), (4, "model")}


HEAVY = ("torch", "pydantic", "matplotlib", "tokenizers")


def loaded_after(code: str, names: tuple[str, ...]) -> set[str]:
    """Which of `names` a fresh Python has loaded after running `code`."""
    run = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print([n for n in {names!r} if n in sys.modules])"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(ast.literal_eval(run.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("import bytekiln", (*HEAVY, "numpy", "rich")),
        ("import bytekiln.cli, bytekiln.console, bytekiln.cli_bpe", (*HEAVY, "numpy", "rich")),
        ("import bytekiln.demo", (*HEAVY, "numpy", "rich")),
        ("import bytekiln.tokenfile, bytekiln.tokenizer", (*HEAVY, "rich")),
        ("import bytekiln.report", ("torch",)),
        ("import bytekiln.cli_lm", ("torch",)),
    ],
)
def test_light_imports(code: str, names: tuple[str, ...]) -> None:
    assert loaded_after(code, names) == set()


def test_tokenizer_commands_never_load_the_heavy_packages(corpus: Path, tmp_path: Path) -> None:
    code = f"""
from bytekiln.cli import main
main(["bpe-train", {str(corpus)!r}, "--vocab-size", "300", "--out", {str(tmp_path / "t.json")!r}])
main(["bpe-encode", {str(corpus)!r}, "--tokenizer", {str(tmp_path / "t.json")!r}, "--out", {str(tmp_path / "t.npy")!r}])
main(["bpe-inspect", {str(tmp_path / "t.json")!r}, "--text", {str(corpus)!r}])
"""
    assert loaded_after(code, HEAVY) == set()
