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
        "parquet",
        "sweep.detach",
        "score.paired",
        "report.curves",
        "report.places",
        "report.rows",
        "report.stability",
        "student",
        "score.tasks",
        "tokens.files",
        "tokens.llmc",
        "tokens.megatron",
    ],
    ["console", "inputs", "search.rate_fit", "tokens.mapping", "tokens.targets"],
    ["section", "tokenfile"],
    ["model_config", "training_config", "sweep.journal"],
    ["fields"],
    ["config", "known", "tokenizer"],
    ["__init__", "inspect.documents", "inspect.ratio", "inspect.scripts", "stack.rules", "sweep.axes"],
    ["atomic", "inspect.compression", "batch_search", "search.plan", "search.verdict", "sweep.model", "sweep.table"],
    [
        "characters",
        "bpe_flags",
        "cluster",
        "score.records",
        "search.stages",
        "search.transfer",
        "sweep.spec",
        "tokens.join",
    ],
    [
        "characters_file",
        "tokenizer_flags",
        "tokens.convert",
        "count_ray",
        "encode_ray",
        "metrics",
        "inspection",
        "inspect.pieces",
        "inspect.tables",
        "kernels",
        "hardware",
        "accounting",
        "yardstick",
        "schedule",
        "ranks",
        "guard",
        "bundle",
    ],
    [
        "linear",
        "encode_flags",
        "tokenizer_diff",
        "inspect.page",
        "inspect.show",
        "tokens.command",
        "tokens.join_command",
        "sweep.locks",
        "sweep.ready",
        "sweep.results",
    ],
    [
        "attention",
        "block",
        "norms",
        "positions",
        "muon",
        "averaging",
        "loss",
        "batch",
        "windows",
        "overlap",
        "layer_warnings",
        "run_state",
        "report.runs",
        "search.files",
        "sweep.process",
        "sweep.progress",
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
        "report.groups",
        "sweep.folder",
        "sweep.move",
        "sweep.ray",
        "experiments.figures",
    ],
    [
        "sources",
        "objective",
        "checkpoint",
        "result",
        "hf_config",
        "hf_weights",
        "report.facts",
        "report.rates",
        "score.shared_prefix",
        "sweep.view",
        "experiments.lr_search",
    ],
    [
        "data",
        "convert",
        "sample",
        "sweep.adopt",
        "report.contrasts",
        "report.data",
        "report.model",
        "stack.model",
        "sweep.ledger",
        "entry",
    ],
    [
        "evaluate",
        "prepare",
        "samples_file",
        "footprint",
        "horizon",
        "report.analysis",
        "report.pictures",
        "report.tables",
        "score.scorer",
        "sweep.coordinate",
    ],
    ["learner", "runfolder", "score.choices", "report.sections", "score.overlap", "score.text"],
    ["record", "rehearsal", "validation", "search.bare_run", "score.harness", "report.html", "score.runs"],
    ["loop", "plan", "profiling", "search.range_test", "experiments.hellaswag"],
    ["train", "report.build", "demo_text", "sampling", "run_flags", "search.picture", "search.runs", "stack.run"],
    [
        "cli_bpe",
        "cli_count",
        "cli_inspect",
        "cli_train",
        "cli_lm",
        "cli_plan",
        "demo",
        "cli_report",
        "cli_score",
        "search.asked",
        "sweep.asked",
        "stack.command",
        "experiments.exp9",
    ],
    ["cli_search", "experiments.catalogue"],
    ["cli_sweep"],
    ["cli"],
]
"""From the ground up. Modules of one floor never import each other."""
FLOOR = {module: floor for floor, modules in enumerate(FLOORS) for module in modules}


def dotted(path: Path) -> str:
    """The name of a module below the package: `sweep.spec`."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = sorted(dotted(p) for p in PACKAGE.rglob("*.py"))
ROOMS = sorted(p.parent.name for p in PACKAGE.glob("*/__init__.py"))
"""The sub-packages. Their `__init__` is a sentence and imports nothing: no module pays for another."""


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
            if node.module == "bytekiln" or names[0].removeprefix("bytekiln.") in ROOMS:
                inner = [f"{node.module}.{a.name}" for a in node.names]
                names = [name if name.removeprefix("bytekiln.") in FLOOR else str(node.module) for name in inner]
        for name in names:
            head, _, rest = name.partition(".")
            if head == "bytekiln":
                found.add((node.lineno, rest or "__init__"))
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_itself_imports_nothing(room: str) -> None:
    assert len(ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8")).body) == 1


@pytest.mark.parametrize("module", [m for m in MODULES if m.removesuffix(".__init__") not in ROOMS])
def test_imports_go_down(module: str) -> None:
    assert module in FLOOR, f"{module} has no floor yet; give it one in FLOORS and in CONTRIBUTING.md"
    for line, other in sorted(imports((PACKAGE / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))):
        assert other in FLOOR, f"{module}.py:{line}: imports {other}, which has no floor"
        assert FLOOR[other] < FLOOR[module], (
            f"{module}.py:{line}: floor {FLOOR[module]} imports {other} of floor {FLOOR[other]}"
        )


def test_the_walk_sees_hidden_imports() -> None:
    source = (
        "def f():\n    if True:\n        from bytekiln import train, Tokenizer\n        import bytekiln.model as m\n"
        "        from bytekiln.sweep import axes\n        from bytekiln.sweep.spec import Trial\n"
    )
    assert imports(source) == {(3, "train"), (3, "__init__"), (4, "model"), (5, "sweep.axes"), (6, "sweep.spec")}


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
        ("import bytekiln.report.build", ("torch",)),
        ("import bytekiln.cli_lm", ("torch",)),
        ("import bytekiln.cli_sweep, bytekiln.cli_search", ("torch", "matplotlib", "optuna", "ray")),
        ("import bytekiln.cli_score, bytekiln.cli_report", HEAVY),
        ("import bytekiln.experiments.catalogue", ("torch", "matplotlib")),
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
