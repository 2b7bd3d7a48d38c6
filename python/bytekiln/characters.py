"""The tokenizer of nanoGPT's character-level Shakespeare: every character of a text is a token.

In: characters, or the text of a WordLevel `tokenizer.json`. Out: `CharTokenizer`, which has what the `lm-*` commands
use of `Tokenizer`; `load_any` and `from_json_any` tell the two apart by what a file says. Loads no torch, and numpy
only where arrays are made.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from operator import index
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from bytekiln.atomic import in_our_words, write_file
from bytekiln.errors import ConfigError, FormatError, TextError
from bytekiln.known import open_tokenizer
from bytekiln.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

UNKNOWN = "<unk>"
"""The format wants a name for unknown characters. It is no token here, so they are an error, there as here."""
PRE_TOKENIZER = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
"""Every character is a word; written so that Oniguruma and Rust's regex read it alike."""
CODE_POINTS = 0x110000
SpecialSet: TypeAlias = Literal["all"] | Iterable[str]


class CharTokenizer:
    """Characters to ids and back; immutable.

    >>> tokenizer = CharTokenizer("to be or not")
    >>> tokenizer.n_vocab, tokenizer.encode("robe"), tokenizer.decode([6, 4, 1, 2])
    (7, [5, 4, 1, 2], 'tobe')
    """

    def __init__(self, characters: Iterable[str]) -> None:
        """A vocabulary of the different characters, sorted by code point, as nanoGPT numbers them.

        Raises:
            ConfigError: there are none.
            TextError: a lone surrogate, which no text can hold.
        """
        self._characters = "".join(sorted(set(characters)))
        if not self._characters:
            raise ConfigError("characters: found none; expected at least one")
        self._complete()

    def _complete(self) -> None:
        for c in self._characters:
            if "\ud800" <= c <= "\udfff":
                raise TextError(f"characters: found the lone surrogate U+{ord(c):04X}; expected text")
        self._ids = {c: i for i, c in enumerate(self._characters)}

    @classmethod
    def from_json(cls, text: str) -> CharTokenizer:
        """Read the text of a `tokenizer.json`, this program's or one that says the same.

        Raises:
            FormatError: malformed, or it says what characters alone cannot do.
        """
        return cls._parsed(text, "tokenizer.json")

    @classmethod
    def from_file(cls, path: str | PathLike[str]) -> CharTokenizer:
        """Read a `tokenizer.json`.

        Raises:
            FileError: missing or unreadable.
            FormatError: as `from_json`.
        """
        return cls._parsed(_read(Path(path)), str(path))

    @classmethod
    def _parsed(cls, text: str, where: str) -> CharTokenizer:
        try:
            said: Any = json.loads(text)
        except ValueError as error:
            raise FormatError(f"{where}: {error}; expected a JSON tokenizer") from None
        model = said.get("model") if isinstance(said, dict) else None
        kind = model.get("type") if isinstance(model, dict) else None
        if not isinstance(model, dict) or kind != "WordLevel":
            raise FormatError(f'{where}: model type {json.dumps(kind)}; expected "WordLevel"')
        wanted: dict[str, tuple[object, ...]] = {
            "pre_tokenizer": (PRE_TOKENIZER,),
            "normalizer": (None,),
            "post_processor": (None,),
            "added_tokens": ([], None),
        }
        for name, good in wanted.items():
            if said.get(name) not in good:
                raise FormatError(f"{where}: {name} {json.dumps(said.get(name))[:80]}; expected {json.dumps(good[0])}")
        vocab = model.get("vocab")
        if not isinstance(vocab, dict) or not vocab:
            raise FormatError(f"{where}: no vocabulary; expected characters with their ids")
        for token, id in vocab.items():
            if len(token) != 1 or "\ud800" <= token <= "\udfff":
                raise FormatError(f"{where}: token {token!a}; expected single characters only")
            if type(id) is not int:
                raise FormatError(f"{where}: id {id!r} of {token!a}; expected a whole number")
        by_id = {id: token for token, id in vocab.items()}
        if sorted(by_id) != list(range(len(vocab))):
            raise FormatError(f"{where}: {len(vocab)} tokens whose ids have holes or occur twice; expected 0 and up")
        if model.get("unk_token") in vocab:
            raise FormatError(
                f"{where}: unk_token {model['unk_token']!a} is a character; expected none, as unknown ones are an error"
            )
        made = cls.__new__(cls)
        made._characters = "".join(by_id[i] for i in range(len(vocab)))
        made._complete()
        return made

    def to_json(self) -> str:
        """The text of the `tokenizer.json` that `save` writes; Hugging Face's library loads it as it is."""
        said: dict[str, object] = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [],
            "normalizer": None,
            "pre_tokenizer": PRE_TOKENIZER,
            "post_processor": None,
            "decoder": {"type": "Fuse"},
            "model": {"type": "WordLevel", "vocab": self._ids, "unk_token": UNKNOWN},
        }
        return json.dumps(said, ensure_ascii=False, indent=2) + "\n"

    def save(self, path: str | PathLike[str], *, overwrite: bool = False) -> None:
        """Write it, atomically.

        Raises:
            OutputExistsError: it exists and `overwrite` is false.
            FileError: the folder is missing or cannot be written.
        """
        write_file(Path(path), self.to_json().encode(), overwrite=overwrite)

    @property
    def characters(self) -> str:
        """All characters, in the order of their ids."""
        return self._characters

    @property
    def n_vocab(self) -> int:
        """Number of tokens; ids are 0 up to this."""
        return len(self._characters)

    @property
    def eot_id(self) -> None:
        """There is no end-of-text token."""
        return None

    @property
    def special_tokens(self) -> dict[str, int]:
        """There are none."""
        return {}

    @property
    def vocab(self) -> dict[int, bytes]:
        """Every token's bytes by id."""
        return {i: c.encode() for i, c in enumerate(self._characters)}

    @cached_property
    def hash(self) -> str:
        """SHA-256 over all that decides ids; token files and checkpoints carry it."""
        import hashlib

        return "sha256:" + hashlib.sha256(b"bytekiln characters\0" + self._characters.encode()).hexdigest()

    def encode(self, text: str, *, allowed_special: SpecialSet = (), disallowed_special: SpecialSet = ()) -> list[int]:
        """Ids of `text`. The other arguments are `Tokenizer.encode`'s: without special tokens nothing to do.

        Raises:
            TextError: a character that is no token, with its byte offset.
        """
        try:
            return [*map(self._ids.__getitem__, text)]
        except KeyError:
            raise self._unknown(text) from None

    def encode_ordinary(self, text: str) -> list[int]:
        """`encode`."""
        return self.encode(text)

    def encode_batch(
        self,
        texts: Sequence[str],
        *,
        allowed_special: SpecialSet = (),
        disallowed_special: SpecialSet = (),
        threads: int | None = None,
    ) -> list[list[int]]:
        """`encode` of every text; one thread does."""
        return [self.encode(text) for text in texts]

    def encode_to_numpy(
        self, text: str, *, allowed_special: SpecialSet = (), disallowed_special: SpecialSet = ()
    ) -> NDArray[np.uint16] | NDArray[np.uint32]:
        """`encode` as an array of uint16, or of uint32 where the vocabulary has more than 65,536 characters."""
        import numpy as np

        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
        ids: NDArray[np.uint32] = self._by_code_point[points]
        if len(ids) and int(ids.max()) == self.n_vocab:
            raise self._unknown(text)
        return ids.astype(np.uint16) if self.n_vocab <= 1 << 16 else ids

    @cached_property
    def _by_code_point(self) -> NDArray[np.uint32]:
        """Id of every code point, `n_vocab` where there is none: 4 MB, made once; 150 MB of text a second."""
        import numpy as np

        table = np.full(CODE_POINTS, self.n_vocab, dtype=np.uint32)
        table[[ord(c) for c in self._characters]] = np.arange(self.n_vocab, dtype=np.uint32)
        return table

    def _unknown(self, text: str) -> TextError:
        place, found = next((i, c) for i, c in enumerate(text) if c not in self._ids)
        offset = len(text[:place].encode("utf-8", "surrogatepass"))
        return TextError(
            f"byte offset {offset}: character {found!a} (U+{ord(found):04X}); "
            f"expected one of the tokenizer's {self.n_vocab} characters"
        )

    def decode(
        self,
        ids: Sequence[int] | NDArray[Any],
        *,
        errors: Literal["strict", "replace", "ignore"] = "replace",
        skip_special_tokens: bool = False,
    ) -> str:
        """Text of `ids`; always whole characters, so `errors` decides nothing.

        Raises:
            ConfigError: an id that is not in the vocabulary, with its place.
        """
        if errors not in ("strict", "replace", "ignore"):
            raise ConfigError(f"errors: found {errors!r}; expected strict, replace or ignore")
        out = []
        for place, id in enumerate(ids):
            if not 0 <= (i := index(id)) < self.n_vocab:
                raise ConfigError(f"ids: found {i} at place {place}; expected 0 to {self.n_vocab - 1}")
            out.append(self._characters[i])
        return "".join(out)

    def decode_bytes(self, ids: Sequence[int] | NDArray[Any], *, skip_special_tokens: bool = False) -> bytes:
        """`decode` as UTF-8."""
        return self.decode(ids).encode()

    def token_to_id(self, token: str | bytes) -> int | None:
        """Id of a character by its text or its bytes; None if there is none."""
        # Escaped bytes become surrogates, which are never in the vocabulary.
        return self._ids.get(token.decode("utf-8", "surrogateescape") if isinstance(token, bytes) else token)

    def id_to_token(self, id: int) -> bytes:
        """Bytes of a token.

        Raises:
            ConfigError: there is no such id.
        """
        if not 0 <= id < self.n_vocab:
            raise ConfigError(f"id {id}: found no such token; expected 0 to {self.n_vocab - 1}")
        return self._characters[id].encode()

    def __len__(self) -> int:
        """Number of tokens."""
        return self.n_vocab

    def __repr__(self) -> str:
        return f"<bytekiln.CharTokenizer {self.n_vocab} characters>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CharTokenizer) and other._characters == self._characters

    def __hash__(self) -> int:
        return hash(self._characters)

    def __reduce__(self) -> tuple[Callable[[str], CharTokenizer], tuple[str]]:
        """Pickles and copies by its text."""
        return CharTokenizer.from_json, (self.to_json(),)


