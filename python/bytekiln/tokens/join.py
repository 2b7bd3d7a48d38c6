"""The parts that several processes have written (`bpe-encode --part i/n`) as the one file that one process writes.

In: token files with manifests that say which part they are. Out: ids, ends of documents, a manifest. Called by
`tokens.join_command` and, for `--ray`, by `encode_ray`. numpy is loaded only where ends of documents are joined.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bytekiln import _core
from bytekiln.atomic import AtomicFile, in_our_words
from bytekiln.errors import FileError, FormatError, MismatchError
from bytekiln.tokens.files import NPY_HEADER, NPY_MAGIC, file_name, is_orphan, npy_header

BLOCK = 1 << 20
"""Bytes of ids, or ends of documents, in memory at a time."""
BYTES = {"uint16": 2, "uint32": 4}
SAME = ("dtype", "tokenizer_hash", "vocab_size", "eot_id", "split", "created_by")
"""What all parts of one text have in common."""
LAST = ("split", "created_by")
"""What stands behind the ends of documents, as the core writes it."""
Part = tuple[Path, dict[str, Any]]


def read_parts(paths: Sequence[Path]) -> list[Part]:
    """All parts of one encoding, in their order, whatever the order of `paths`; each is what its manifest says.

    Reads every file once, for its checksum.

    Raises:
        FileError: a file or its manifest is missing.
        FormatError: a manifest that is none, or of no part.
        MismatchError: a part is missing, there twice, damaged, or of other text, another tokenizer, split,
            type or other settings.
    """
    parts = sorted(((path, manifest_of(path)) for path in paths), key=lambda part: part[1]["part"]["number"])
    (first, about) = parts[0]
    count = about["part"]["of"]
    said: dict[str, tuple[str, Path]] = {}
    for path, manifest in parts:
        for field in ("of", *SAME):
            found, expected = (m["part"]["of"] if field == "of" else m.get(field) for m in (manifest, about))
            if found != expected:
                name = "parts" if field == "of" else field
                raise MismatchError(f"{path}.json: found {name} {found}; expected {expected}, as {first}.json has it")
        for name, setting in manifest["part"].get("settings", {}).items():  # older manifests have none
            expected, who = said.setdefault(name, (setting, path))
            if setting != expected:
                raise MismatchError(
                    f"{path}.json: was made with {name} {setting}; expected {expected}, as {who}.json has it"
                )
    numbers = [manifest["part"]["number"] for _, manifest in parts]
    for (one, _), (two, _), number, after in zip(parts, parts[1:], numbers, numbers[1:], strict=False):
        if number == after:
            raise MismatchError(f"{two}: is part {number}/{count}, as {one} is; expected each part once")
    if missing := sorted(set(range(1, count + 1)) - set(numbers)):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise MismatchError(
            f"part {missing[0]}/{count}: found no file of it{more} among {len(parts)}; expected all {count} parts"
        )
    indexed = [(path, "document_ends" in m) for path, m in parts if m["documents"]]
    for path, has_ends in indexed:
        if has_ends != indexed[0][1]:
            raise MismatchError(
                f"{path}.json: found {'' if has_ends else 'no '}document_ends, unlike {indexed[0][0]}.json; "
                "expected --index with all parts, or with none"
            )
    _joined_sources(parts)
    for path, manifest in parts:
        verify(path, manifest)
    return parts


def manifest_of(path: Path) -> dict[str, Any]:
    """The manifest of a part.

    Raises:
        FileError, FormatError: there is none, or one of something else.
    """
    side = path.with_name(path.name + ".json")
    try:
        manifest = json.loads(side.read_bytes())
    except OSError as error:
        raise in_our_words(side, error) from None
    except ValueError as error:
        raise FormatError(f"{side}: {error}; expected the manifest of a token file") from None
    if not isinstance(manifest, dict) or (manifest.get("format"), manifest.get("version")) != ("bytekiln-tokens", 1):
        raise FormatError(f"{side}: not a manifest of a token file; expected one of version 1")
    if "shards" in manifest or "shard" in manifest:
        raise FormatError(f"{path}: is in shards, which need no joining; expected parts made without --shard-tokens")
    if "part" not in manifest:
        raise FormatError(f"{side}: is no part of an encoding; expected token files made by: bpe-encode --part I/N")
    if not _is_whole(manifest):
        raise FormatError(f"{side}: found part {manifest['part']!r}; expected the manifest as bpe-encode wrote it")
    return manifest


def _is_whole(manifest: dict[str, Any]) -> bool:
    """Whether it has all that is read of it here, of the types that `bpe-encode` writes."""
    try:
        part, ends, sources = manifest["part"], manifest.get("document_ends"), manifest["sources"]
        numbers = [part["number"], part["of"], part["tail"], part["open"], manifest["tokens"], manifest["documents"]]
        numbers += [manifest["text_bytes"], manifest["max_id"] or 0]
        numbers += [n for source in sources for n in (source["bytes"], source.get("offset") or 0)]
        texts = [manifest["checksum"], manifest["created_by"], *(source["name"] for source in sources)]
        texts += [ends["file"], ends["checksum"]] if ends is not None else []
        texts += [text for setting in part.get("settings", {}).items() for text in setting]
        return (
            manifest["dtype"] in BYTES
            and all(isinstance(n, int) and n >= 0 for n in numbers)
            and all(isinstance(text, str) for text in texts)
            and 1 <= part["number"] <= part["of"]
        )
    except (KeyError, TypeError, AttributeError):
        return False


def verify(path: Path, manifest: dict[str, Any]) -> None:
    """Compare a part with its manifest: length and checksum of the ids, and of the ends of documents.

    Raises:
        FileError: it is missing.
        MismatchError: it is another one.
    """
    try:
        found, expected = path.stat().st_size, manifest["tokens"] * BYTES[manifest["dtype"]]
        with path.open("rb") as file:
            head = NPY_HEADER if file.read(len(NPY_MAGIC)) == NPY_MAGIC and found >= NPY_HEADER else 0
    except OSError as error:
        raise in_our_words(path, error) from None
    if found - head != expected:
        raise MismatchError(
            f"{path}: holds {found - head} bytes of ids; expected {expected}, as its manifest {path.name}.json says"
        )
    _same_checksum(path, head, manifest["checksum"], f"{path.name}.json")
    if "document_ends" in manifest:
        ends = manifest["document_ends"]
        side = path.with_name(str(ends["file"]))
        if not side.is_file() or side.parent != path.parent:
            raise FileError(f"{side}: no such file; expected the ends of documents, as {path.name}.json says")
        _same_checksum(side, 0, ends["checksum"], f"{path.name}.json")


def _same_checksum(path: Path, offset: int, expected: str, who: str) -> None:
    if (found := _core.payload_checksum(path, offset)) != expected:
        raise MismatchError(f"{path}: checksum {found}; expected {expected}, as its manifest {who} says")


def join(
    parts: Sequence[Part],
    files: Sequence[Path] | None,
    ids: AtomicFile,
    *,
    overwrite: bool,
    progress: Callable[[int], object] = lambda done: None,
) -> Part:
    """The token file of which these are all parts, in order.

    Args:
        parts: from `read_parts`, or known to be as good.
        files: all inputs, in order; those that were divided are read once more for their checksums. None: the manifest
            names their pieces instead.
        ids: the file to write, nothing of it written; it gets its name here. `.bin` is raw, as everywhere.
        overwrite: replace what is there.
        progress: called with the bytes of ids that are written.

    Raises:
        MismatchError: `files` are not what the parts were made of.
        FileError, OutputExistsError: as `AtomicFile`.
    """
    manifests, out = [manifest for _, manifest in parts], ids.path
    made = {**manifests[0], "file": file_name(out)}
    made["tokens"], made["text_bytes"] = (sum(m[field] for m in manifests) for field in ("tokens", "text_bytes"))
    # A document that goes on in the next part is counted there.
    made["documents"] = sum(m["documents"] - m["part"]["open"] for m in manifests[:-1]) + manifests[-1]["documents"]
    made["max_id"] = max((m["max_id"] for m in manifests if m["max_id"] is not None), default=None)
    pieces = [source for m in manifests for source in m["sources"]]
    made["sources"] = pieces if files is None else _whole(parts, files)
    for field in ("part", "document_ends", *LAST):
        made.pop(field, None)
    replace, head = overwrite or is_orphan(out), NPY_HEADER if out.suffix != ".bin" else 0
    ends_path = out.with_name(out.name + ".documents.npy")
    has_ends = any("document_ends" in m for m in manifests) and made["documents"] > 0
    with (
        AtomicFile(out.with_name(out.name + ".json"), overwrite=replace) as side,
        AtomicFile(ends_path, overwrite=replace) as ends_file,
    ):
        ids.write(npy_header(made["dtype"], made["tokens"])[:head])
        done = 0
        for path, manifest in parts:
            with path.open("rb") as file:
                file.seek(-manifest["tokens"] * BYTES[made["dtype"]], 2)
                while block := file.read(BLOCK):
                    ids.write(block)
                    done += len(block)
                    progress(done)
        ids.sync()
        made["checksum"] = _core.payload_checksum(ids.partial, head)
        if has_ends:
            ends_file.write(npy_header("int64", made["documents"]))
            _write_ends(parts, made["tokens"], ends_file)
            ends_file.sync()
            checksum = _core.payload_checksum(ends_file.partial, 0)
            made["document_ends"] = {"file": file_name(ends_path), "checksum": checksum}
        made |= {field: manifests[0][field] for field in LAST if field in manifests[0]}
        side.write((json.dumps(made, indent=2, ensure_ascii=False) + "\n").encode())
        side.commit()
        if has_ends:
            ends_file.commit()
        ids.commit()
    if overwrite and not has_ends:
        ends_path.unlink(missing_ok=True)  # those of the output that was replaced
    return out, made


def _write_ends(parts: Sequence[Part], tokens: int, file: AtomicFile) -> None:
    """Ends of documents, each written once it is known that it is one and where."""
    import numpy as np

    begin, last = 0, None
    for path, manifest in parts:
        if "document_ends" in manifest:
            ends = np.load(path.with_name(manifest["document_ends"]["file"]), mmap_mode="r")
            # What the part ends with may be no end of a document, or white space before the next one.
            kept = len(ends) - (manifest["part"]["open"] and path != parts[-1][0])
            for at in range(0, kept, BLOCK):
                block = ends[at : min(at + BLOCK, kept)].astype("<i8") + begin
                if at + len(block) == len(ends):
                    block[-1] -= manifest["part"]["tail"]
                if last is not None:
                    file.write(last)
                file.write(block[:-1].tobytes())
                last = block[-1:].tobytes()
        begin += manifest["tokens"]
    file.write(np.array([tokens], "<i8").tobytes())


def _joined_sources(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """The inputs, those that were divided in one; `offset` marks them.

    Raises:
        MismatchError: a part does not begin where the one before it ends.
    """
    made: list[dict[str, Any]] = []
    for path, manifest in parts:
        for number, source in enumerate(manifest["sources"]):
            offset = source.get("offset") or 0
            before = made[-1] if made and number == 0 and "offset" in made[-1] else None
            if offset and (before is None or (before["name"], before["bytes"]) != (source["name"], offset)):
                ends = f"{before['name']} up to byte {before['bytes']}" if before else "no part of a file"
                raise MismatchError(
                    f"{path}.json: begins at byte {offset} of {source['name']}, and the part before it ends with "
                    f"{ends}; expected parts of the same inputs, unchanged"
                )
            if offset:
                made[-1]["bytes"] += source["bytes"]
            else:
                made.append(dict(source))
    return made


def _whole(parts: Sequence[Part], files: Sequence[Path]) -> list[dict[str, Any]]:
    """The inputs, whole, with checksums.

    Raises:
        MismatchError: these files are not they.
    """
    made = _joined_sources(parts)
    names, expected = [file_name(f) for f in files], [source["name"] for source in made]
    if names != expected:
        at = next(
            (n for n, (a, b) in enumerate(zip(names, expected, strict=False)) if a != b), min(len(names), len(made))
        )
        found, wanted = ((those[at] if at < len(those) else "no file") for those in (names, expected))
        raise MismatchError(f"input {at + 1}: found {found}; expected {wanted}, which the parts were made of")
    for file, source in zip(files, made, strict=True):
        if "offset" not in source:
            continue
        del source["offset"]
        if (size := file.stat().st_size) != source["bytes"]:
            raise MismatchError(f"{file}: found {size} bytes; expected {source['bytes']}, as the parts were made of it")
        source["checksum"] = _core.payload_checksum(file)
    return made
