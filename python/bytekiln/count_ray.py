"""Counting on a Ray cluster that is there already: a task a group of files, their counts files added up here.

In: text files in a folder that the cluster's machines share. Out: `Counts`. Called by `cli_count` for `--ray`.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bytekiln._core import Counts, default_max_memory
from bytekiln.cluster import Answer, answer, connect, gather, has_records, sizes_of
from bytekiln.inputs import Inputs

LEAST_MEMORY = 16 << 20
"""The smallest cap that counting takes."""


def groups(files: Sequence[Path], sizes: Sequence[int], wanted: int) -> list[list[Path]]:
    """Files in `wanted` groups or fewer, of bytes as equal as they come: the largest first, each to the smallest group.

    >>> [[str(p) for p in g] for g in groups([Path("a"), Path("b"), Path("c")], [5, 9, 3], 2)]
    [['b'], ['a', 'c']]
    """
    made: list[tuple[int, list[Path]]] = [(0, []) for _ in range(min(wanted, len(files)))]
    for size, file in sorted(zip(sizes, files, strict=True), key=lambda f: -f[0]):
        least = min(range(len(made)), key=lambda i: made[i][0])
        made[least] = (made[least][0] + size, [*made[least][1], file])
    return [group for _, group in made]


def field_of(group: Sequence[Path], files: Sequence[Path], field: str | None) -> str | None:
    """The field for a group of `files`: none for one without records, which has no use for it and would refuse it.

    >>> files = [Path("a.txt"), Path("b.jsonl.gz")]
    >>> field_of(files[:1], files, "body"), field_of(files[1:], files, "body")
    (None, 'body')
    """
    return field if has_records(group) or not has_records(files) else None


def most_beside(nodes: Sequence[dict[str, Any]], threads: int) -> int:
    """The most tasks of so many threads that one machine runs at a time; several of Ray's nodes may share it.

    >>> nodes = [{"Alive": True, "NodeManagerAddress": a, "Resources": {"CPU": 4.0}} for a in ("10.0.0.1", "10.0.0.1")]
    >>> most_beside([*nodes, {**nodes[0], "Alive": False}], 2)
    4
    """
    tasks: Counter[str] = Counter()
    for node in nodes:
        if node["Alive"]:
            tasks[node["NodeManagerAddress"]] += int(node["Resources"].get("CPU", 0)) // threads
    return max([1, *tasks.values()])


def count_there(
    files: Sequence[str], field: str | None, out: str, settings: dict[str, Any], beside: int
) -> Answer[int]:
    """The task: one counts file. Returns bytes of text.

    Without a cap of its own it takes its part of what one process would, as one of the tasks `beside` each other here.
    """
    cap = settings["max_memory"] or max(default_max_memory() // beside, LEAST_MEMORY)

    def count() -> int:
        counts = Counts.from_files(Inputs(files, field), beside=out, **{**settings, "max_memory": cap})
        return int(counts.save(out)["bytes"])

    return answer(count)


def count_on_cluster(
    files: Sequence[Path],
    field: str | None,
    out: Path,
    settings: dict[str, Any],
    progress: Callable[[str, int, int], object],
) -> Counts:
    """Count files (of records their `field`) on all machines; parts lie beside `out` until they are added up.

    Four tasks a processor, so that a slow machine does not keep the others waiting; each counts on one thread, unless
    `settings` say more, and in an equal share of `max_memory`.

    Raises:
        MissingExtraError, ConfigError, FileError, TextError: as `Counts.from_files`; a task's error is this command's.
    """
    ray = connect()
    sizes = sizes_of(files)
    threads = settings["threads"] or 1
    processors = int(ray.cluster_resources().get("CPU", 1))
    at_once = max(processors // threads, 1)
    cap, beside = settings["max_memory"], most_beside(ray.nodes(), threads)
    task_settings = {**settings, "threads": threads, "max_memory": cap and max(cap // at_once, LEAST_MEMORY)}
    parts = Path(tempfile.mkdtemp(prefix=f".{out.name}.parts-", dir=out.parent))
    try:
        task = ray.remote(num_cpus=threads, max_retries=2)(count_there)
        made = [(parts / f"{i}.counts", group) for i, group in enumerate(groups(files, sizes, 4 * at_once))]
        tasks = [
            task.remote(
                [str(f.resolve()) for f in group],
                field_of(group, files, field),
                str(part.resolve()),
                task_settings,
                beside,
            )
            for part, group in made
        ]
        gather(ray, tasks, lambda done: progress("count", sum(done), sum(sizes)))
        # Read as streams until the sum is written: the files may lose their names.
        return Counts.load([part for part, _ in made], max_memory=cap, beside=out)
    finally:
        shutil.rmtree(parts, ignore_errors=True)
