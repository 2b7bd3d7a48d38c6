"""lm-evaluation-harness drives our models: `HarnessLM`, also found as `bytekiln.evaluate.HarnessLM`.

In: a run, a checkpoint or a `Scorer`, and the harness's requests. Out: what its `LM` interface asks: log-likelihoods,
rolling log-likelihoods, generated text. Called by users, whose program imports it, and thereby by the harness:

    from bytekiln.evaluate import HarnessLM
    lm_eval.simple_evaluate(HarnessLM("runs/demo"), tasks=["hellaswag"])

The harness is imported when the class is first asked for (extra `[eval]`), never by importing this module.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from importlib import import_module
from typing import Any

from bytekiln.errors import ConfigError, MissingExtraError
from bytekiln.sample import Sampling, generate
from bytekiln.score.choices import Request, encode_pair, is_truncated, likelihoods
from bytekiln.score.scorer import Scorer, open_scorer

MOST_TOKENS = 256
"""Tokens that `generate_until` draws where the task says nothing."""


def __getattr__(name: str) -> Any:  # noqa: ANN401 - what a module has
    if name == "HarnessLM":
        return _adapter()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _belong(one: Any, other: Any) -> bool:  # noqa: ANN401 - the harness's Instance
    """Whether two requests ask about the same document, or begin alike where the harness does not say."""
    if one.doc_id is None or other.doc_id is None:
        return bool(one.args[0] == other.args[0])
    return bool((one.task_name, one.doc_id) == (other.task_name, other.doc_id))


@cache
def _adapter() -> type:
    """The class, made once the harness is there to inherit from."""
    try:
        base = import_module("lm_eval.api.model").LM
        utils = import_module("lm_eval.utils")
    except ImportError:
        raise MissingExtraError(
            'lm_eval: not installed; expected lm-evaluation-harness, by pip install "bytekiln[eval]"'
        ) from None

    class HarnessLM(base):  # type: ignore[misc, valid-type]
        """A model of ours as the harness's `LM`.

        Attributes:
            scorer: the model, its tokenizer and its settings.
            truncated: requests so far that did not fit into the context and were cut off from the left.
        """

        def __init__(
            self,
            run: str | Scorer = "",
            *,
            tokenizer: str | None = None,
            device: str | None = None,
            batch_size: int | str = 32,
            max_batch_size: int | None = None,
            context_length: int = 0,
            precision: str = "fp32",
        ) -> None:
            """Open a run or a checkpoint, or take a scorer; the rest is as in `lm-score`.

            `batch_size` "auto" is 32; `max_batch_size` is there because the harness hands it over.

            Raises:
                ConfigError, FileError, FormatError, MismatchError: as `open_scorer`.
            """
            super().__init__()
            if isinstance(run, Scorer):
                self.scorer = run
            else:
                from bytekiln.prepare import find_device

                if not run:
                    raise ConfigError("run: found nothing; expected a run folder or a checkpoint")
                size = 32 if str(batch_size).startswith("auto") else int(batch_size)
                self.scorer = open_scorer(
                    run,
                    tokenizer=tokenizer,
                    device=find_device(device or "cpu"),
                    context_length=context_length,
                    batch_size=min(size, max_batch_size or size),
                    precision=precision,
                )
            if self.scorer.tokenizer is None:
                raise ConfigError(f"{self.scorer.name}: found no tokenizer.json in the run; expected tokenizer=FILE")
            self.tokenizer = self.scorer.tokenizer
            self.truncated = 0
            self._device = self.scorer.device

        @property
        def tokenizer_name(self) -> str:
            """By which the harness tells cached requests apart."""
            return self.tokenizer.hash

        @property
        def max_length(self) -> int:
            """Positions that the model sees."""
            return self.scorer.context_length

        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            """Of every (context, continuation): the sum of ln p, and whether greedy decoding would write it.

            Requests of one document that stand side by side share what their contexts have in common.
            """
            pairs = [encode_pair(self.tokenizer, *request.args[:2]) for request in requests]
            groups: list[list[int]] = []
            for i, request in enumerate(requests):
                if groups and _belong(requests[groups[-1][0]], request):
                    groups[-1].append(i)
                else:
                    groups.append([i])
            found = self._likelihoods([[pairs[i] for i in group] for group in groups])
            out: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
            for group, answers in zip(groups, found, strict=True):
                for i, answer in zip(group, answers, strict=True):
                    out[i] = answer
                    self.cache_hook.add_partial("loglikelihood", requests[i].args, answer)
            return out

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            """Of every text: the sum of ln p of all its tokens, in disjoint windows behind an end-of-text token.

            Raises:
                ConfigError: the tokenizer has no end-of-text token.
            """
            eot = self.tokenizer.eot_id
            if eot is None:
                raise ConfigError("loglikelihood_rolling: found a tokenizer without end-of-text token; expected one")
            windows: list[list[Request]] = []
            owner: list[int] = []
            for i, request in enumerate(requests):
                ids = self.tokenizer.encode(request.args[0], allowed_special="all")
                rolling = utils.get_rolling_token_windows(
                    token_list=ids, prefix_token=eot, max_seq_len=self.max_length, context_len=1
                )
                for window in map(utils.make_disjoint_window, rolling):
                    windows.append([Request(*window)])
                    owner.append(i)
            out = [0.0] * len(requests)
            for i, (answer,) in zip(owner, self._likelihoods(windows), strict=True):
                out[i] += answer[0]
            for request, value in zip(requests, out, strict=True):
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
            return out

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            """Of every (context, options): what comes next, up to the first of the stops."""
            out = []
            for request in requests:
                context, options = request.args[:2]
                stops = options.get("until") or []
                text = self._continued(context, [stops] if isinstance(stops, str) else stops, options)
                out.append(text)
                self.cache_hook.add_partial("generate_until", request.args, text)
            return out

        def _likelihoods(self, groups: Sequence[Sequence[Request]]) -> list[list[tuple[float, bool]]]:
            length = self.max_length
            self.truncated += sum(is_truncated(request, length) for group in groups for request in group)
            found: dict[int, list[tuple[float, bool]]] = {}
            for some in likelihoods(self.scorer, groups):
                found.update({i: [(a.loglikelihood, a.greedy) for a in answers] for i, answers in some.items()})
            return [found[i] for i in range(len(groups))]

        def _continued(self, context: str, stops: Iterable[str], options: dict[str, Any]) -> str:
            tokens, eot = self.tokenizer, self.tokenizer.eot_id
            most = int(options.get("max_gen_toks", MOST_TOKENS))
            ids = tokens.encode(context, allowed_special="all") or ([eot] if eot is not None else [])
            ids = ids[-max(1, self.max_length - most) :]
            warm = float(options.get("temperature", 0.0)) if options.get("do_sample") else 0.0
            sampling = Sampling(warm, float(options.get("top_p", 1.0)), int(options.get("top_k", 0)))
            written: list[int] = []
            stream = generate(
                self.scorer.model, ids, max_new_tokens=most, sampling=sampling, eot_id=eot, vocab_size=tokens.n_vocab
            )
            text = ""
            for id in stream:
                written.append(id)
                text = tokens.decode(written)
                ends = [at for stop in stops if stop and (at := text.find(stop)) >= 0]
                if ends:
                    return text[: min(ends)]
            return text

    HarnessLM.__module__ = __name__
    return HarnessLM
