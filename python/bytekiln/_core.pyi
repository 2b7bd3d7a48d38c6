"""The Rust core's Python surface. Public names are re-exported by `bytekiln`."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeAlias, final

import numpy as np
from numpy.typing import NDArray

from bytekiln.inputs import Inputs

__all__ = [
    "UNICODE_VERSION",
    "CheckpointLock",
    "Counts",
    "TokenIterator",
    "Tokenizer",
    "__version__",
    "activation_backward",
    "activation_forward",
    "attention_backward",
    "attention_forward",
    "block_backward",
    "block_forward",
    "borrow_threads",
    "default_max_memory",
    "dropout",
    "encode_files",
    "find_inputs",
    "linear_backward",
    "linear_forward",
    "payload_checksum",
    "rms_norm_backward",
    "rms_norm_forward",
    "simd_level",
    "swiglu_backward",
    "swiglu_forward",
    "train_bpe",
    "train_bpe_from_counts",
    "train_bpe_from_iterator",
]

__version__: str
UNICODE_VERSION: str

_StrPath: TypeAlias = str | PathLike[str]
_Inputs: TypeAlias = _StrPath | Sequence[_StrPath] | Inputs
_Progress: TypeAlias = Callable[[str, int, int], object]

@final
class Tokenizer:
    @staticmethod
    def from_file(
        path: _StrPath,
        *,
        special_tokens: Sequence[str] | dict[str, int] | None = None,
        pattern: str | None = None,
    ) -> Tokenizer: ...
    @staticmethod
    def from_vocab_and_merges(
        vocab: _StrPath | dict[int, bytes],
        merges: _StrPath | Sequence[tuple[bytes, bytes]],
        *,
        special_tokens: Sequence[str] | dict[str, int] | None = None,
        pattern: str = "gpt2",
    ) -> Tokenizer: ...
    @staticmethod
    def from_ranks(
        ranks: dict[bytes, int],
        *,
        pattern: str,
        special_tokens: Sequence[str] | dict[str, int] | None = None,
    ) -> Tokenizer: ...
    @staticmethod
    def _from_pickled_ranks(ranks: dict[bytes, int], pattern: str, special_tokens: dict[str, int]) -> Tokenizer: ...
    def save(
        self,
        path: _StrPath,
        *,
        format: Literal["tokenizer.json", "vocab+merges", "tiktoken", "pretrained"] = "tokenizer.json",
        overwrite: bool = False,
    ) -> None: ...
    def save_pretrained(self, folder: _StrPath, *, overwrite: bool = False) -> None: ...
    def to_json(self) -> str: ...
    @staticmethod
    def from_json(text: str) -> Tokenizer: ...
    @property
    def vocab(self) -> dict[int, bytes]: ...
    @property
    def merges(self) -> list[tuple[bytes, bytes]]: ...
    @property
    def special_tokens(self) -> dict[str, int]: ...
    @property
    def pattern(self) -> str: ...
    @property
    def n_vocab(self) -> int: ...
    @property
    def eot_id(self) -> int | None: ...
    @property
    def hash(self) -> str: ...
    def encode(
        self,
        text: str,
        *,
        allowed_special: Literal["all"] | Iterable[str] = (),
        disallowed_special: Literal["all"] | Iterable[str] = (),
    ) -> list[int]: ...
    def encode_ordinary(self, text: str) -> list[int]: ...
    def encode_to_numpy(
        self,
        text: str | bytes,
        *,
        allowed_special: Literal["all"] | Iterable[str] = (),
        disallowed_special: Literal["all"] | Iterable[str] = (),
        threads: int | None = None,
    ) -> NDArray[np.uint16] | NDArray[np.uint32]: ...
    def encode_with_offsets(
        self,
        text: str,
        *,
        allowed_special: Literal["all"] | Iterable[str] = (),
        disallowed_special: Literal["all"] | Iterable[str] = (),
    ) -> tuple[list[int], NDArray[np.uint64], NDArray[np.uint64]]: ...
    def encode_bytes(
        self,
        data: bytes,
        *,
        errors: Literal["error", "replace", "bytes"] = "error",
        allowed_special: Literal["all"] | Iterable[str] = (),
        disallowed_special: Literal["all"] | Iterable[str] = (),
    ) -> list[int]: ...
    def encode_batch(
        self,
        texts: Sequence[str],
        *,
        allowed_special: Literal["all"] | Iterable[str] = (),
        disallowed_special: Literal["all"] | Iterable[str] = (),
        threads: int | None = None,
    ) -> list[list[int]]: ...
    def encode_iter(
        self,
        chunks: Iterable[str],
        *,
        allowed_special: Literal["all"] | Iterable[str] = (),
        disallowed_special: Literal["all"] | Iterable[str] = (),
    ) -> TokenIterator: ...
    def pretokenize(self, text: str) -> list[str]: ...
    def decode(
        self,
        ids: Sequence[int] | NDArray[Any],
        *,
        errors: Literal["strict", "replace", "ignore"] = "replace",
        skip_special_tokens: bool = False,
    ) -> str: ...
    def decode_bytes(self, ids: Sequence[int] | NDArray[Any], *, skip_special_tokens: bool = False) -> bytes: ...
    def token_to_id(self, token: str | bytes) -> int | None: ...
    def id_to_token(self, id: int) -> bytes: ...
    def __len__(self) -> int: ...
    def __reduce__(self) -> tuple[Callable[..., Tokenizer], tuple[object, ...]]: ...
    def __copy__(self) -> Tokenizer: ...
    def __deepcopy__(self, memo: object) -> Tokenizer: ...

@final
class Counts:
    def __new__(
        cls,
        *,
        special_tokens: Sequence[str] = (),
        pattern: str = "gpt2",
        errors: Literal["error", "replace", "bytes"] = "error",
        max_memory: int | None = None,
    ) -> Counts: ...
    @staticmethod
    def from_files(
        files: _Inputs,
        *,
        special_tokens: Sequence[str] = (),
        pattern: str = "gpt2",
        errors: Literal["error", "replace", "bytes"] = "error",
        threads: int | None = None,
        max_memory: int | None = None,
        beside: _StrPath | None = None,
        progress: _Progress | None = None,
    ) -> Counts: ...
    @staticmethod
    def load(
        paths: _StrPath | Sequence[_StrPath], *, max_memory: int | None = None, beside: _StrPath | None = None
    ) -> Counts: ...
    def add(self, text: str | bytes) -> None: ...
    def add_documents(self, texts: Iterable[str | bytes]) -> None: ...
    def __add__(self, other: Counts, /) -> Counts: ...
    def __radd__(self, other: Counts, /) -> Counts: ...
    def save(self, path: _StrPath, *, overwrite: bool = False, progress: _Progress | None = None) -> dict[str, Any]: ...
    def train(
        self,
        vocab_size: int,
        *,
        tie_break: Literal["lexicographic", "huggingface", "raw-bytes"] = "lexicographic",
        min_frequency: int = 1,
        threads: int | None = None,
        progress: _Progress | None = None,
    ) -> Tokenizer: ...
    def most_common(self, n: int) -> list[tuple[bytes, int]]: ...
    @property
    def about(self) -> dict[str, Any]: ...
    @property
    def spilled_runs(self) -> int: ...
    def __len__(self) -> int: ...

@final
class TokenIterator(Iterator[int]):
    def __next__(self) -> int: ...

@final
class CheckpointLock:
    """What a finished run is kept in: no other run takes it up as long as this is held. The files stay until then."""

    def discard(self) -> None:
        """Deletes them."""

def train_bpe(
    files: _Inputs,
    *,
    vocab_size: int | Sequence[int],
    special_tokens: Sequence[str] | None = None,
    pattern: str | None = None,
    tie_break: Literal["lexicographic", "huggingface", "raw-bytes"] = "lexicographic",
    errors: Literal["error", "replace", "bytes"] = "error",
    min_frequency: int = 1,
    max_token_length: int | None = None,
    extend: Tokenizer | None = None,
    threads: int | None = None,
    chunk_bytes: int | None = None,
    max_memory: int | None = None,
    beside: _StrPath | None = None,
    checkpoint: _StrPath | None = None,
    checkpoint_every: float | None = None,
    progress: _Progress | None = None,
) -> tuple[list[Tokenizer], dict[str, Any]]:
    """Returns a tokenizer for each size and the statistics of the run, those of the largest one:
    bytes, pretokens, distinct_pretokens, kept_pretokens (frequent enough), merges, requested_merges (fewer merges than
    requested: no pair was left), prior_merges (of `extend`), resumed_bytes and resumed_merges (of `checkpoint`),
    ties (merges at which the tie rule decided), count_s, layout_s, merge_s, threads, spilled_runs,
    longest_token (bytes), top_merges (left, right, occurrences).
    The run is kept in `checkpoint` and `checkpoint + ".merges"` and goes on from there. `checkpoint` of the
    statistics is then a `CheckpointLock`, which the caller discards when the tokenizers are saved, else None.
    A `progress` that has a method `detail` gets `detail(pretokens, None | (left, right, occurrences))` too."""

def train_bpe_from_counts(
    counts: Sequence[_StrPath],
    *,
    vocab_size: int | Sequence[int],
    tie_break: Literal["lexicographic", "huggingface", "raw-bytes"] = "lexicographic",
    min_frequency: int = 1,
    max_token_length: int | None = None,
    extend: Tokenizer | None = None,
    threads: int | None = None,
    max_memory: int | None = None,
    beside: _StrPath | None = None,
    progress: _Progress | None = None,
) -> tuple[list[Tokenizer], dict[str, Any]]:
    """`train_bpe` on counts files; the pattern and the special tokens are theirs."""

def train_bpe_from_iterator(
    texts: Iterable[str | bytes],
    *,
    vocab_size: int | Sequence[int],
    special_tokens: Sequence[str] | None = None,
    pattern: str | None = None,
    tie_break: Literal["lexicographic", "huggingface", "raw-bytes"] = "lexicographic",
    errors: Literal["error", "replace", "bytes"] = "error",
    min_frequency: int = 1,
    max_token_length: int | None = None,
    extend: Tokenizer | None = None,
    progress: _Progress | None = None,
) -> tuple[list[Tokenizer], dict[str, Any]]: ...
def encode_files(
    tokenizer: Tokenizer,
    inputs: _Inputs,
    out: _StrPath,
    *,
    dtype: Literal["uint16", "uint32"] | None = None,
    append_eot: bool | None = None,
    errors: Literal["error", "replace", "bytes"] = "error",
    overwrite: bool = False,
    shard_tokens: int | None = None,
    split: dict[str, float] | None = None,
    seed: int = 0,
    index: bool = False,
    max_tokens: int | None = None,
    part: tuple[int, int] | None = None,
    threads: int | None = None,
    chunk_bytes: int | None = None,
    save_every: float | None = None,
    progress: _Progress | None = None,
) -> tuple[list[tuple[str, dict[str, Any]]], int]:
    """Writes `out` (.bin: raw little-endian; anything else: .npy) and `out + ".json"`, or files called after it;
    returns them with their manifests, and how many ids an earlier run had written."""

def find_inputs(inputs: _Inputs) -> list[Path]:
    """The files of an input, in the order of the text: folders walked, globs expanded, `-` as it is. Opens none."""

def default_max_memory() -> int: ...
def payload_checksum(path: _StrPath, offset: int = 0) -> str: ...

# Kernels: addresses of float32 tensors that the caller holds, `kernels.py` alone.

_Strided: TypeAlias = tuple[int, tuple[int, int, int]]
"""Address; strides in numbers by batch, head and place."""
_Sizes: TypeAlias = tuple[int, int, int, int, int, int]
"""Batch, heads, heads of keys and values, queries, keys, width of a head."""

def borrow_threads(gomp_parallel: int) -> None:
    """Kernels run on the threads of the OpenMP whose `GOMP_parallel` is at this address; with 0 on the core's own."""

