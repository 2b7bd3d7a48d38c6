"""The page of `bpe-inspect --html`: what stands in it, that no text gets out of its place, a browser’s view of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

import bytekiln
from browser import Browser
from bytekiln.inspect import page as page_module

EOT = "<|endoftext|>"
EVIL = "</span></style></div><script>window.evil=1</script><img src=x onerror='window.evil=1'>&amp;\"'"
TEXTS = [
    f"the kiln is warm\n\n\tand {EVIL}",
    "粘土 \u202eabc\u200d e\u0301 🔥",
    "שלום world",
    "the kiln is warm, the clay is wet " * 100,
]
OWN = bytekiln.train_bpe_from_iterator([t.replace("粘土", "粘") for t in TEXTS], vocab_size=330, special_tokens=[EOT])
BYTES = bytekiln.train_bpe_from_iterator([""], vocab_size=256)


class Reader(HTMLParser):
    """Tokens of a page in their blocks, and every tag."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[list[dict]] = []
        self.tags: list[str] = []
        self.depth = 0
        self.small = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        assert not any(k.startswith("on") or k in ("src", "href") for k in given), (tag, attrs)
        if given.get("class") == "tokens":
            self.blocks.append([])
        elif tag == "span" and (given.get("class") or "").startswith("t c"):
            self.blocks[-1].append({"title": given["title"], "colour": given["class"], "text": "", "id": ""})
            self.depth = 1
        self.small = tag == "small"

    def handle_endtag(self, tag: str) -> None:
        self.small = False
        if tag == "span":
            self.depth = 0

    def handle_data(self, data: str) -> None:
        if self.depth:
            self.blocks[-1][-1]["id" if self.small else "text"] += data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizers, a text, and its page."""
    from bytekiln.cli import run

    made = tmp_path_factory.mktemp("page")
    OWN.save(made / "own.json")
    BYTES.save(made / "bytes.json")
    (made / "evil<b>.txt").write_text(EOT.join(TEXTS), encoding="utf-8")
    names = [str(made / n) for n in ("own.json", "bytes.json")]
    assert run("bpe-inspect", [*names, "--text", str(made / "evil<b>.txt"), "--html", str(made / "p.html")]) == 0
    return made


def test_every_token_stands_there_with_its_id(folder: Path) -> None:
    reader = Reader()
    reader.feed((folder / "p.html").read_text("utf-8"))
    assert len(reader.blocks) == 2 * len(TEXTS)
    for k, text in enumerate(TEXTS):
        for tokenizer, block in zip((OWN, BYTES), reader.blocks[2 * k : 2 * k + 2], strict=True):
            ids = tokenizer.encode(text)
            shown = ids[: len(block)]
            assert [int(t["id"]) for t in block] == shown
            assert len(tokenizer.decode_bytes(shown)) >= min(len(text.encode()), page_module.SHOWN_BYTES)
            assert all(re.match(rf"id {t['id']}, \d+ bytes? from \d+$", t["title"]) for t in block)
            assert all(a["colour"] != b["colour"] for a, b in pairwise(block))
    whole = "".join(t["text"] for t in reader.blocks[0]).replace("·", " ").replace("⏎", "\n").replace("⇥", "\t")
    assert whole == TEXTS[0], "white space is seen, and everything of the text is there"
    odd = "".join(t["text"] for t in reader.blocks[2])
    assert r"\u202e" in odd and r"\u200d" in odd and "\u202e" not in odd and "\u200d" not in odd
    assert r"\xe5" in "".join(t["text"] for t in reader.blocks[3]), "parts of characters are bytes"


def test_nothing_gets_out_of_its_place(folder: Path) -> None:
    text = (folder / "p.html").read_text("utf-8")
    reader = Reader()
    reader.feed(text)
    assert not {"script", "img", "link", "iframe", "object"} & set(reader.tags) and reader.tags.count("style") == 1
    assert "http://" not in text and "https://" not in text and "url(" not in text
    assert "default-src 'none'" in text and "evil&lt;b&gt;.txt" in text


def test_the_numbers_are_those_of_the_table(folder: Path, command) -> None:
    line = ["bpe-inspect", folder / "own.json", folder / "bytes.json", "--text", folder / "evil<b>.txt", "--json"]
    found = json.loads(command(*line).stdout)
    text = (folder / "p.html").read_text("utf-8")
    for f in found:
        assert f"{f['documents']['bytes_per_token']:.3f} bytes a token" in text
    for script in found[0]["documents"]["scripts"]:
        assert f'<th scope="row">{script}</th>' in text
    assert f"{100 * (found[1]['against_first']['tokens_ratio'] - 1):.1f} % more tokens" in text


def test_colours_can_be_read(folder: Path) -> None:
    """WCAG's contrast of text on every token's colour, 4.5 and more, in both themes; and neighbours' colours differ."""
    style = (folder / "p.html").read_text("utf-8").split("<style>")[1].split("</style>")[0]
    themes = re.findall(r"color-scheme: (light|dark);(.*?)\}", style, re.DOTALL)
    assert [t for t, _ in themes] == ["light", "dark", "dark"]
    for _, rules in themes:
        colours = dict(re.findall(r"--(\w+): (#\w{6})", rules))
        tokens = [colours[f"t{i}"] for i in range(page_module.COLOURS)]
        assert all(contrast(colours["ink"], c) >= 7 for c in tokens) and len(set(tokens)) == len(tokens)
        assert contrast(colours["faint"], colours["paper"]) >= 4.5 and contrast(colours["ink"], colours["paper"]) >= 7
        assert all(contrast(colours["edge"], c) >= 3 for c in tokens), "the edge tells tokens apart without colours"
    assert themes[1][1].split() == themes[2][1].split(), "dark by choice is dark by the system"


