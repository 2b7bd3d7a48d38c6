"""Sampling as a command: its flags, and texts on stdout as they come. Called by `cli_lm`; torch comes late."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable

from bytekiln.console import Parser, notice
from bytekiln.errors import ConfigError

SEEDS = 2**63


def whole_number(text: str) -> int:
    """A whole number as people write it; the flags of a run's fields take the same.

    >>> whole_number("7"), whole_number("1e3")
    (7, 1000)

    Raises:
        ArgumentTypeError: it is none.
    """
    try:
        return int(text)
    except ValueError:
        pass
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not number.is_integer():
        raise argparse.ArgumentTypeError(f"found {text!r}; expected a whole number")
    return int(number)


SAMPLING_FLAGS = ("prompt", "max_new_tokens", "num_samples", "temperature", "top_p", "top_k")
"""Those that a run's own fields do not have."""


def sampling_flags(parser: Parser, *, hidden: bool = False) -> None:
    group = parser.add_argument_group("sampling") if not hidden else parser

    def add(
        *names: str, text: str, kind: Callable[[str], object] = str, default: object = None, metavar: str = "X"
    ) -> None:
        group.add_argument(
            *names, type=kind, default=default, metavar=metavar, help=argparse.SUPPRESS if hidden else text
        )

    add(
        "--prompt",
        "--start",
        text="text to continue, or FILE:path; default: the start of a new text",
        default="",
        metavar="TEXT",
    )
    add(
        "--max-new-tokens",
        text="the most tokens to generate (256); fewer where the text ends",
        kind=whole_number,
        default=256,
        metavar="N",
    )
    add("--num-samples", text="how many texts (1)", kind=whole_number, default=1, metavar="N")
    add(
        "--temperature",
        text="0: always the most likely token; 1: the model's own distribution (0.8)",
        kind=float,
        default=0.8,
    )
    add(
        "--top-p",
        text="keep the most likely tokens up to this probability, the crossing one included (1)",
        kind=float,
        default=1.0,
    )
    add("--top-k", text="keep this many most likely tokens; 0: all (0)", kind=whole_number, default=0, metavar="N")
    if parser.prog != "lm-train":  # which has a seed among its fields
        add("--seed", text="the same seed gives the same text (0)", kind=whole_number, default=0, metavar="N")


def write_samples(run: str, options: argparse.Namespace, device: str) -> int:
    from bytekiln.checkpoint import weights_of
    from bytekiln.model import TransformerLM
    from bytekiln.prepare import find_device
    from bytekiln.sample import Sampling, check_continues, decode_stream, generate, prompt_ids, tokenizer_for

    sampling = Sampling(options.temperature, options.top_p, options.top_k)
    for name in ("max_new_tokens", "num_samples"):
        if getattr(options, name) < 1:
            raise ConfigError(f"{name}: found {getattr(options, name)}; expected 1 or more")
    try:
        seed = whole_number(str(options.seed or 0))  # of `lm-train` it is a field, and still text
    except argparse.ArgumentTypeError as exc:
        raise ConfigError(f"seed: {exc}") from None
    if not 0 <= seed <= SEEDS - options.num_samples:
        raise ConfigError(f"seed: found {seed}; expected 0 … 2^63 - {options.num_samples}")
    checkpoint = weights_of(run, notice)
    check_continues(checkpoint.config.model, run)
    where = find_device("cpu" if device == "auto" else device)
    model = TransformerLM(checkpoint.config.model)
    model.load_state_dict(checkpoint.model)
    model.to(where).eval()
    tokenizer = tokenizer_for(
        model,
        options.tokenizer,
        checkpoint.tokenizer_json,
        run,
        trained_with=(checkpoint.state.get("data") or {}).get("tokenizer"),
    )
    ids = prompt_ids(tokenizer, options.prompt)
    if len(ids) + options.max_new_tokens > model.config.context_length:
        notice(f"longer than the context: the model sees the last {model.config.context_length} tokens at a time")
    for i in range(options.num_samples):
        if options.num_samples > 1:
            sys.stdout.write(f"--- sample {i + 1} ---\n")
        sys.stdout.write(tokenizer.decode(ids, skip_special_tokens=True))
        stream = generate(
            model,
            ids,
            max_new_tokens=options.max_new_tokens,
            sampling=sampling,
            seed=seed + i,
            eot_id=tokenizer.eot_id,
            vocab_size=tokenizer.n_vocab,
        )
        for piece in decode_stream(tokenizer, stream):
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
    return 0
