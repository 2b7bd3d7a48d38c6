"""What `bpe-encode` makes of words beside one token file: shards, parts, an index, a share of the work.

In: command-line arguments. Out: token files, and a summary of them. Called by `cli_bpe`.
"""

from __future__ import annotations

import re
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bytekiln import _core
from bytekiln.bpe_flags import inputs_of
from bytekiln.console import Parser, counted, human_bytes, human_time, table
from bytekiln.errors import ConfigError

OUTPUT_FLAGS = ("--shard-tokens", "--max-tokens", "--split", "--index", "--part", "--ray")
Made = list[tuple[Path, dict[str, Any]]]
"""Files and their manifests; of shards, first that of all."""


def token_count(text: str) -> int:
    """A number of tokens such as 100M, 1.5B or 250_000; 1 or more.

    >>> token_count("100M"), token_count("1.5B"), token_count("250_000")
    (100000000, 1500000000, 250000)
    """
    found = re.fullmatch(r"(\d[\d_,]*)(\.\d+)?([kmbgt]?)", text.strip().lower(), re.ASCII)
    if found:
        whole, part, unit = found.groups()
        digits = part[1:] if part else ""
        factor = {"": 1, "k": 10**3, "m": 10**6, "t": 10**12}.get(unit, 10**9)
        value = int(re.sub("[_,]", "", whole) + digits) * factor
        value, rest = divmod(value, 10 ** len(digits))
        if not rest and 1 <= value < 2**63:
            return int(value)
    raise ArgumentTypeError(f"found {text}; expected a number of tokens, such as 100M or 1B")


def split_share(text: str) -> tuple[str, float]:
    """A part of the documents and its share.

    >>> split_share("val=0.01")
    ('val', 0.01)
    """
    name, _, share = text.partition("=")
    try:
        return name, float(share)
    except ValueError:
        raise ArgumentTypeError(f"found {text}; expected a name and a share, such as val=0.01") from None


def part_of(text: str) -> tuple[int, int]:
    """A part of the work.

    >>> part_of("3/16")
    (3, 16)
    """
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text, re.ASCII)
    number, of = map(int, found.groups()) if found else (0, 0)
    if not 1 <= number <= of:
        raise ArgumentTypeError(f"found {text}; expected i/n with i from 1 to n, such as 3/16")
    return number, of


def add_output_flags(parser: Parser) -> None:
    """The flags of `encode_words`."""
    add = parser.add_argument
    add(
        "--shard-tokens", type=token_count, metavar="N", help="files of so many tokens, such as 100M: train_00000.npy …"
    )
    add(
        "--split",
        action="append",
        type=split_share,
        metavar="NAME=S",
        help="put this share of the documents into a file of its own: val=0.01 writes train_val.npy; may be repeated",
    )
    add("--index", action="store_true", default=None, help="write where documents end: train.npy.documents.npy")
    add("--max-tokens", type=token_count, metavar="N", help="stop after so many tokens, in all files together")
    add("--part", type=part_of, metavar="I/N", help="encode one of N parts of the inputs only, for N processes")
    add(
        "--ray",
        action="store_true",
        default=None,
        help="encode on the Ray cluster that RAY_ADDRESS names, or this one's",
    )


def encode_words(
    args: Namespace,
    tokenizer: _core.Tokenizer,
    inputs: Sequence[Path],
    out: Path,
    progress: Callable[[str, int, int], object],
) -> tuple[Made, int]:
    """Encode into all files that the flags ask for; returns them and how many tokens were there already."""
    split = dict(args.split or ())
    if len(split) < len(args.split or ()):
        raise ConfigError("--split: found a name twice; expected different names")
    settings: dict[str, Any] = {
        "dtype": args.dtype,
        "append_eot": args.append_eot,
        "errors": args.errors,
        "overwrite": args.overwrite,
        "threads": args.threads,
    }
    files = inputs_of(args, inputs, seed_for="--sample or --split")
    more = {
        "shard_tokens": args.shard_tokens,
        "max_tokens": args.max_tokens,
        "part": args.part,
    }
    settings |= {"split": split or None, "seed": (args.seed or 0) if split else 0, "index": bool(args.index)}
    if args.ray:
        from bytekiln.encode_ray import encode_on_cluster

        for flag, found in (*more.items(), ("limit_bytes", args.limit_bytes)):
            if found is not None:
                way = ", or --part I/N in processes of your own" if flag == "shard_tokens" else ""
                raise ConfigError(f"--{flag.replace('_', '-')} with --ray; expected it without{way}")
        if (state := out.with_name(f".{out.name}.state")).exists():
            if not args.overwrite:
                raise ConfigError(f"{state}: is of an unfinished run without --ray; expected {_THE_SAME}")
            state.unlink()
        return encode_on_cluster(tokenizer, files, out, settings, progress)
    if (folder := out.with_name(f".{out.name}.parts")).exists():  # as `encode_ray` calls it
        if not args.overwrite:
            raise ConfigError(f"{folder}: is of an unfinished run with --ray; expected {_THE_SAME}")
        import shutil

        shutil.rmtree(folder, ignore_errors=True)
    made, before = _core.encode_files(tokenizer, files, out, **settings, **more, progress=progress)
    return [(Path(path), manifest) for path, manifest in made], before


_THE_SAME = "the same to go on, another name, or --overwrite to begin anew"


def words_summary(made: Made, resumed: int, seconds: float) -> str:
    """What was written, for people."""
    whole = [(path, m) for path, m in made if "shard" not in m]
    tokens, text_bytes = (sum(m[field] for _, m in whole) for field in ("tokens", "text_bytes"))
    rows = []
    for path, m in whole:
        name = "tokens" if len(whole) == 1 else path.name
        files = f", {counted(len(m['shards']), 'shard')}" if "shards" in m else ""
        rows.append((name, f"{m['tokens']:,} {m['dtype']} in {counted(m['documents'], 'document')}{files}"))
    rows.append(("text", f"{human_bytes(text_bytes)}, {text_bytes / max(tokens, 1):.3f} bytes a token"))
    if resumed:
        rows.append(("went on", f"behind the {resumed:,} tokens of an unfinished run"))
        rows.append(("time", human_time(seconds)))
    else:
        rows.append(("time", f"{human_time(seconds)}, {human_bytes(text_bytes / seconds)}/s"))

    def called(path: Path, m: dict[str, Any]) -> str:
        shards = m.get("shards", ())
        if not shards:
            return str(path)
        first, last = (str(path.with_name(shards[n]["file"])) for n in (0, -1))
        return first if first == last else f"{first} … {last}"

    return f"wrote {', '.join(called(*one) for one in whole)}\n{table(rows)}"
