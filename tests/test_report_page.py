"""The report in a real browser: it loads, sorts, toggles, follows the theme, and fits a telephone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from browser import Browser
from bytekiln.report.build import read_report, write_page
from report_files import rows_to, write_run, write_sweep

READY = "document.documentElement.dataset.ready === '1'"
EVIL = '<img src=x onerror="window.evil=1"><script>window.evil=1</script>'


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A learning-rate sweep with a diverged run, names and samples that attack; a single run; one that has no step."""
    folder = tmp_path_factory.mktemp("pages")
    runs: dict = {}
    for k, lr in enumerate((3e-4, 6e-4, 1.2e-3)):
        for seed in (1, 2):
            runs[f"lr={lr:g},seed={seed}"] = (None, {"lr": lr, "seed": seed}, 3.0 + 0.1 * abs(k - 1) + 0.003 * seed * k)
    long = f"a-very-long-name-{'x' * 90}"
    runs[long] = (None, {"lr": 0.5, "seed": 1}, 3.9)
    sweep = write_sweep(
        folder / "sweep", runs, question=f"Which? {EVIL}", baseline="lr=6e-4", layers=True, samples={EVIL: EVIL}
    )
    write_run(sweep / f"runs/{EVIL.replace('/', '-')[:60]}", rows=rows_to(3.0)[:9], status="diverged", lr=10.0)
    write_run(folder / "one", 3.1)
    write_run(folder / "none", rows=[], result=False)
    out = {}
    for name in ("sweep", "one", "none"):
        out[name] = folder / f"{name}.html"
        write_page(read_report([folder / name], title=f"{name} {EVIL}"), out[name], overwrite=False)
    return out


@pytest.fixture
def sweep(browser: Browser, pages: dict[str, Path]) -> Browser:
    browser.console.clear()
    browser.requests.clear()
    browser.prefer("light")
    browser.size(1280)
    browser.open(pages["sweep"], READY)
    return browser


@pytest.mark.parametrize("name", ["sweep", "one", "none"])
@pytest.mark.parametrize("width", [1280, 400])
def test_it_loads_without_errors_and_fits(browser: Browser, pages: dict[str, Path], name: str, width: int) -> None:
    browser.console.clear()
    browser.requests.clear()
    browser.size(width)
    for scheme in ("light", "dark"):
        browser.prefer(scheme)
        browser.open(pages[name], READY)
        assert browser.run("document.scrollingElement.scrollWidth") <= width
        assert browser.run("document.documentElement.dataset.theme") == scheme
        small = "[...document.querySelectorAll('svg text')].filter(t => t.getBoundingClientRect().height < 8).length"
        assert browser.run(small) == 0, "legible"
        beyond = "t => t.getBoundingClientRect().right > innerWidth"
        out = f"[...document.querySelectorAll('svg text')].filter({beyond}).length"
        assert browser.run(out) == 0
    assert browser.console == [] and browser.run("bytekilnReport.errors") == []
    assert {r.partition(":")[0] for r in browser.requests} == {"file"} and len(browser.requests) == 2, "nothing else"
    assert browser.run("window.evil") is None


def test_pictures_exist(sweep: Browser) -> None:
    charts = sweep.run("[...document.querySelectorAll('figure[data-chart]')].map(f => f.dataset.chart)")
    assert set(charts) >= {"val_loss", "loss", "rates", "deltas", "gap", "lr", "grad_norm", "speed", "layers", "counts"}
    assert sweep.run("bytekilnReport.charts") == len(charts), "every figure has its chart"
    assert sweep.run("document.querySelectorAll('figure[data-chart=val_loss] path').length") >= 7
    drawn = "[...document.querySelectorAll('svg')].every(s => s.getBoundingClientRect().width > 200)"
    assert sweep.run(drawn)
    assert not sweep.run("[...document.querySelectorAll('path')].some(p => /NaN|Infinity|undefined/.test(p.outerHTML))")
    assert sweep.run("[...document.querySelectorAll('svg')].every(s => s.getAttribute('aria-label'))")


def test_tables_sort(sweep: Browser) -> None:
    column = (
        "(() => { const t = document.querySelector('table'), h = [...t.tHead.rows[0].cells];"
        " const i = h.findIndex(c => c.textContent === 'best val');"
        " return [...t.tBodies[0].rows].map(r => r.cells[i].textContent); })()"
    )
    button = "[...document.querySelectorAll('th button')].find(b => b.textContent === 'best val')"
    before = sweep.run(column)
    sweep.run(f"{button}.click()")
    up = sweep.run(column)
    assert sorted(up) == sorted(before) and up != before
    assert up == sorted(up), "numbers, what is not known last"
    assert sweep.run(f"{button}.closest('th').getAttribute('aria-sort')") == "ascending"
    sweep.run(f"{button}.focus()")
    sweep.press("Enter")
    known = [v for v in sweep.run(column) if v != "—"]
    assert known == sorted(known, reverse=True)
    name = "[...document.querySelectorAll('th button')].find(b => b.textContent === 'run')"
    sweep.run(f"{name}.click()")
    first = sweep.run("[...document.querySelector('table').tBodies[0].rows].map(r => r.cells[0].textContent)")
    assert len(first) == 8 and len(set(first)) == 8


