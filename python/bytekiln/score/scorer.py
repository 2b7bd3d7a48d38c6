"""A trained model as a judge: the loss of every token that it is asked about.

In: a run or a checkpoint; features and targets. Out: a `Scorer`; the negative log-likelihood of each target, and
whether greedy decoding would have hit it. Called by `score.text`, `choices`, `harness` and `cli_score`.

Shapes are suffixes of names: R rows, N targets, r and n those of a chunk, D model width, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from bytekiln.characters import AnyTokenizer, load_any
from bytekiln.checkpoint import SUMS, weights_of
from bytekiln.config import RunConfig
from bytekiln.errors import ConfigError, FormatError, MismatchError
from bytekiln.model import TransformerLM
from bytekiln.sample import check_continues, tokenizer_for

LOGIT_BYTES = 32 * 2**20
"""fp32 logits that exist at once: what stays in a CPU's cache between the product and its softmax."""
ALIGNED = 32
"""Rows of the head are filled up to a multiple of so many. With GPT-2's 50,257 each row of logits begins at another
offset in a cache line, and MKL's product takes 0.89 ms a row for 0.54 ms (166 rows, D 256, one core of AMD EPYC)."""
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Scorer:
    """A model ready to score, and how."""

    model: TransformerLM
    tokenizer: AnyTokenizer | None
    name: str
    config: RunConfig | None = None
    """Of the run; None for a model that none trained."""
    checksum: str = ""
    """SHA-256 of the weights' file."""
    tokenizer_hash: str | None = None
    step: int | None = None
    context_length: int = 0
    """Positions that the model sees at once; 0: those that it was trained on."""
    batch_size: int = 32
    """Sequences in a pass."""
    precision: str = "fp32"

    def __post_init__(self) -> None:
        """Settle the context.

        Raises:
            ConfigError: a value out of range, or a model that sees both sides.
        """
        c = self.model.config
        check_continues(c, self.name)
        if not 0 <= self.context_length <= c.max_seq_len:
            raise ConfigError(
                f"context_length: found {self.context_length}; "
                f"expected 1 to {c.max_seq_len}, the positions of {self.name}"
            )
        if self.batch_size < 1:
            raise ConfigError(f"batch_size: found {self.batch_size}; expected 1 or more")
        if self.precision not in AUTOCAST:
            raise ConfigError(f"precision: found {self.precision!r}; expected one of {', '.join(AUTOCAST)}")
        object.__setattr__(self, "context_length", self.context_length or c.context_length)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def settings(self) -> dict[str, Any]:
        """All that decides a number, for a file that is to be taken up again."""
        return {
            "model": self.checksum,
            "tokenizer": self.tokenizer_hash,
            "context_length": self.context_length,
            "batch_size": self.batch_size,
            "precision": self.precision,
        }

    def autocast(self) -> AbstractContextManager[object]:
        """The precision of matrix products."""
        low = AUTOCAST[self.precision]
        return torch.autocast(self.device.type, low, enabled=low is not None)

    @cached_property
    def padded_head(self) -> Tensor:
        """The output head, V×D, in the type of the products; rows beyond the vocabulary's are there to be cut off."""
        head_VxD = self.model.head_weight.detach()
        missing = -len(head_VxD) % ALIGNED
        if missing:
            head_VxD = torch.cat([head_VxD, head_VxD.new_zeros(missing, head_VxD.shape[1])])
        return head_VxD.to(AUTOCAST[self.precision] or head_VxD.dtype)


def open_scorer(
    run: str,
    *,
    tokenizer: str | None = None,
    own_first: bool = False,
    device: torch.device | None = None,
    notice: Callable[[str], object] = lambda _: None,
    **how: Any,
) -> Scorer:
    """The model of a run folder (its best checkpoint, else its newest whole one) or of a checkpoint folder.

    Args:
        run: its path.
        tokenizer: the run's own, where it knew none.
        own_first: leave `tokenizer` aside where the run has its own; else that must be the same.
        device: where it is to work; None: the CPU.
        notice: told what should be known.
        how: `context_length`, `batch_size` and `precision` of `Scorer`.

    Raises:
        FileError, FormatError, MismatchError: no whole checkpoint, or a tokenizer that is not the run's.
        ConfigError: as `Scorer`.
    """
    checkpoint = weights_of(run, notice)
    check_continues(checkpoint.config.model, run)
    model = TransformerLM(checkpoint.config.model)
    model.load_state_dict(checkpoint.model)
    model.to(device or torch.device("cpu")).eval()
    trained_with = (checkpoint.state.get("data") or {}).get("tokenizer")
    own = None
    if own_first and checkpoint.tokenizer_json:
        tokenizer = None
    if tokenizer or checkpoint.tokenizer_json:
        own = tokenizer_for(model, tokenizer, checkpoint.tokenizer_json, run, trained_with=trained_with)
    path = checkpoint.path
    assert path is not None
    sums = json.loads((path / SUMS).read_text("utf-8"))["sha256"]
    return Scorer(
        model,
        own,
        _name(Path(run)),
        checkpoint.config,
        f"sha256:{sums['model.safetensors']}",
        own.hash if own is not None else trained_with,
        checkpoint.step,
        **how,
    )


