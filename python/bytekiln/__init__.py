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
from bytekiln.tokenfile import TokenFile
from bytekiln.tokenizer import Counts, Tokenizer, encode_files, train_bpe, train_bpe_from_iterator

__all__ = [
    "BytekilnError",
    "Counts",
    "TokenFile",
    "Tokenizer",
    "__version__",
    "encode_files",
    "train_bpe",
    "train_bpe_from_iterator",
]
