"""The thread changes when batches are made, never which; errors and Ctrl-C come through; no thread is left."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from bytekiln.batch import Batch
from bytekiln.prefetch import SLOW_STEPS, Prefetcher, Request


class Made:
    """A source that notes what was asked for, and in which thread."""

    def __init__(self, delay: float = 0.0) -> None:
        self.delay, self.asked, self.threads = delay, list[Request](), set[str]()
        self.fails: type[BaseException] | None = None

    def batch(self, step: int, first: int, place: int, count: int) -> Batch:
        self.asked.append((step, first, place, count))
        self.threads.add(threading.current_thread().name)
        time.sleep(self.delay)
        if self.fails is not None and step >= 2:
            raise self.fails(f"step {step}")
        return Batch(torch.tensor([[step, first, place, count]]), torch.zeros(1, 1), None, count)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before


def step_requests(step: int, first: int, micro: int = 2, size: int = 4) -> list[Request]:
    return [(step, first, m * size, size) for m in range(micro)]


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_batches_are_those_that_were_asked_for(depth: int) -> None:
    source, first = Made(), 0
    with Prefetcher(source, depth, worth_s=0) as ahead:
        for step in [0, 1, 2, 3, 7, 8, 2]:  # a jump ahead and one back, as after a resume
            micro = 4 if step >= 3 else 2  # and a batch that grows
            wanted = step_requests(step, first, micro)
            assert [b.inputs_BxT[0].tolist() for b in ahead.get(wanted)] == [list(r) for r in wanted]
            first += micro * 4
    names = {t for t in source.threads if t.startswith("bytekiln-prefetch")}
    assert bool(names) == (depth > 0)


def test_expected_steps_are_made_ahead_once_and_not_again() -> None:
    source = Made()
    with Prefetcher(source, 2, worth_s=0) as ahead:
        for step in range(6):
            ahead.get(step_requests(step, 8 * step))
            deadline = time.monotonic() + 5
            while len(source.asked) < 2 * (step + 3) and time.monotonic() < deadline:
                time.sleep(0.001)
    assert len(source.asked) == 2 * 8, "six steps and the two ahead, nothing twice"
    assert len(set(source.asked)) == len(source.asked)
    assert sum(name.startswith("bytekiln-prefetch") for name in source.threads) == 1


def test_a_rank_learns_how_far_the_step_moves() -> None:
    """A rank asks for its part of a step only; the first window moves by the whole step."""
    source = Made()
    with Prefetcher(source, 1, worth_s=0) as ahead:
        for step in range(5):
            ahead.get([(step, 100 * step, 8, 4)])
    asked_in_vain = set(source.asked) - {(s, 100 * s, 8, 4) for s in range(6)}
    assert asked_in_vain <= {(1, 4, 8, 4)}, "only the first guess is wrong"


def test_the_thread_begins_only_where_making_takes_long() -> None:
    quick, slow = Made(), Made(delay=0.003)
    with Prefetcher(quick, 2, worth_s=0.5) as ahead:
        for step in range(10):
            ahead.get(step_requests(step, 8 * step))
    assert quick.threads == {"MainThread"}
    with Prefetcher(slow, 2, worth_s=0.001) as ahead:
        for step in range(SLOW_STEPS):
            assert slow.threads <= {"MainThread"}
            ahead.get(step_requests(step, 8 * step))
        ahead.get(step_requests(SLOW_STEPS, 8 * SLOW_STEPS))
    assert any(name.startswith("bytekiln-prefetch") for name in slow.threads)


def test_batches_are_pinned_in_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for CUDA: which tensors are page-locked, and by whom."""
    by: list[str] = []

    def lock(tensor: torch.Tensor) -> torch.Tensor:
        by.append(threading.current_thread().name)
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", lock)
    with Prefetcher(Made(), 2, pin=True, worth_s=0) as ahead:
        for step in range(4):
            ahead.get(step_requests(step, 8 * step))
    assert len(by) >= 4 * 2 * 2, "inputs and targets of two micro-batches a step"
    assert any(name.startswith("bytekiln-prefetch") for name in by)
    by.clear()
    with Prefetcher(Made(), 2, worth_s=0) as ahead:
        ahead.get(step_requests(0, 0))
    assert by == []


def test_errors_cross_and_it_can_go_on() -> None:
    source = Made()
    source.fails = ValueError
    with Prefetcher(source, 2, worth_s=0) as ahead:
        for step in (0, 1):
            ahead.get(step_requests(step, 8 * step))
        for _ in range(2):
            with pytest.raises(ValueError, match="step 2"):
                ahead.get(step_requests(2, 16))
        source.fails = None
        assert ahead.get(step_requests(2, 16))[0].count == 4


def test_an_error_of_a_wrong_guess_is_nobodys() -> None:
    source = Made()
    source.fails = ValueError
    with Prefetcher(source, 2, worth_s=0) as ahead:
        for step in (0, 1, 0, 1, 0):  # steps 2 and 3 are made ahead and fail
            assert ahead.get(step_requests(step, 8 * step))[0].inputs_BxT[0, 0] == step


class Stuck(Made):
    """Steps after the first wait until they are let go."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()

    def batch(self, step: int, first: int, place: int, count: int) -> Batch:
        if step:
            assert self.go.wait(60)
        return super().batch(step, first, place, count)


def test_ctrl_c_comes_while_waiting_and_loses_nothing() -> None:
    source = Stuck()
    with Prefetcher(source, 1, worth_s=0) as ahead:
        ahead.get([(0, 0, 0, 4)])
        timer = threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGINT])
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            ahead.get([(1, 4, 0, 4)])
        timer.join()
        assert not source.go.is_set(), "the batch is still in the making"
        source.go.set()
        assert ahead.get([(1, 4, 0, 4)])[0].inputs_BxT[0, :2].tolist() == [1, 4]
    assert source.asked.count((1, 4, 0, 4)) == 1


def test_closing_drops_what_is_ahead_and_later_requests_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Stuck()
    ahead = Prefetcher(source, 8, worth_s=0)
    ahead.get([(0, 0, 0, 4)])
    assert ahead._pool is not None
    shutdown = ahead._pool.shutdown

    def let_go(*, wait: bool, cancel_futures: bool) -> None:
        source.go.set()
        shutdown(wait=wait, cancel_futures=cancel_futures)

    monkeypatch.setattr(ahead._pool, "shutdown", let_go)
    ahead.close()
    ahead.close()
    assert {step for step, *_ in source.asked} <= {0, 1}, "the one in the making is waited for, seven are not made"
    assert ahead.get([(9, 4, 0, 4)])[0].count == 4
