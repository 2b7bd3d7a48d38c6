"""The flags that name a tokenizer, and what they name.

In: command-line arguments. Out: a tokenizer. Called by `cli_bpe` and `tokens.command`.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from bytekiln.bpe_flags import PATTERN_HELP, text
from bytekiln.characters import AnyTokenizer, load_any
from bytekiln.console import Parser
from bytekiln.tokenizer import Tokenizer


def add_tokenizer_flags(parser: Parser) -> None:
    """A `tokenizer.json`, or a vocabulary in other files."""
    add = parser.add_argument
    add(
        "--tokenizer",
        type=Path,
        metavar="T",
        help="tokenizer.json, .tiktoken ranks, or a name such as gpt2 whose file is at hand",
    )
    add("--vocab-path", type=Path, metavar="F", help="vocab.json, instead of --tokenizer, with --merges-path")
    add("--merges-path", type=Path, metavar="F", help="merges.txt")
    add(
        "--special-token",
        "--special-tokens",
        action="append",
        type=text,
        metavar="T",
        help="special tokens of vocabularies that do not name theirs; repeat for several",
    )
    add("--pattern", type=text, metavar="P", help=PATTERN_HELP)


def tokenizer_of(args: Namespace, parser: Parser) -> AnyTokenizer:
    """What the flags name.

    Raises:
        ConfigError: neither, or half of either.
    """
    if args.tokenizer and not (args.vocab_path or args.merges_path):
        return load_any(args.tokenizer, special_tokens=args.special_token, pattern=args.pattern)
    if args.vocab_path and args.merges_path and not args.tokenizer:
        return Tokenizer.from_vocab_and_merges(
            args.vocab_path, args.merges_path, special_tokens=args.special_token, pattern=args.pattern or "gpt2"
        )
    return parser.error("expected either --tokenizer T, or --vocab-path F together with --merges-path F")
