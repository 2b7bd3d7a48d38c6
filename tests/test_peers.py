"""Equality with the libraries that define the results: Hugging Face tokenizers, tiktoken, Python's `regex`."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import regex
import tiktoken
import tiktoken_ext.openai_public
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

import bytekiln
from bytekiln import Tokenizer, _core
from bytekiln.errors import FileError
from conftest import SHARED

EOT = "<|endoftext|>"
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
CL100K = "|".join(
    [
        r"""'(?i:[sdmt]|ll|ve|re)""",
        r"""[^\r\n\p{L}\p{N}]?+\p{L}++""",
        r"""\p{N}{1,3}+""",
        r""" ?[^\s\p{L}\p{N}]++[\r\n]*+""",
        r"""\s++$""",
        r"""\s*[\r\n]""",
        r"""\s+(?!\S)""",
        r"""\s""",
    ]
)
O200K = "|".join(
    [
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""\p{N}{1,3}""",
        r""" ?[^\s\p{L}\p{N}]+[\r\n/]*""",
        r"""\s*[\r\n]+""",
        r"""\s+(?!\S)""",
        r"""\s+""",
    ]
)
FILES = [
    "tinystories/tinystories_valid.txt.xz",
    "wikitext2/wt2_test.txt.xz",
    "shakespeare/tinyshakespeare.txt.xz",
    "multilingual/chatterbot_28_languages.yml.xz",
    "owt/owt_800.jsonl.xz",
    "mixed/mixed_24mb.txt.xz",
]


@pytest.fixture(scope="session")
def gpt2(shared_bytes: Callable[..., bytes], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("gpt2")
    (folder / "vocab.json").write_bytes(shared_bytes("gpt2/encoder.json.xz"))
    (folder / "merges.txt").write_bytes(shared_bytes("gpt2/vocab.bpe.xz"))
    return Tokenizer.from_file(folder)


@pytest.fixture(scope="session")
def tiktoken_gpt2(gpt2: Tokenizer) -> tiktoken.Encoding:
    ranks = {token: i for i, token in gpt2.vocab.items() if i != gpt2.eot_id}
    return tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={EOT: gpt2.eot_id})


def test_gpt2_is_what_openai_published(gpt2: Tokenizer) -> None:
    assert gpt2.n_vocab == 50257 and gpt2.eot_id == 50256 and len(gpt2.merges) == 50000
    assert gpt2.encode("hello world") == [31373, 995]


def test_gpt2_ranks_equal_those_that_tiktoken_derives(
    gpt2: Tokenizer, shared_bytes: Callable[..., bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, address in (("encoder.json", "encoder.json"), ("vocab.bpe", "vocab.bpe")):
        url = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{address}"
        (tmp_path / hashlib.sha1(url.encode()).hexdigest()).write_bytes(shared_bytes(f"gpt2/{name}.xz"))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    official = tiktoken.get_encoding("gpt2")
    assert official.n_vocab == gpt2.n_vocab
    assert all(official.decode_single_token_bytes(i) == token for i, token in gpt2.vocab.items())


@pytest.mark.parametrize("name", FILES)
def test_ids_equal_tiktoken_on_real_text(
    name: str, gpt2: Tokenizer, tiktoken_gpt2: tiktoken.Encoding, shared_bytes: Callable[..., bytes]
) -> None:
    text = shared_bytes(name, 2_000_000).decode(errors="replace")
    assert gpt2.encode(text, allowed_special="all") == tiktoken_gpt2.encode(text, allowed_special="all")


def test_ids_equal_hugging_face_on_real_text(
    gpt2: Tokenizer, shared_bytes: Callable[..., bytes], tmp_path: Path
) -> None:
    gpt2.save(tmp_path / "tokenizer.json")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.get_vocab_size() == gpt2.n_vocab
    for name in FILES:
        text = shared_bytes(name, 300_000).decode(errors="ignore")
        assert gpt2.encode(text, allowed_special="all") == theirs.encode(text).ids, name


def known_and_theirs(name: str, gpt2: Tokenizer) -> tuple[Tokenizer, tiktoken.Encoding]:
    """A well-known tokenizer, and tiktoken's with the same ranks and the pattern that it is published with."""
    pattern = {"gpt2": "r50k", "cl100k_base": "cl100k", "o200k_base": "o200k"}[name]
    try:
        ours = gpt2 if name == "gpt2" else bytekiln.known_tokenizer(name)
    except FileError:
        pytest.skip(f"no file of {name} is at hand")
    ranks = {token: i for i, token in ours.vocab.items() if i not in ours.special_tokens.values()}
    published = getattr(tiktoken_ext.openai_public, f"{pattern}_base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiktoken_ext.openai_public, "load_tiktoken_bpe", lambda *_, **__: ranks)
        return ours, tiktoken.Encoding(**published())


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ["gpt2", "cl100k_base", "o200k_base"])
def test_ids_equal_tiktoken_on_every_file_of_the_shared_data(
    name: str, gpt2: Tokenizer, shared_bytes: Callable[..., bytes]
) -> None:
    """Whole files, binary ones too, special tokens recognised and not; tiktoken has them in pieces of megabytes."""
    ours, theirs = known_and_theirs(name, gpt2)
    special = {text for text in ours.special_tokens if text in theirs.special_tokens_set}
    for path in every_file():
        text = shared_bytes(str(path.relative_to(SHARED))).decode(errors="replace")
        for allowed in (set[str](), special):
            ids = ours.encode(text, allowed_special=allowed)
            how: dict[str, Any] = {"allowed_special": allowed, "disallowed_special": ()}
            expected = [id for part in in_lines(text, 4_000_000) for id in theirs.encode(part, **how)]
            assert ids == expected, (path.name, allowed)


def every_file() -> list[Path]:
    files = sorted(path for path in SHARED.rglob("*") if path.is_file())
    assert not SHARED.exists() or len(files) > 15
    return files


def in_lines(text: str, size: int) -> Iterator[str]:
    """Pieces that end where every pattern ends a word: behind a letter and a newline, before a letter."""
    begin = 0
    while begin < len(text):
        cut = re.compile(r"[a-z.]\n(?=[A-Za-z])").search(text, begin + size)
        end = cut.end() if cut else len(text)
        yield text[begin:end]
        begin = end


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ids_equal_hugging_face_on_every_file_of_the_shared_data(
    gpt2: Tokenizer, shared_bytes: Callable[..., bytes], tmp_path: Path
) -> None:
    gpt2.save(tmp_path / "tokenizer.json")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for path in every_file():
        text = shared_bytes(str(path.relative_to(SHARED))).decode(errors="ignore")
        expected = [id for part in in_lines(text, 500_000) for id in theirs.encode(part).ids]
        assert gpt2.encode(text, allowed_special="all") == expected, path.name


strings = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.lists(
    st.sampled_from(
        [
            " ",
            "  ",
            "\n",
            "\t",
            "'s",
            "'LL",
            "don't",
            "x",
            "Ab",
            "12",
            "½",
            "é",
            "日本",
            "!?",
            "\u3000",
            "\u200d🚀",
            EOT,
        ]
    ),
    max_size=16,
).map("".join)


@settings(max_examples=2000)
@given(strings)
def test_ids_equal_tiktoken_on_any_string(gpt2: Tokenizer, tiktoken_gpt2: tiktoken.Encoding, text: str) -> None:
    assert gpt2.encode(text) == tiktoken_gpt2.encode(text, disallowed_special=())
    assert gpt2.encode(text, allowed_special="all") == tiktoken_gpt2.encode(text, allowed_special="all")


CONTEXTS = ["a{c}b", " {c}", "{c}{c}1{c}", "\n{c} ", "'{c}s", "  {c}", "x {c}  "]
MORE_CONTEXTS = [
    "!{c}A",
    "A{c}B",
    "Ab{c}c",
    "12{c}3",
    "!!{c}\n",
    "{c}/\n{c}",
    "x'{c}e",
    "x's{c}",
    " \n{c}\r\n",
    "{c}'S{c}",
]
"""Of o200k and cl100k besides: case, line breaks and slashes behind others, contractions behind words."""
NAMED = {"gpt2": GPT2_PATTERN, "cl100k": CL100K, "o200k": O200K}


def differing(name: str, code_points: Iterable[int], contexts: list[str]) -> list[int]:
    """Code points that a pattern and Python's `regex` cut differently somewhere. One text each, and the contexts one
    by one where that differs, so that what a context leaves behind excuses no other."""
    k = bytekiln.train_bpe_from_iterator([], vocab_size=256, pattern=name)
    compiled = regex.compile(NAMED[name])
    found = []
    for point in code_points:
        text = "".join(contexts).replace("{c}", chr(point))
        if k.pretokenize(text) != [m.group() for m in compiled.finditer(text)]:
            found.append(point)
    return found


RECATEGORISED = {0x295: "Lo"}
"""Code points of Unicode 16 whose general category Unicode 17 changed, with the new one (U+0295 was of lower case)."""
ALL_CODE_POINTS = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]


def hold_to_regex(name: str, code_points: list[int], contexts: list[str]) -> None:
    """Python's `regex` may know a newer Unicode: only code points that ours does not know yet may differ."""
    version = _core.UNICODE_VERSION.removesuffix(".0")
    known = bytekiln.train_bpe_from_iterator([], vocab_size=256, pattern=rf"\p{{Age={version}}}")
    unknown = differing(name, code_points, contexts)
    for point in unknown:
        if point in RECATEGORISED:
            assert regex.match(rf"\p{{{RECATEGORISED[point]}}}", chr(point)), (
                "Unicode 16 or older: no difference is due"
            )
            continue
        # Two pieces where each is matched, one where both are unmatched together.
        assert len(known.pretokenize(chr(point) * 2)) == 1, f"U+{point:04X} is known to Unicode {version} and differs"
    assert len(unknown) < 20_000


def test_pretokens_equal_pythons_regex_on_every_code_point() -> None:
    hold_to_regex("gpt2", ALL_CODE_POINTS, CONTEXTS)


@pytest.mark.parametrize("name", ["cl100k", "o200k"])
def test_named_pretokens_equal_pythons_regex_on_a_share_of_the_code_points(name: str) -> None:
    hold_to_regex(name, [c for c in ALL_CODE_POINTS if c < 0x700 or c % 41 == 0], CONTEXTS + MORE_CONTEXTS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cl100k", "o200k"])
def test_named_pretokens_equal_pythons_regex_on_every_code_point(name: str) -> None:
    hold_to_regex(name, ALL_CODE_POINTS, CONTEXTS + MORE_CONTEXTS)


PARTS = (
    " |  |   |\n|\r\n|\r|\t|\n\n|\n  \n|\x0b|\x85|\xa0|\u1680|\u2003|\u2028|\u2029|\u3000|"
    "'|'s|'S|'\u017f|'t|'ll|'LL|'lL|'ve|'VE|'re|'Re|'m|'d|'D|'K|'l|'r|''|"
    "a|b|z|A|Z|aB|Ab|HTTPServer|don't|it's|IT'S|x's't|é|É|\u017f|\u212a|ß|İ|Σ|ς|Ж|ж|ǅ|ᾈ|ª|ʰ|日|本語|日A|한|\u0627|ก็|क्ष|"
    "\u0301|\ufe0f|\u20e3|\u200d|e\u0301|!\u0301|1\u0301|"
    "0|12|123|1234|1234567|²|½|Ⅷ|٣|१२३४|\uff11\uff12|\U0001d7d8|"
    "!|?!|/|//|/\n|\n/|!\r\n/|-|—|“|”|…|€|🧑\u200d🚀|❤\ufe0f|<|\ufffd|\U000e0100"
).split("|")


def random_texts(count: int, seed: int) -> Iterator[str]:
    """Texts of parts that the patterns tell apart, some of them long enough for several blocks of 64 bytes."""
    rng = random.Random(seed)
    for i in range(count):
        parts = rng.choices(PARTS, k=rng.randrange(1, 12 if i % 4 else 80))
        if i % 3 == 0:
            parts.insert(rng.randrange(len(parts)), chr(rng.choice(ASSIGNED)))
        yield "".join(parts)


ASSIGNED = [c for c in ALL_CODE_POINTS if unicodedata.category(chr(c)) not in ("Cn", "Co")]
"""Known to this Python, hence to the older or equal Unicode of both engines."""


def hold_random_texts(name: str, count: int) -> None:
    k = bytekiln.train_bpe_from_iterator([], vocab_size=256, pattern=name)
    compiled = regex.compile(NAMED[name])
    for text in random_texts(count, seed=count):
        assert k.pretokenize(text) == [m.group() for m in compiled.finditer(text)], ascii(text)


@pytest.mark.parametrize("name", NAMED)
def test_named_pretokens_equal_pythons_regex_on_random_texts(name: str) -> None:
    hold_random_texts(name, 5_000)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMED)
def test_named_pretokens_equal_pythons_regex_on_a_hundred_thousand_random_texts(name: str) -> None:
    hold_random_texts(name, 100_000)


known_strings = strings.map(lambda t: "".join(c for c in t if unicodedata.category(c) != "Cn"))
"""Without code points that this Python's Unicode does not know: engines differ in what comes after theirs."""


@settings(max_examples=2000)
@given(known_strings, st.sampled_from(["gpt2", r"\w+|\W", r"\p{L}+(?=x)|\s", r"[^\s]+"]))
def test_pretokens_equal_pythons_regex_on_any_string(text: str, pattern: str) -> None:
    k = bytekiln.train_bpe_from_iterator([], vocab_size=256, pattern=pattern)
    source = GPT2_PATTERN if pattern == "gpt2" else pattern
    at, expected = 0, []
    for found in regex.finditer(source, text):
        if found.start() > at:  # what a pattern leaves out is a piece of its own
            expected.append(text[at : found.start()])
        if found.group():
            expected.append(found.group())
        at = found.end()
    assert k.pretokenize(text) == expected + ([text[at:]] if at < len(text) else [])


@pytest.mark.parametrize("name", ["cl100k", "o200k"])
def test_named_patterns_equal_tiktokens(name: str, shared_bytes: Callable[..., bytes]) -> None:
    """The patterns as tiktoken publishes them, run by Python's `regex`."""
    k = bytekiln.train_bpe_from_iterator([], vocab_size=256, pattern=name)
    for file in FILES:
        text = shared_bytes(file, 100_000).decode(errors="ignore")
        mine = k.pretokenize(text)
        assert mine == regex.findall(NAMED[name], text), file
        assert "".join(mine) == text


SAME_MERGES = [
    ("tinystories/tinystories_valid.txt.xz", 2000, -1),
    ("wikitext2/wt2_test.txt.xz", 4000, 1_000_000),
    ("multilingual/chatterbot_28_languages.yml.xz", 3000, -1),
    ("mixed/mixed_24mb.txt.xz", 6000, 2_000_000),
]


@pytest.mark.parametrize(("name", "size", "limit"), SAME_MERGES)
def test_merges_equal_hugging_face(name: str, size: int, limit: int, shared_bytes: Callable[..., bytes]) -> None:
    """All merges, in order, over the same documents."""
    documents = shared_bytes(name, limit).decode(errors="ignore").split(EOT)
    theirs = tokenizers.ByteLevelBPETokenizer()
    theirs.train_from_iterator(documents, vocab_size=size, min_frequency=1, show_progress=False)
    alphabet = {c: bytes([b]) for b, c in transcription().items()}
    merges = json.loads(theirs.to_str())["model"]["merges"]
    expected = [tuple(b"".join(alphabet[c] for c in half) for half in merge) for merge in merges]
    ours = bytekiln.train_bpe_from_iterator(documents, vocab_size=size, tie_break="huggingface")
    shared = min(len(expected), len(ours.merges))
    assert shared > size - 256 - 1 and ours.merges[:shared] == expected[:shared]


def rustbpe_tokens(documents: list[str], size: int) -> list[bytes]:
    trainer = pytest.importorskip("rustbpe", reason="rustbpe is not installed").Tokenizer()
    trainer.train_from_iterator(iter(documents), vocab_size=size, pattern=GPT2_PATTERN)
    return [bytes(token) for token, _ in sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])]


