"""How far a run is, and when it is over: by steps, tokens, seconds, or patience.

In: the steps that were launched, and what evaluations and checkpoints took. Out: the place of the next step in the
schedule, and the reason to stop. Called by `loop`.

Counted are launched steps, whose numbers may still be on the device; a reason to stop is the same in all processes.
"""

from __future__ import annotations

import time

from bytekiln.config import RunConfig
from bytekiln.ranks import Ranks
from bytekiln.run_state import State
from bytekiln.schedule import Progress

SAVES_AT_THE_END = 3
"""Checkpoints that may follow the last step: the best, a numbered and the final one."""


EXIT_S, EXIT_SHARE = 1.0, 0.02
"""What a process may take to write its result and end, on a busy machine; at most this share of `max_time`."""


class Horizon:
    """The end of a run, as it is seen from where the run stands."""

    def __init__(self, config: RunConfig, ranks: Ranks, began: float) -> None:
        """A run that began at `began` of `time.perf_counter()`; see `resume` for one that goes on."""
        self.config, self.ranks, self.began, self.elapsed_before = config, ranks, began, 0.0
        self.step, self.windows, self.tokens = 0, 0, 0
        self.over: tuple[str, str] | None = None
        """Status and reason, once the run is over. Decided by `look_ahead` alone: time passes between two questions."""
        self.step_s = 0.0
        """The longest step lately."""
        self.share_of_time = 0.0
        self.pause_at = 0
        """Step at which the run pauses; 0: none."""

    @property
    def paused(self) -> bool:
        """Whether the run has come to the step at which it pauses."""
        return 0 < self.pause_at <= self.step

    def resume(self, state: State, spent_s: float = 0.0) -> None:
        """Go on from where `state` stands; this process's own start counts, the time between the two does not.

        Args:
            state: of the checkpoint.
            spent_s: time that the run had spent when it was killed, if that was after the checkpoint.
        """
        self.step, self.windows, self.tokens = state.step, state.windows, state.tokens
        self.elapsed_before = max(state.elapsed_s, spent_s)

    def launched(self, windows: int, tokens: int) -> None:
        """One step more is under way; it reads up to window `windows`."""
        self.step, self.windows, self.tokens = self.step + 1, windows, self.tokens + tokens

    def took(self, seconds: float) -> None:
        """A step took so long."""
        self.step_s = max(seconds, 0.9 * self.step_s)

    def elapsed_s(self) -> float:
        """Time spent on the run, earlier parts included."""
        return self.elapsed_before + time.perf_counter() - self.began

    def counted_s(self, state: State) -> float:
        """The clock of `max_time`: the first process's, since all must end at the same step."""
        steps_only = self.config.training.max_time_counts == "steps"
        return self.ranks.firsts(state.training_s if steps_only else self.elapsed_s())

    def limit_s(self, state: State) -> float:
        """What `max_time` leaves for steps: the last evaluation and checkpoints must end inside it too."""
        t = self.config.training
        last_saves = SAVES_AT_THE_END * state.saving_s
        reserve = (
            0.0
            if t.max_time_counts == "steps"
            else 1.1 * (state.evaluation_s + last_saves) + min(EXIT_S, EXIT_SHARE * t.max_time)
        )
        return self.ranks.firsts(t.max_time - reserve - self.step_s)

    def place(self, state: State) -> Progress:
        """Where the next step stands in the run."""
        t = self.config.training
        if not t.max_time:
            return Progress(self.step, t.max_steps, self.tokens, t.token_budget, 0.0, 0.0)
        limit = max(self.limit_s(state), 1e-3)
        # The first evaluation is the slowest, so the limit rises again; the schedule must not run backwards with it.
        counted = self.counted_s(state)
        # Behind this step no other will fit: it is the schedule's end, however much of the run a step takes.
        share = 1.0 if counted + self.ranks.firsts(self.step_s) > limit else counted / limit
        self.share_of_time = max(self.share_of_time, share)
        return Progress(self.step, t.max_steps, self.tokens, t.token_budget, self.share_of_time * limit, limit)

    def near(self, state: State) -> bool:
        """Whether so little of `max_time` is left that each step has to be waited for."""
        return self.config.training.max_time > 0 and self.counted_s(state) > 0.95 * self.limit_s(state)

    def look_ahead(self, state: State) -> None:
        """Decide whether the run is over: behind each step, whose row is then evaluated, and behind each evaluation."""
        self.over = self._end(state)

    def _end(self, state: State) -> tuple[str, str] | None:
        t = self.config.training
        if t.early_stopping_patience and state.waiting >= t.early_stopping_patience:
            return "early_stopped", f"{state.waiting} evaluations in succession without a better validation loss"
        if self.step >= t.max_steps:
            return "completed", "all steps done"
        if t.token_budget and self.tokens >= t.token_budget:
            return "completed", f"{t.token_budget:,} tokens read"
        if t.max_time and self._time_is_over(state):
            if not self.step:
                return (
                    "completed",
                    f"the {t.max_time:g} s were over before the first step: {self._where_it_went(state)}",
                )
            return "completed", f"the {t.max_time:g} s are over"
        return None

    def _time_is_over(self, state: State) -> bool:
        """Behind the step that was the schedule's end.

        One that took longer than any before it may have used up the time before that: there is room for one more.
        """
        if self.share_of_time >= 1:
            return True
        return self.counted_s(state) > self.limit_s(state) + self.ranks.firsts(self.step_s)

    def _where_it_went(self, state: State) -> str:
        limit = self.config.training.max_time - self.limit_s(state)
        return f"{self.counted_s(state):.1f} s went to the start, {limit:.1f} s are kept for the end"

    def job(self) -> tuple[float, str]:
        """The whole of the run, in what its progress counts."""
        t = self.config.training
        jobs = {"steps": (t.max_steps, "steps"), "tokens": (t.token_budget, "tokens"), "seconds": (t.max_time, "s")}
        return jobs[self.config.progress]

    def is_late(self) -> bool:
        """Whether all of `max_time` is over, where it counts everything."""
        t = self.config.training
        return t.max_time > 0 and t.max_time_counts == "all" and self.elapsed_s() > t.max_time

    def done(self, state: State) -> float:
        """How much of `job` is behind."""
        if self.config.progress == "seconds":
            return self.counted_s(state)
        return state.tokens if self.config.progress == "tokens" else state.step


def limits(config: RunConfig) -> tuple[float, ...]:
    """What can be moved to make a run that is over go on."""
    t = config.training
    return t.max_steps, t.max_time, t.token_budget, t.early_stopping_patience
