"""Published losses as data, and what a run of a given size may reach beside them. Imports no torch.

In: the name of a table in `presets/yardsticks`, or a TOML file of the same form. Out: a `Yardstick`. Called by `plan`,
before a run, and by `entry`, behind it. The law between runs is the simplest that their logs carry: near its size every
doubling of the operations takes the same from the loss.
"""

from __future__ import annotations

import math
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from bytekiln.config import read_table
from bytekiln.console import nearest
from bytekiln.errors import ConfigError, FormatError


class Published(NamedTuple):
    """A loss that somebody has reached."""

    name: str
    loss: float


class Expectation(NamedTuple):
    """A loss that may be reached, in nats a token."""

    loss: float
    plus_minus: float
    """Half of the range that the sources give, and what the law's own slope adds to it."""


class BreakEven(NamedTuple):
    """What it takes to come to a published loss."""

    published: Published
    flops: float
    mfu: float | None
    """Utilisation of the device at which the run's time is enough; None where its peak is unknown."""


class Yardstick(NamedTuple):
    """What is known about losses on one text with one size of vocabulary."""

    title: str
    source: str
    low: float
    high: float
    """Losses between which the reference run is expected."""
    flops: float
    """Its training operations."""
    slopes: tuple[float, float]
    """Nats that a doubling of the operations takes from the loss: least and most."""
    published: tuple[Published, ...]

    def expected(self, flops: float) -> Expectation:
        """The loss of a run of so many training operations.

        >>> y = Yardstick("text", "somewhere", 2.93, 3.01, 2e18, (0.09, 0.13), ())
        >>> [round(x, 3) for x in y.expected(2e18)], [round(x, 3) for x in y.expected(1e18)]
        ([2.97, 0.04], [3.08, 0.06])
        """
        doublings = math.log2(flops / self.flops)
        least, most = self.slopes
        loss = (self.low + self.high) / 2 - (least + most) / 2 * doublings
        return Expectation(loss, (self.high - self.low) / 2 + (most - least) / 2 * abs(doublings))

    def break_even(self, loss: float) -> float:
        """The training operations at which `loss` is what is expected.

        >>> y = Yardstick("text", "somewhere", 2.93, 3.01, 2e18, (0.09, 0.13), ())
        >>> round(y.break_even(3.08) / 1e18, 6)
        1.0
        """
        least, most = self.slopes
        return float(self.flops * 2 ** (((self.low + self.high) / 2 - loss) / ((least + most) / 2)))


class Prospect(NamedTuple):
    """A planned run beside what is known."""

    yardstick: Yardstick
    expected: Expectation
    mfu: float | None
    """Utilisation that the plan assumes."""
    break_even: tuple[BreakEven, ...]

    def as_json(self) -> dict[str, object]:
        """For `lm-plan --json`."""
        return {
            "title": self.yardstick.title,
            "source": self.yardstick.source,
            "expected_loss": self.expected.loss,
            "plus_minus": self.expected.plus_minus,
            "assumed_mfu": self.mfu,
            "published": [
                {**b.published._asdict(), "break_even_flops": b.flops, "break_even_mfu": b.mfu} for b in self.break_even
            ],
        }


def prospect(yardstick: Yardstick, flops: float, mfu: float | None) -> Prospect:
    """What a run of so many operations, in the time that `mfu` makes them take, may come to.

    >>> y = Yardstick("text", "somewhere", 2.93, 3.01, 2e18, (0.09, 0.13), (Published("they", 3.08),))
    >>> round(prospect(y, 2e18, 0.4).break_even[0].mfu or 0.0, 6)
    0.2
    """
    found = []
    for entry in yardstick.published:
        needed = yardstick.break_even(entry.loss)
        found.append(BreakEven(entry, needed, None if mfu is None else mfu * needed / flops))
    return Prospect(yardstick, yardstick.expected(flops), mfu, tuple(found))


def yardsticks() -> list[str]:
    """Names of the shipped tables."""
    folder = resources.files("bytekiln") / "presets" / "yardsticks"
    return sorted(p.name.removesuffix(".toml") for p in folder.iterdir() if p.name.endswith(".toml"))


def load_yardstick(name: str) -> Yardstick:
    """A shipped table by its name, or a file's.

    Raises:
        ConfigError: there is neither.
        FileError, FormatError: the file cannot be read, or a value is missing in it.
    """
    path = Path(str(resources.files("bytekiln") / "presets" / "yardsticks" / f"{name}.toml"))
    if name not in yardsticks():
        path = Path(name)
        if not path.is_file():
            meant = nearest(name, yardsticks())
            hint = f"did you mean {meant}?" if meant else f"shipped ones: {', '.join(yardsticks())}"
            raise ConfigError(f"yardstick: found {name}, neither a shipped table nor a file; {hint}")
    table = read_table(path)
    try:
        return _of(table)
    except (KeyError, TypeError, ValueError) as exc:
        raise FormatError(
            f"{path}: found no usable {exc}; expected title, source, nats_per_doubling = [least, most], "
            "[expected] with loss = [low, high] and flops, and [[published]] with name and loss"
        ) from None


def _of(table: dict[str, Any]) -> Yardstick:
    low, high = map(float, table["expected"]["loss"])
    least, most = map(float, table["nats_per_doubling"])
    flops = float(table["expected"]["flops"])
    if not (0 < least <= most and 0 < low <= high and flops > 0):
        raise ValueError("numbers above 0, the lesser first")
    published = tuple(Published(str(p["name"]), float(p["loss"])) for p in table["published"])
    return Yardstick(str(table["title"]), str(table["source"]), low, high, flops, (least, most), published)
