"""Special tokens against tiktoken, places of tokens against Hugging Face's library, and every byte back again."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

import bytekiln
from bytekiln import Tokenizer
from bytekiln.errors import ConfigError, TextError

EOT = "<|endoftext|>"
OVERLAPPING = [EOT, "<a><b>", "<b><c>", "<c>x", "日本", "  ", "aXa"]
PREFIXING = ["<a>", "<a><b>", "<a><b><c>", "<b>", "a", ">"]


def build(specials: list[str], text: str = "the kiln's warm <a> <b> 日本 naïve ab") -> Tokenizer:
    k = bytekiln.train_bpe_from_iterator([text * 9], vocab_size=290)
    first = k.n_vocab
    ids = {text: id for id, text in enumerate(specials, first)}
    ranks = {token: id for id, token in k.vocab.items()}
    return Tokenizer.from_ranks(ranks, pattern=r"\S+|\s+", special_tokens=ids)


@pytest.fixture(scope="module")
def overlapping() -> tuple[Tokenizer, tiktoken.Encoding]:
    ours = build(OVERLAPPING)
    special = ours.special_tokens
    ranks = {token: id for id, token in ours.vocab.items() if id not in special.values()}
    return ours, tiktoken.Encoding("t", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens=special)


pieces = [*OVERLAPPING, "<a>", "<b>", "<c>", "<", ">", "a", "X", "x", "日", "本", " ", "<|endof", "text|>", "the"]
texts = st.lists(st.sampled_from(pieces), max_size=14).map("".join) | st.text(
    st.characters(exclude_categories=["Cs"]), max_size=30
)
subsets = st.just("all") | st.sets(st.sampled_from(OVERLAPPING))


@settings(max_examples=1500)
@given(texts, subsets, subsets)
def test_allowed_and_disallowed_as_tiktoken(
    overlapping: tuple[Tokenizer, tiktoken.Encoding], text: str, allowed: object, disallowed: object
) -> None:
    """The same ids, or an error from both. None of these special tokens begins another: there tiktoken has no rule."""
    ours, theirs = overlapping
    options = {"allowed_special": allowed, "disallowed_special": disallowed}
    try:
        expected = theirs.encode(text, **options)
    except ValueError:
        for call in (ours.encode, ours.encode_to_numpy, ours.encode_with_offsets):
            with pytest.raises(TextError, match=r"byte offset \d+: special token"):
                call(text, **options)
        with pytest.raises(TextError, match="special token"):
            ours.encode_batch(["", text], **options)
        with pytest.raises(TextError, match="special token"):
            ours.encode_bytes(text.encode(), **options)
        for size in (1, 3):
            chunks = [text[i : i + size] for i in range(0, len(text), size)]
            with pytest.raises(TextError, match="special token"):
                list(ours.encode_iter(chunks, **options))
    else:
        assert ours.encode(text, **options) == expected
        assert ours.encode_bytes(text.encode(), **options) == expected
        assert list(ours.encode_iter(list(text), **options)) == expected


def test_user_text_has_no_special_token_unless_asked(overlapping: tuple[Tokenizer, tiktoken.Encoding]) -> None:
    ours, theirs = overlapping
    text = f"<a><b>{EOT}日本  aXa"
    special = set(ours.special_tokens.values())
    assert not special & set(ours.encode(text)) and ours.encode(text) == ours.encode_ordinary(text)
    assert ours.encode_ordinary(text) == theirs.encode_ordinary(text)
    assert not special & set(ours.encode_bytes(text.encode())) | (special & set(ours.encode_iter([text])))


def test_the_first_disallowed_one_is_named_with_its_place() -> None:
    ours = build(PREFIXING[:4])
    for text, at, name in (("é<b><a>", 2, "<b>"), ("<a><b><c>", 0, "<a><b><c>"), ("x<a><b>", 1, "<a><b>")):
        message = f'byte offset {at}: special token "{name}" in the text'
        with pytest.raises(TextError, match=message):
            ours.encode(text, disallowed_special="all")
        for size in (1, 2, 5):
            parts = [text[i : i + size] for i in range(0, len(text), size)]
            with pytest.raises(TextError, match=f"byte offset {at}: special token"):
                list(ours.encode_iter(parts, disallowed_special="all"))
    # As in tiktoken, those that are named are refused whatever is allowed, and need not be in the vocabulary.
    with pytest.raises(TextError, match='byte offset 0: special token "<a>"'):
        ours.encode("<a>", allowed_special="all", disallowed_special={"<a>"})
    with pytest.raises(TextError, match='byte offset 2: special token "<unknown>"'):
        ours.encode("a <unknown>", disallowed_special={"<unknown>"})
    with pytest.raises(ConfigError, match="disallowed_special: found an empty text"):
        ours.encode("a", disallowed_special={""})
    with pytest.raises(ConfigError, match='"<unknown>" is not a special token'):
        ours.encode("a", allowed_special={"<unknown>"})
    assert list(ours.encode_iter(["<", "a"], disallowed_special="all")) == ours.encode("<a")


def longest_first(text: str, specials: dict[str, int]) -> list[int | str]:
    """The rule as a page of its own: at every place the longest special token that begins there."""
    found: list[int | str] = []
    at = 0
    while at < len(text):
        here = max((s for s in specials if text.startswith(s, at)), key=len, default=None)
        if here is not None:
            found.append(specials[here])
            at += len(here)
        else:
            if found and isinstance(found[-1], str):
                found[-1] += text[at]
            else:
                found.append(text[at])
            at += 1
    return found


@settings(max_examples=500)
@given(
    st.lists(st.sampled_from([*PREFIXING, "<", "b", "c", "<c>", "x"]), max_size=14).map("".join),
    st.sets(st.sampled_from(PREFIXING[:4])),
)
def test_of_prefixing_special_tokens_the_longest_wins(text: str, allowed: set[str]) -> None:
    ours = PREFIXED
    specials = {name: id for name, id in ours.special_tokens.items() if name in allowed}
    expected: list[int] = []
    for part in longest_first(text, specials):
        expected.extend([part] if isinstance(part, int) else ours.encode_ordinary(part))
    assert ours.encode(text, allowed_special=allowed) == expected
    assert list(ours.encode_iter(list(text), allowed_special=allowed)) == expected


PREFIXED = build(PREFIXING[:4])


# --- places ------------------------------------------------------------------------------------------------


@settings(max_examples=800)
@given(texts, st.booleans())
def test_places_of_tokens(overlapping: tuple[Tokenizer, tiktoken.Encoding], text: str, special: bool) -> None:
    ours, theirs = overlapping
    allowed = "all" if special else ()
    ids, spans_N2, characters_N2 = ours.encode_with_offsets(text, allowed_special=allowed)
    data = text.encode()
    assert ids == ours.encode(text, allowed_special=allowed)
    assert spans_N2.shape == characters_N2.shape == (len(ids), 2) and spans_N2.dtype == np.uint64
    ends = [0, *spans_N2[:, 1].tolist()]
    assert ends[-1] == len(data) and spans_N2[:, 0].tolist() == ends[:-1]
    for id, (start, end), (first, last) in zip(ids, spans_N2.tolist(), characters_N2.tolist(), strict=True):
        assert data[start:end] == ours.id_to_token(id)
        # The characters in which any of the bytes lies, no more and no fewer.
        before, through = len(text[:first].encode()), len(text[:last].encode())
        assert before <= start < end <= through
        assert len(text[: first + 1].encode()) > start and len(text[: last - 1].encode()) < end
    starts = theirs.decode_with_offsets(ids)[1]
    assert characters_N2[:, 0].tolist() == starts


@settings(max_examples=500)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | texts)
def test_places_equal_hugging_faces(text: str) -> None:
    ours, theirs = HUGGING
    ids, _, characters_N2 = ours.encode_with_offsets(text, allowed_special="all")
    expected = theirs.encode(text)
    assert ids == expected.ids
    assert [tuple(span) for span in characters_N2.tolist()] == expected.offsets


def hugging() -> tuple[Tokenizer, tokenizers.Tokenizer]:
    text = "the kiln isn't warm 1234 naïve 日本語 日本 é " * 20
    ours = bytekiln.train_bpe_from_iterator([text], vocab_size=320, special_tokens=[EOT, "日本"])
    return ours, tokenizers.Tokenizer.from_str(ours.to_json())


HUGGING = hugging()


def test_places_of_parts_of_characters() -> None:
    k = bytekiln.train_bpe_from_iterator([], vocab_size=256)
    ids, spans_N2, characters_N2 = k.encode_with_offsets("é日a")
    assert len(ids) == 6
    assert spans_N2.tolist() == [[i, i + 1] for i in range(6)]
    assert characters_N2.tolist() == [[0, 1], [0, 1], [1, 2], [1, 2], [1, 2], [2, 3]]
    ids, spans_N2, characters_N2 = k.encode_with_offsets("")
    assert ids == [] and spans_N2.shape == characters_N2.shape == (0, 2)


# --- and back ----------------------------------------------------------------------------------------------


@settings(max_examples=800)
@given(st.binary(max_size=60) | texts.map(str.encode), st.sampled_from(["gpt2", "cl100k", "o200k", r"\w+|\s"]))
def test_all_bytes_come_back(data: bytes, pattern: str) -> None:
    k = PATTERNS[pattern]
    assert k.decode_bytes(k.encode_bytes(data, errors="bytes")) == data
    assert k.decode_bytes(k.encode_bytes(data, errors="bytes", allowed_special="all")) == data
    replaced = k.encode_bytes(data, errors="replace")
    assert k.decode(replaced) == data.decode(errors="replace")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        with pytest.raises(TextError, match=f"byte offset {error.start}: invalid UTF-8"):
            k.encode_bytes(data)
    else:
        assert k.encode_bytes(data) == k.encode(text) and k.decode(k.encode(text)) == text


WARM = "the kiln's warm, the potter turns wet clay on his wheel 日本語 naïve été "
PATTERNS = {
    name: bytekiln.train_bpe_from_iterator([WARM * 9], vocab_size=290, special_tokens=[EOT], pattern=name)
    for name in ("gpt2", "cl100k", "o200k", r"\w+|\s")
}


@settings(max_examples=500)
@given(st.lists(st.integers(0, 289), max_size=30), st.booleans())
def test_decoding_any_ids_equals_pythons_decoding_of_their_bytes(ids: list[int], skip: bool) -> None:
    k = PATTERNS["gpt2"]
    data = k.decode_bytes(ids, skip_special_tokens=skip)
    assert data == b"".join(k.id_to_token(id) for id in ids if not (skip and id == k.eot_id))
    for errors in ("replace", "ignore"):
        assert k.decode(ids, errors=errors, skip_special_tokens=skip) == data.decode(errors=errors)
    try:
        expected = data.decode()
    except UnicodeDecodeError as error:
        with pytest.raises(TextError, match=f"decoded byte {error.start}: invalid UTF-8"):
            k.decode(ids, errors="strict", skip_special_tokens=skip)
    else:
        assert k.decode(ids, errors="strict", skip_special_tokens=skip) == expected


@pytest.mark.parametrize("call", [Tokenizer.decode, Tokenizer.decode_bytes])
@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([1, 290], ConfigError, r"ids\[1\]: found 290; expected ids below the vocabulary's size 290"),
        ([1, 2, -1], ConfigError, r"ids\[2\]: found -1; expected ids from 0"),
        ([2**32], ConfigError, r"ids\[0\]: found 4294967296"),
        ([2**64], ConfigError, "found a number beyond 64 bits"),
        (np.array([290], dtype=np.uint16), ConfigError, r"ids\[0\]: found 290"),
        (np.array([-5], dtype=np.int32), ConfigError, r"ids\[0\]: found -5"),
        (np.array([1.0]), TypeError, "float"),
        ([1.0], TypeError, "float"),
        ("12", TypeError, "str"),
        ([None], TypeError, "NoneType"),
        (3, TypeError, "int"),
    ],
)
def test_wrong_ids_are_named(call: Callable[..., object], ids: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(PATTERNS["gpt2"], ids)


def test_an_unknown_policy_is_named() -> None:
    with pytest.raises(ConfigError, match='errors: found "drop"; expected strict, replace or ignore'):
        PATTERNS["gpt2"].decode([1], errors="drop")
    with pytest.raises(ConfigError, match="expected error, replace or bytes"):
        PATTERNS["gpt2"].encode_bytes(b"a", errors="drop")
