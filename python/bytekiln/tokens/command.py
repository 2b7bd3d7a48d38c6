"""`bpe-encode convert IN OUT`: a token file of any format that we read, in any that we write.

In: command-line arguments. Out: the files, a summary on stdout. Called by `cli_bpe`.
"""

from __future__ import annotations

import time
from argparse import ArgumentTypeError
from collections.abc import Sequence
from pathlib import Path

from bytekiln.bpe_flags import check_output, output
from bytekiln.console import Parser, Progress, counted, human_bytes, human_time, notice, table
from bytekiln.errors import ConfigError
from bytekiln.tokenfile import TokenFile
from bytekiln.tokenizer_flags import add_tokenizer_flags, tokenizer_of
from bytekiln.tokens.convert import Converted, convert
from bytekiln.tokens.targets import TYPES, kind_of, outputs

RAW_TYPES = ("uint16", "uint32", "int32", "int64")
NAMES = {"npy": ".npy", "bin": "no header", "llmc": "llm.c", "megatron": "Megatron"}
ALL_TYPES = ("uint16", "uint32", "int32", "int64", "uint8", "int8", "int16")


def token_id(text: str) -> int:
    """An id: a whole number from 0."""
    value = int(text)
    if value < 0:
        raise ArgumentTypeError(f"found {text}; expected a whole number from 0")
    return value


def command(argv: Sequence[str]) -> int:
    """`bpe-encode convert`."""
    parser = Parser(
        "bpe-encode convert",
        usage="bpe-encode convert IN OUT [--to npy|bin|llmc|megatron] [flags]",
        description="Write a token file in another format or type: the same ids, where documents end, a manifest. "
        "IN is told by its first bytes: .npy, llm.c's and modded-nanogpt's .bin, Megatron's .bin beside its .idx, or "
        "ids without a header, as nanoGPT and OLMo have them.",
        examples=[
            "bpe-encode convert fineweb_train_000001.bin train.npy --tokenizer gpt2.json   # llm.c, modded-nanogpt",
            "bpe-encode convert openwebtext/train.bin train.npy --data-dtype uint16 --eot-id 50256       # nanoGPT",
            "bpe-encode convert corpus_text_document.idx train.npy --vocab-path vocab.json --merges-path merges.txt",
            "bpe-encode convert train.npy train.bin --to llmc         # magic 20240520, or 20240801 for uint32",
            "bpe-encode convert train.npy train_text_document.idx     # Megatron: writes .bin and .idx",
        ],
    )
    add = parser.add_argument
    add("source", type=Path, metavar="IN", help="a token file")
    add("out", type=output, metavar="OUT", help="the file to write; of Megatron's two files either")
    add("--to", choices=tuple(TYPES), help="format of OUT (default by its suffix: .npy, .bin is headerless, .idx)")
    add("--dtype", choices=ALL_TYPES, help="type of the ids in OUT (default: uint16 when the vocabulary fits, or IN's)")
    add(
        "--data-dtype",
        "--from-dtype",
        choices=RAW_TYPES,
        help="type of the ids in IN, if it has neither header nor manifest",
    )
    add_tokenizer_flags(parser)
    add("--eot-id", type=token_id, metavar="N", help="the id that ends documents, where no tokenizer is at hand")
    add("--overwrite", action="store_true", help="replace an existing output")
    args = parser.parse_intermixed_args(argv)

    kind = kind_of(args.out, args.to)
    named = args.tokenizer or args.vocab_path or args.merges_path
    tokenizer = tokenizer_of(args, parser) if named else None
    if tokenizer is None and (args.special_token or args.pattern):
        parser.error("--special-token and --pattern without --tokenizer; expected both, or neither")
    source = TokenFile.open(args.source, dtype=args.data_dtype)
    _check_type(source, args.data_dtype)
    read = [args.source, source.path, source.path.with_name(source.path.name + ".json")]
    read += [source.index.path] if source.index is not None else []
    read += [p for p in (args.tokenizer, args.vocab_path, args.merges_path) if p]
    ids, ends = outputs(args.out, kind)
    for path in (ids, *((ends,) if kind == "megatron" else ())):
        check_output(path, read, overwrite=args.overwrite, flag="OUT")
    start = time.perf_counter()
    with Progress("converting", source.array.nbytes, "bytes") as bar:
        done = convert(
            source,
            args.out,
            to=kind,
            dtype=args.dtype,
            tokenizer=tokenizer,
            eot_id=args.eot_id,
            overwrite=args.overwrite,
            progress=lambda done, _: bar.update(done),
        )
    for line in done.notices:
        notice(line)
    written = f"{ids} and {ends}" if kind == "megatron" else str(ids)
    print(f"wrote {written}\n{_summary(source, kind, done, time.perf_counter() - start)}")
    return 0


def _check_type(source: TokenFile, told: str | None) -> None:
    """The type of ids without a header is told, not assumed; and what is told is what is there.

    Raises:
        ConfigError: it is not.
    """
    if source.notice is not None:
        raise ConfigError(
            f"{source.path}: no header, and no manifest tells the type of its ids; "
            f"expected --data-dtype {', '.join(RAW_TYPES)} (--dtype is that of the output)"
        )
    if told is not None and source.dtype.name != told:
        raise ConfigError(f"{source.path}: holds {source.dtype.name}; expected it without --data-dtype {told}")


def _summary(source: TokenFile, kind: str, done: Converted, seconds: float) -> str:
    about, size = done.manifest, source.array.nbytes
    documents = f" in {counted(about['documents'], 'document')}" if about["documents"] else ", documents unknown"
    rows = [
        ("tokens", f"{about['tokens']:,}{documents}, greatest id {about['max_id']:,}"),
        ("format", f"{NAMES[source.kind]} {source.dtype.name} to {NAMES[kind]} {about['dtype']}"),
        ("tokenizer", about["tokenizer_hash"] or "unknown; name it with --tokenizer, here or in lm-train"),
        ("time", f"{human_time(seconds)}, {human_bytes(size / max(seconds, 1e-9))}/s"),
    ]
    return table(rows)