def contrast(a: str, b: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(a), luminance(b)))
    return (light + 0.05) / (dark + 0.05)


def test_a_page_of_a_large_text_is_small(command, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("the kiln is warm " * 40_000)
    BYTES.save(tmp_path / "bytes.json")
    command("bpe-inspect", "bytes.json", "--text", "long.txt", "--html", "p.html")
    assert (tmp_path / "p.html").stat().st_size < 250_000
    assert "the first 1,200 shown" in (tmp_path / "p.html").read_text("utf-8")


def test_a_text_without_text(command, tmp_path: Path) -> None:
    BYTES.save(tmp_path / "bytes.json")
    (tmp_path / "x.jsonl").write_text('{"text": ""}\n')
    command("bpe-inspect", "bytes.json", "--text", "x.jsonl", "--html", "p.html")
    assert "no text to compress" in (tmp_path / "p.html").read_text("utf-8")


def test_where_a_page_goes(command, corpus: Path, tmp_path: Path) -> None:
    BYTES.save(tmp_path / "bytes.json")
    line = ["bpe-inspect", "bytes.json", "--text", "corpus.txt", "--html"]
    found = command(*line, "p.html", "--json")
    assert "wrote p.html" in found.stderr and json.loads(found.stdout)["documents"]["count"] == 60
    before = (tmp_path / "p.html").read_bytes()
    assert "--overwrite" in command(*line, "p.html", status=2).stderr
    assert (tmp_path / "p.html").read_bytes() == before
    command(*line, "p.html", "--overwrite")
    assert "mkdir -p none" in command(*line, "none/p.html", status=2).stderr
    for name in ("corpus.txt", "bytes.json"):
        assert "is one of the inputs" in command(*line, name, "--overwrite", status=2).stderr


# --- in a browser --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def test_it_loads_alone_and_quietly(browser: Browser, folder: Path) -> None:
    browser.console.clear()
    browser.requests.clear()
    browser.open(folder / "p.html")
    assert browser.console == [] and browser.requests == [(folder / "p.html").as_uri()]
    assert browser.run("window.evil === undefined")
    assert browser.run("document.querySelectorAll('.tokens').length") == 2 * len(TEXTS)


def test_themes_and_ids_are_switched_without_a_script(browser: Browser, folder: Path) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    for scheme in ("light", "dark"):
        browser.prefer(scheme)
        browser.open(folder / "p.html")
        assert browser.run(paper) == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 28)"}[scheme]
        browser.run("document.getElementById('light').click()")
        assert browser.run(paper) == "rgb(255, 255, 255)"
        browser.run("document.getElementById('dark').click()")
        assert browser.run(paper) == "rgb(20, 23, 28)"
    shown = "getComputedStyle(document.querySelector('.t small')).display"
    assert browser.run(shown) == "block"
    browser.run("document.getElementById('ids').click()")
    assert browser.run(shown) == "none"


def test_it_fits_a_telephone(browser: Browser, folder: Path) -> None:
    browser.size(380)
    browser.open(folder / "p.html")
    assert browser.run("document.documentElement.scrollWidth") <= 380
    browser.size(1200)