AnyTokenizer: TypeAlias = Tokenizer | CharTokenizer


def _is_of_characters(text: bytes | str) -> bool:
    """Whether this is a `tokenizer.json` with a WordLevel model; JSON is parsed only where that word occurs."""
    if ("WordLevel" if isinstance(text, str) else b"WordLevel") not in text:  # type: ignore[operator]
        return False
    try:
        return bool(json.loads(text)["model"]["type"] == "WordLevel")
    except (ValueError, KeyError, TypeError):
        return False


def from_json_any(text: str) -> AnyTokenizer:
    """The tokenizer, byte-level BPE or characters, that the text of a `tokenizer.json` describes.

    Raises:
        FormatError: neither.
    """
    return CharTokenizer.from_json(text) if _is_of_characters(text) else Tokenizer.from_json(text)


def load_any(
    path: str | PathLike[str], *, special_tokens: Sequence[str] | None = None, pattern: str | None = None
) -> AnyTokenizer:
    """The tokenizer at `path`: one of characters by what the file says, else what `Tokenizer.from_file` reads.

    Args:
        path: a file, a folder with a `tokenizer.json`, or a name as `known_tokenizer` has them.
        special_tokens: as in `Tokenizer.from_file`; a tokenizer of characters takes none.
        pattern: likewise.

    Raises:
        FileError, FormatError, ConfigError: as `Tokenizer.from_file`.
    """
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    if file.is_file() and _is_of_characters(_read(file, whole=False)):
        for name, given in (("special_tokens", special_tokens), ("pattern", pattern)):
            if given:
                raise ConfigError(f"{name}: found {given!r} for {file}, a tokenizer of characters; expected none")
        return CharTokenizer.from_file(file)
    return open_tokenizer(path, special_tokens=special_tokens, pattern=pattern)


def _read(path: Path, *, whole: bool = True) -> str:
    """A file's text; where not `whole`, invalid UTF-8 is for someone else to refuse."""
    try:
        return path.read_bytes().decode("utf-8", "strict" if whole else "replace")
    except OSError as error:
        raise in_our_words(path, error) from None
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: invalid UTF-8 at byte {error.start}; expected a JSON tokenizer") from None
