"""Encoding on a Ray cluster that is there already: a task a part of the inputs, their files joined here.

In: inputs in a folder that the cluster's machines share. Out: the token file that one process would write. Called by
`encode_flags` for `--ray`.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bytekiln import _core, errors
from bytekiln.atomic import AtomicFile
from bytekiln.cluster import connect
from bytekiln.errors import BytekilnError, ConfigError, FileError
from bytekiln.inputs import Inputs
from bytekiln.tokens.files import NPY_HEADER, file_name, is_orphan, npy_header

POLL_S = 0.2
LEAST_PART = 1 << 20
"""Bytes of input below which no task is worth while."""
BLOCK = 1 << 20
Part = tuple[Path, dict[str, Any]]


def encode_there(
    tokenizer: _core.Tokenizer, inputs: Inputs, out: str, settings: dict[str, Any], part: tuple[int, int]
) -> tuple[dict[str, Any], str, str]:
    """The task: one part of the inputs. Returns its manifest, or the kind of error and its words."""
    try:
        ((_, manifest),), _ = _core.encode_files(tokenizer, inputs, out, part=part, **settings)
        return manifest, "", ""
    except BytekilnError as exc:
        return {}, type(exc).__name__, str(exc)


def encode_on_cluster(
    tokenizer: _core.Tokenizer,
    inputs: Inputs,
    out: Path,
    settings: dict[str, Any],
    progress: Callable[[str, int, int], object],
    *,
    index: bool = False,
) -> Part:
    """Encode on all machines; parts lie beside `out` until they are joined.

    Four tasks a processor, so that a slow machine does not keep the others waiting; each on one thread, unless
    `settings` say more. A task that was killed is started again and goes on where it was.

    Raises:
        MissingExtraError, ConfigError, FileError, TextError, FormatError: as `encode_files`; a task's error is this
        command's.
    """
    ray = connect()
    files = _core.find_inputs(inputs)
    for file in files:
        if not file.is_file():
            raise FileError(f"{file}: no such file; expected a file that every machine of the cluster sees")
    size = sum(file.stat().st_size for file in files)
    threads = settings["threads"] or 1
    at_once = max(int(ray.cluster_resources().get("CPU", 1)) // threads, 1)
    count = max(min(4 * at_once, size // LEAST_PART), 1)
    field = inputs.field if _has_records(files) else None
    there = inputs._replace(paths=[str(f.resolve()) for f in files], field=field)
    task_settings = {**settings, "threads": threads, "overwrite": True, "index": index}
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.parts-", dir=out.parent))
    try:
        task = ray.remote(num_cpus=threads, max_retries=2)(encode_there)
        paths = [folder / f"{i:05}.npy" for i in range(count)]
        refs = [
            task.remote(tokenizer, there, str(path.resolve()), task_settings, (i, count))
            for i, path in enumerate(paths, 1)
        ]
        waiting, made = refs, {}
        try:
            while waiting:
                ready, waiting = ray.wait(waiting, timeout=POLL_S)
                for ref in ready:
                    manifest, kind, said = ray.get(ref)
                    if kind:
                        raise _error(kind, said)
                    made[ref] = manifest
                progress("encode", size * len(made) // count, size)
        finally:
            for task_left in waiting:
                ray.cancel(task_left, force=True)
        parts = [(path, made[ref]) for path, ref in zip(paths, refs, strict=True)]
        return join(parts, files, out, overwrite=settings["overwrite"])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def join(parts: Sequence[Part], files: Sequence[Path], out: Path, *, overwrite: bool) -> Part:
    """The token file of which these, each a `.npy` with its manifest, are all parts in order; `files` are their inputs.

    Ids are copied in blocks; inputs that were divided are read once more for their checksums.
    """
    manifests = [manifest for _, manifest in parts]
    made = {**manifests[0], "file": file_name(out)}
    made["tokens"], made["text_bytes"] = (sum(m[field] for m in manifests) for field in ("tokens", "text_bytes"))
    # A document that goes on in the next part is counted there.
    made["documents"] = sum(m["documents"] - m["part"]["open"] for m in manifests[:-1]) + manifests[-1]["documents"]
    made["max_id"] = max((m["max_id"] for m in manifests if m["max_id"] is not None), default=None)
    made["sources"] = _sources(manifests, files)
    for field in ("part", "document_ends", "created_by"):
        made.pop(field, None)
    replace, head = overwrite or is_orphan(out), NPY_HEADER if out.suffix != ".bin" else 0
    ends_path = out.with_name(out.name + ".documents.npy")
    has_ends = any("document_ends" in m for m in manifests) and made["documents"] > 0
    with (
        AtomicFile(out.with_name(out.name + ".json"), overwrite=replace) as side,
        AtomicFile(ends_path, overwrite=replace) as ends_file,
        AtomicFile(out, overwrite=overwrite) as ids,
    ):
        ids.write(npy_header(made["dtype"], made["tokens"])[:head])
        for path, _ in parts:
            with path.open("rb") as file:
                file.seek(NPY_HEADER)
                while block := file.read(BLOCK):
                    ids.write(block)
        ids.sync()
        made["checksum"] = _core.payload_checksum(ids.partial, head)
        if has_ends:
            ends_file.write(npy_header("int64", made["documents"]))
            _write_ends(parts, made["tokens"], ends_file)
            ends_file.sync()
            checksum = _core.payload_checksum(ends_file.partial, 0)
            made["document_ends"] = {"file": file_name(ends_path), "checksum": checksum}
        made["created_by"] = manifests[0]["created_by"]
        side.write((json.dumps(made, indent=2, ensure_ascii=False) + "\n").encode())
        side.commit()
        if has_ends:
            ends_file.commit()
        ids.commit()
    return out, made


def _write_ends(parts: Sequence[Part], tokens: int, file: AtomicFile) -> None:
    """Ends of documents, each written once it is known that it is one and where."""
    import numpy as np

    begin, last = 0, None
    for path, manifest in parts:
        if "document_ends" in manifest:
            ends = np.load(path.with_name(manifest["document_ends"]["file"])).astype("<i8") + begin
            # What the part ends with is white space before the next document, or not the end of one.
            ends[-1] -= manifest["part"]["tail"]
            kept = ends[:-1] if manifest["part"]["open"] and path != parts[-1][0] else ends
            if len(kept):
                if last is not None:
                    file.write(last)
                file.write(kept[:-1].tobytes())
                last = kept[-1:].tobytes()
        begin += manifest["tokens"]
    file.write(np.array([tokens], "<i8").tobytes())


def _sources(manifests: Sequence[dict[str, Any]], files: Sequence[Path]) -> list[dict[str, Any]]:
    """The inputs, whole; those that were divided are joined."""
    made: list[dict[str, Any]] = []
    divided = set()
    for source in (source for m in manifests for source in m["sources"]):
        if source.get("offset"):
            made[-1]["bytes"] += source["bytes"]
        else:
            made.append({k: v for k, v in source.items() if k != "offset"})
        if "offset" in source:
            divided.add(len(made) - 1)
    for number in divided:
        made[number]["checksum"] = _core.payload_checksum(files[number])
    return made


def _has_records(files: Sequence[Path]) -> bool:
    names = (f.with_suffix("") if f.suffix.lower() in (".gz", ".zst", ".xz", ".bz2") else f for f in files)
    return any(name.suffix.lower() in (".jsonl", ".ndjson", ".parquet") for name in names)


def _error(kind: str, said: str) -> BytekilnError:
    made: BytekilnError = getattr(errors, kind, ConfigError)(said)
    return made
