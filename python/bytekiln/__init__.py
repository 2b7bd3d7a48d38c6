"""bytekiln: raw text in, a trained language model out.

Importing the package loads the Rust tokenizer core and nothing heavier; torch, pydantic and
matplotlib are imported by the modules that use them (`bytekiln.train`, `bytekiln.report.build` …).

>>> import bytekiln
>>> k = bytekiln.train_bpe_from_iterator(["low lower lowest"], vocab_size=260)
>>> k.decode(k.encode("lowest"))
'lowest'
"""

from bytekiln._core import __version__
from bytekiln.errors import BytekilnError
from bytekiln.tokenizer import Counts, Tokenizer, encode_files, train_bpe, train_bpe_from_iterator

TYPE_CHECKING = False  # checkers take it for typing's own, which would have to be loaded
if TYPE_CHECKING:
    from bytekiln.inputs import Inputs
    from bytekiln.known import known_tokenizer
    from bytekiln.tokenfile import TokenFile

__all__ = [
    "BytekilnError",
    "Counts",
    "Inputs",
    "TokenFile",
    "Tokenizer",
    "__version__",
    "encode_files",
    "known_tokenizer",
    "train_bpe",
    "train_bpe_from_iterator",
]


if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """What not every process needs, when it is first asked for: json, pathlib and typing take longer to load than
        all the rest."""
        if name == "TokenFile":
            from bytekiln.tokenfile import TokenFile

            return TokenFile
        if name == "Inputs":
            from bytekiln.inputs import Inputs

            return Inputs
        if name == "known_tokenizer":
            from bytekiln.known import known_tokenizer

            return known_tokenizer
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