def bpeasy_tokens(documents: list[str], size: int) -> list[bytes]:
    train = pytest.importorskip("bpeasy", reason="bpeasy is not installed").train_bpe
    # The greatest length of a token is no limit here.
    ranks = train(iter(documents), GPT2_PATTERN, 1_000_000, size)
    return sorted(ranks, key=ranks.__getitem__)


@pytest.mark.parametrize("tokens", [rustbpe_tokens, bpeasy_tokens])
@pytest.mark.parametrize(("name", "size", "limit"), SAME_MERGES)
def test_merges_by_raw_bytes_equal_those_libraries(
    tokens: Callable[[list[str], int], list[bytes]],
    name: str,
    size: int,
    limit: int,
    shared_bytes: Callable[..., bytes],
) -> None:
    """All merges, in order. Both libraries take a pattern, here ours, and know no special tokens: the documents are cut
    before. A merge is told by its token: no token is made in two ways."""
    documents = shared_bytes(name, limit).decode(errors="ignore").split(EOT)
    ours = bytekiln.train_bpe_from_iterator(documents, vocab_size=size, tie_break="raw-bytes")
    assert [bytes([b]) for b in range(256)] + [a + b for a, b in ours.merges] == tokens(documents, size)


def transcription() -> dict[int, str]:
    """GPT-2's printable characters for bytes, from Hugging Face's own alphabet."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet(), key=ord)
    printable = [b for b in range(256) if chr(b) in alphabet]
    others = [b for b in range(256) if b not in printable]
    return {**{b: chr(b) for b in printable}, **dict(zip(others, (c for c in alphabet if ord(c) > 255), strict=True))}


def test_tiktoken_files_give_tiktokens_ids(tmp_path: Path) -> None:
    """Ranks that no list of merges explains (a token that ends as three parts) included."""
    ranks = {bytes([b]): b for b in range(256)}
    for token in (b"ab", b"bc", b"abc", b"cd", b"abcd", b"xyz", b"  ", b"zz", b"zzz"):
        ranks[token] = len(ranks)
    path = tmp_path / "odd.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % r for t, r in ranks.items()))
    ours = Tokenizer.from_file(path, pattern=r"\S+|\s+", special_tokens={EOT: len(ranks)})
    theirs = tiktoken.Encoding("odd", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={EOT: len(ranks)})

    @settings(max_examples=1000)
    @given(st.text("abcdxyz ", max_size=30))
    def same(text: str) -> None:
        assert ours.encode(text) == theirs.encode(text)

    same()


@pytest.mark.parametrize("pre_tokenizer", ["ByteLevel", "Split"])
def test_a_tokenizer_that_hugging_face_saved_is_read(pre_tokenizer: str, tmp_path: Path) -> None:
    text = "the kiln isn't warm 1234 naïve 日本 " * 20
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre_tokenizer == "ByteLevel")
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\w+|\s+|[^\w\s]+"), "isolated")
    steps = [level] if pre_tokenizer == "ByteLevel" else [split, level]
    theirs.pre_tokenizer = level if len(steps) == 1 else tokenizers.pre_tokenizers.Sequence(steps)
    theirs.decoder = tokenizers.decoders.ByteLevel()
    theirs.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=[EOT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    theirs.train_from_iterator([text], trainer)
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.from_file(tmp_path)
    assert ours.n_vocab == theirs.get_vocab_size() and ours.eot_id == theirs.token_to_id(EOT)
    for sample in (text, f"a{EOT}{EOT} b", "\n\n  x\u3000 y"):
        assert ours.encode(sample, allowed_special="all") == theirs.encode(sample).ids


@pytest.mark.slow
@pytest.mark.parametrize("name", ["books/books_64mb.txt.xz", "mixed/mixed_24mb.txt.xz"])
def test_32k_merges_equal_hugging_face_on_whole_files(name: str, shared_bytes: Callable[..., bytes]) -> None:
    documents = shared_bytes(name).decode(errors="ignore").split(EOT)
    theirs = tokenizers.ByteLevelBPETokenizer()
    theirs.train_from_iterator(documents, vocab_size=32_000, min_frequency=1, show_progress=False)
    alphabet = {c: bytes([b]) for b, c in transcription().items()}
    expected = [
        tuple(b"".join(alphabet[c] for c in half) for half in merge)
        for merge in json.loads(theirs.to_str())["model"]["merges"]
    ]
    ours = bytekiln.train_bpe_from_iterator(documents, vocab_size=32_000, tie_break="huggingface")
    shared = min(len(expected), len(ours.merges))
    assert shared >= 31_744 and ours.merges[:shared] == expected[:shared]


@settings(max_examples=600)
@given(known_strings, st.sampled_from(["cl100k", "o200k"]))
def test_named_patterns_give_hugging_faces_ids(
    named: dict[str, tuple[Tokenizer, object]], text: str, name: str
) -> None:
    ours, theirs = named[name]
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def named() -> dict[str, tuple[Tokenizer, object]]:
    """A tokenizer with long numbers and spaces in its vocabulary, ours and as Hugging Face loads it."""
    text = "121 234 567 1212 345 the Kiln's  clay\n\n   wet!!\n 12 !?/\n" * 20
    found = {}
    for name in ("cl100k", "o200k"):
        ours = bytekiln.train_bpe_from_iterator([text], vocab_size=340, pattern=name)
        found[name] = (ours, tokenizers.Tokenizer.from_str(ours.to_json()))
        numbers = "121234567 1234567890 12345"
        assert ours.encode(numbers) == found[name][1].encode(numbers).ids
    return found