def check_of_use(tokenizer: str, scorers: Sequence[Scorer]) -> None:
    """Refuse a tokenizer that was given and that no model speaks.

    Raises:
        FileError, FormatError: it cannot be read.
        MismatchError: each model has another one of its own.
    """
    found = load_any(tokenizer).hash
    if all(s.tokenizer_hash != found for s in scorers):
        names = " and ".join(s.name for s in scorers)
        raise MismatchError(
            f"{tokenizer}: found tokenizer hash {found}; expected that of {names}, which have tokenizers of their own"
        )


def _name(path: Path) -> str:
    """`demo` for a run folder, `demo/checkpoint_best` for a checkpoint in it."""
    path = path.resolve()
    if path.name.startswith("checkpoint_"):
        run = path.parent.parent if path.parent.name == "checkpoints" else path.parent
        return f"{run.name}/{path.name.removesuffix('.pt')}"
    return path.name


@torch.no_grad()
def token_scores(
    scorer: Scorer, x_RxD: Tensor, targets_N: Tensor, row_N: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """-ln p of every target and whether it is the first of the greatest logits.

    The head is applied to the given positions only, some at a time: with a large vocabulary it is most of the work,
    and the whole of its output would not fit into a cache.

    Args:
        scorer: whose head is taken, without the padding of its vocabulary.
        x_RxD: features before the head.
        targets_N: int64 ids.
        row_N: at which row each is predicted, every row at least once; None: at its own.

    Returns:
        Of shape N: fp32 (fp64 where the features are), and bool.

    Raises:
        FormatError: a loss is not finite.
    """
    head_VxD, V, cap = scorer.padded_head, scorer.model.config.vocab_size, scorer.model.config.logit_softcap
    size = max(1, LOGIT_BYTES // (4 * len(head_VxD)))
    order_N = torch.arange(len(targets_N), device=x_RxD.device)
    if row_N is not None:
        row_N, order_N = row_N.sort(stable=True)
    else:
        row_N = order_N
    starts = list(range(0, len(x_RxD), size))
    bounds = torch.searchsorted(row_N, torch.tensor([*starts, len(x_RxD)], device=x_RxD.device)).tolist()
    out = None
    for i, start in enumerate(starts):
        logits_rxV = F.linear(x_RxD[start : start + size], head_VxD)[:, :V]
        logits_rxV = logits_rxV.to(torch.promote_types(logits_rxV.dtype, torch.float32))
        if cap:
            logits_rxV = logits_rxV.div_(cap).tanh_().mul_(cap)
        part = slice(bounds[i], bounds[i + 1])
        row_n, of_n = row_N[part] - start, order_N[part]
        targets_n = targets_N[of_n]
        target_n, most_r = logits_rxV[row_n, targets_n], logits_rxV.amax(1)
        # argmax is slow on a CPU: it is asked only where the target is among the greatest, to settle ties.
        hit_n = target_n >= most_r[row_n]
        maybe = hit_n.nonzero()[:, 0]
        hit_n[maybe] = logits_rxV[row_n[maybe]].argmax(1) == targets_n[maybe]
        lse_r = logits_rxV.sub_(most_r[:, None]).exp_().sum(1).log_().add_(most_r)
        if out is None:
            out = logits_rxV.new_empty(len(targets_N)), hit_n.new_empty(len(targets_N))
        out[0][of_n], out[1][of_n] = lse_r[row_n] - target_n, hit_n
    assert out is not None
    if not torch.isfinite(out[0]).all():
        raise FormatError(
            f"{scorer.name}: found a loss that is not finite; expected weights of a run that has not diverged"
        )
    return out