def simd_level() -> str:
    """Instructions in use: scalar, avx2 or avx512."""

def rms_norm_forward(
    threads: int, width: int, rows: int, eps: float, x: int, weight: int, y: int, scales: int
) -> None: ...
def rms_norm_backward(
    threads: int,
    width: int,
    rows: int,
    g: int,
    x: int,
    scales: int,
    weight: int,
    dx: int,
    dweight: int,
) -> None: ...
def block_forward(
    threads: int,
    sizes: tuple[int, int, int, int, int, int, int],
    kind: tuple[bool, int, str, float, bool, str],
    parameters: list[int],
    tables: tuple[int, int],
    x: int,
    kept: tuple[int, int],
    y: int,
) -> None: ...
def block_backward(
    threads: int,
    sizes: tuple[int, int, int, int, int, int, int],
    kind: tuple[bool, int, str, float, bool, str],
    parameters: list[int],
    tables: tuple[int, int],
    x: int,
    kept: tuple[int, int],
    g: int,
    dx: int,
    dparameters: list[int],
) -> None: ...
def linear_forward(
    threads: int,
    sizes: tuple[int, int],
    before: tuple[str, float],
    x: tuple[int, int],
    norm: tuple[int, int],
    maps: list[tuple[int, int, int]],
    residual: int,
    y: list[int],
) -> None: ...
def linear_backward(
    threads: int,
    sizes: tuple[int, int],
    before: tuple[str, float],
    x: tuple[int, int],
    norm: tuple[int, int],
    maps: list[tuple[int, int, int]],
    g: list[int],
    dx: tuple[int, int],
    dmaps: list[tuple[int, int]],
    dnorm: tuple[int, int],
) -> None: ...
def activation_forward(threads: int, kind: str, bf16: bool, len: int, x: int, y: int) -> None: ...
def activation_backward(threads: int, kind: str, bf16: bool, len: int, g: int, x: int, dx: int) -> None: ...
def dropout(threads: int, seed: int, rate: float, bf16: bool, len: int, x: int, y: int) -> None: ...
def swiglu_forward(threads: int, bf16: bool, len: int, a: int, b: int, y: int) -> None: ...
def swiglu_backward(threads: int, bf16: bool, len: int, g: int, a: int, b: int, da: int, db: int) -> None: ...
def attention_forward(
    threads: int,
    sizes: _Sizes,
    causal: bool,
    window: int,
    q: _Strided,
    k: _Strided,
    v: _Strided,
    out: int,
    log_sums: int,
) -> None: ...
def attention_backward(
    threads: int,
    sizes: _Sizes,
    causal: bool,
    window: int,
    dout: _Strided,
    q: _Strided,
    k: _Strided,
    v: _Strided,
    out: _Strided,
    log_sums: int,
    dq: int,
    dk: int,
    dv: int,
) -> None: ...