def test_toggles(sweep: Browser) -> None:
    paths = "document.querySelectorAll('figure[data-chart=val_loss] path').length"
    axis = "[...document.querySelectorAll('figure[data-chart=val_loss] text')].map(t => t.textContent).at(-1)"
    before = sweep.run(paths)
    sweep.run("document.querySelector('#legend button').click()")
    assert sweep.run(paths) == before - 2, "a group of two seeds"
    assert sweep.run("document.querySelector('#legend button').getAttribute('aria-pressed')") == "false"
    sweep.run("document.querySelector('#show-none').click()")
    assert sweep.run(paths) == 0
    sweep.run("document.querySelector('#show-all').click()")
    assert sweep.run(paths) == before
    for value, name in (("tokens", "tokens"), ("time", "time"), ("step", "step")):
        sweep.run(f"(() => {{ const s = document.querySelector('#axis'); s.value = '{value}';"
                  " s.dispatchEvent(new Event('change')); })()")  # fmt: skip
        assert name in sweep.run("document.querySelector('figure[data-chart=val_loss] svg').textContent"), axis
    for box in ("logx", "logy", "raw"):
        shape = "document.querySelector('figure[data-chart=loss] svg').outerHTML"
        was = sweep.run(shape)
        sweep.run(f"document.querySelector('#{box}').click()")
        assert sweep.run(shape) != was
    for part in ("half", "tenth"):
        sweep.run(f"(() => {{ const s = document.querySelector('#part'); s.value = '{part}';"
                  " s.dispatchEvent(new Event('change')); })()")  # fmt: skip
    assert sweep.run("bytekilnReport.charts") > 8
    kinds = sweep.run("[...document.querySelector('#layer-kind').options].map(o => o.value)")
    assert kinds == ["gradient", "weight", "activation"]
    for kind in kinds:
        sweep.run(f"(() => {{ const s = document.querySelector('#layer-kind'); s.value = '{kind}';"
                  " s.dispatchEvent(new Event('change')); })()")  # fmt: skip
        assert sweep.run("document.querySelectorAll('figure[data-chart=layers] rect').length") > 30
    assert sweep.console == []


def test_values_are_read_by_keyboard(sweep: Browser) -> None:
    sweep.run("document.querySelector('figure[data-chart=val_loss] svg').focus()")
    for _ in range(3):
        sweep.press("ArrowRight")
    said = sweep.run("document.querySelector('figure[data-chart=val_loss] .tip').textContent")
    assert said.startswith("step ") and "lr=0.0003,seed=1" in said
    sweep.press("Escape")
    assert sweep.run("document.querySelector('.tip')") is None


def test_the_theme_is_the_users(sweep: Browser) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    light = sweep.run(paper)
    sweep.run("document.querySelector('#theme').click()")
    assert sweep.run(paper) != light
    sweep.run("document.querySelector('#theme').click()")
    assert sweep.run(paper) == light
    sweep.prefer("dark")
    assert sweep.run("document.documentElement.dataset.theme") == "light", "a choice holds"
    sweep.run("localStorage.clear()")


def test_text_has_contrast(browser: Browser, pages: dict[str, Path]) -> None:
    """Of WCAG 2.1 AA, 4.5 to 1, for text on the page's ground; 3 to 1 for the lines of up to eight groups."""
    ratio = """(() => {
      const part = v => { v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
      const of = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number);
                        return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b); };
      const against = (a, b) => { const [x, y] = [of(a), of(b)].sort((m, n) => n - m);
                                  return (x + 0.05) / (y + 0.05); };
      const paper = getComputedStyle(document.body).backgroundColor;
      const texts = ['h1', '.asked', '.note', 'figcaption', 'td', '.status'].map(s =>
        against(getComputedStyle(document.querySelector(s)).color, paper));
      const lines = [...document.querySelectorAll('.legend .sw')].map(s =>
        against(getComputedStyle(s).backgroundColor, paper));
      return [Math.min(...texts), Math.min(...lines)];
    })()"""
    browser.size(1280)
    browser.open(pages["sweep"], READY)
    browser.run("localStorage.clear()")
    for scheme in ("light", "dark"):
        browser.prefer(scheme)
        browser.open(pages["sweep"], READY)
        text, lines = browser.run(ratio)
        assert text >= 4.5 and lines >= 3, scheme
