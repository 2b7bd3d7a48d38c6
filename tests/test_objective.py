"""Model and loss as one module: sums, their gradients over micro-batches, precision, experts, evaluation."""

from __future__ import annotations

import statistics
import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bytekiln.config import RunConfig
from bytekiln.fields import from_flat
from bytekiln.loss import IGNORED, plain_cross_entropy
from bytekiln.model import Features, TransformerLM
from bytekiln.objective import Loss, Objective

torch.set_num_threads(1)

BASE: dict[str, object] = {
    "vocab_size": 61,
    "d_model": 16,
    "num_layers": 2,
    "num_heads": 2,
    "context_length": 8,
    "precision": "fp32",
    "compile": False,
}
CHOICES: list[dict[str, object]] = [
    {},
    {"loss_chunk": 5, "logit_softcap": 15.0, "z_loss": 1e-3},
    {"loss_chunk": 5, "tie_embeddings": True},
    {"loss_chunk": 7, "pad_vocab": True, "norm": "layer", "bias": True},
    {"loss_chunk": 4, "ffn": "moe", "num_experts": 4},
]


def config(**values: object) -> RunConfig:
    return from_flat({**BASE, **values})


def objective(run: RunConfig, *, double: bool = False) -> Objective:
    torch.manual_seed(1)
    model = TransformerLM(run.model)
    return Objective(model.double() if double else model, run)


def batch(B: int = 4, T: int = 8, ignored: float = 0.3, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 61, (B, T + 1), generator=draw)
    targets = ids[:, 1:].masked_fill(torch.rand(B, T, generator=draw) < ignored, IGNORED)
    return ids[:, :-1].contiguous(), targets


def gradients(module: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert set(found) == {name for name, _ in module.named_parameters()}
    module.zero_grad()
    return found


class Watch(TorchDispatchMode):
    """Notes the names of all operations, and the largest tensor that they touch."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.names = 0, set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        touched = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        self.largest = max([self.largest, *(t.numel() for t in touched)])
        self.names.add(func.overloadpacket.__name__)
        return out


@pytest.mark.parametrize("choices", CHOICES)
def test_sums_and_gradients_are_those_of_the_parts(choices: dict[str, object]) -> None:
    """Against the model's features and the plain loss, put together by hand in float64."""
    run = config(**choices)
    objective_ = objective(run, double=True)
    model = objective_.model
    inputs, targets = batch()
    found = objective_(inputs, targets)
    found.total.backward()
    chunked = gradients(model)

    features = model.features(inputs)
    total, nll = plain_cross_entropy(
        features.x_BxTxD,
        model.head_weight,
        targets,
        softcap=run.model.logit_softcap,
        z_loss=run.training.z_loss,
    )
    if run.model.ffn == "moe":
        total = total + 0.01 * features.balance * (targets != IGNORED).sum()
        assert float(total.detach()) > float(nll) and found.load_LxE.shape == (2, 4)
        assert float(found.load_LxE.sum()) == 2 * 2 * inputs.numel()
    else:
        assert found.load_LxE.shape == (0, 0)
    total.backward()
    torch.testing.assert_close(found.total.detach(), total.detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(found.nll, nll, rtol=1e-12, atol=0)
    assert found.total.ndim == found.nll.ndim == 0
    assert not (found.nll.requires_grad or found.load_LxE.requires_grad)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(chunked[name], gradient, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("balancing", ["bias", "none"])
def test_only_the_auxiliary_loss_is_added(balancing: str) -> None:
    weight = {"load_balancing_weight": 0.5} if balancing == "bias" else {}
    run = config(ffn="moe", load_balancing=balancing, **weight)
    found = objective(run)(*batch())
    assert float(found.total.detach()) == float(found.nll) and found.load_LxE.shape == (2, 8)


@pytest.mark.parametrize("choices", CHOICES[:4])
def test_micro_batches_give_the_large_batchs_gradient(choices: dict[str, object]) -> None:
    """Micro-batches with 8, 1, 0 and 17 real targets: sums, divided once by all 26."""
    objective_ = objective(config(**choices), double=True)
    inputs, targets = batch(B=12, ignored=0.0)
    flat = targets.view(4, 24)
    for micro, real in enumerate((8, 1, 0, 17)):
        flat[micro, torch.randperm(24, generator=torch.Generator().manual_seed(micro))[real:]] = IGNORED
    counts = [(t != IGNORED).sum() for t in targets.split(3)]
    assert [int(c) for c in counts] == [8, 1, 0, 17]
    whole = objective_(inputs, targets)
    (whole.total / 26).backward()
    expected = gradients(objective_)
    nll = torch.zeros((), dtype=torch.float64)
    for x, y in zip(inputs.split(3), targets.split(3), strict=True):
        part = objective_(x, y)
        (part.total / 26).backward()
        nll += part.nll
    torch.testing.assert_close(nll, whole.nll, rtol=1e-12, atol=0)
    for name, gradient in gradients(objective_).items():
        assert float((gradient - expected[name]).norm()) <= 1e-6 * float(expected[name].norm()), name


def test_a_mean_of_means_would_fail_that_test() -> None:
    objective_ = objective(config(), double=True)
    inputs, targets = batch(B=6, ignored=0.0)
    targets[3:, 1:] = IGNORED
    (objective_(inputs, targets).total / 27).backward()
    expected = gradients(objective_)
    for x, y, count in zip(inputs.split(3), targets.split(3), (24, 3), strict=True):
        (objective_(x, y).total / count / 2).backward()
    assert any(
        float((g - expected[name]).norm()) > 0.1 * float(expected[name].norm())
        for name, g in gradients(objective_).items()
    )


@pytest.mark.parametrize("chunk", ["auto", 6])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_precision_is_the_objectives(precision: str, chunk: str | int) -> None:
    """Low products, fp32 sums and gradients, within the low type's rounding of fp32."""
    exact, low = objective(config()), objective(config(precision=precision, loss_chunk=chunk))
    seen: list[torch.dtype] = []
    low.model.layers[0].register_forward_hook(
        lambda *_: seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
    )
    inputs, targets = batch()
    a, b = exact(inputs, targets), low(inputs, targets)
    assert seen == [{"bf16": torch.bfloat16, "fp16": torch.float16}[precision]]
    assert not torch.is_autocast_enabled("cpu")
    assert b.total.dtype == b.nll.dtype == torch.float32
    assert float(b.nll) == pytest.approx(float(a.nll), rel=1e-2)
    a.total.backward()
    (b.total * 1024).backward()  # a loss scale
    for (name, g), h in zip(gradients(exact).items(), gradients(low).values(), strict=True):
        assert h.dtype == torch.float32
        assert float((g - h / 1024).norm()) <= 0.05 * float(g.norm()), name


def test_precision_must_be_settled() -> None:
    with pytest.raises(AssertionError, match="auto"):
        objective(config(precision="auto"))


def test_documents_reach_the_model() -> None:
    """A position's loss does not depend on what stands in another document of its window."""
    objective_ = objective(config(loss_chunk=3))
    inputs, targets = batch(B=1, ignored=0.0)
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]], dtype=torch.int32)
    targets[:, :4] = IGNORED
    other = inputs.clone()
    other[:, :4] = (inputs[:, :4] + 7) % 61
    for call in (lambda *a: objective_(*a).nll, lambda *a: objective_.scores(*a)[0]):
        torch.testing.assert_close(call(inputs, targets, documents), call(other, targets, documents))
        assert abs(float(call(inputs, targets)) - float(call(other, targets))) > 1e-3


@pytest.mark.parametrize("choices", CHOICES)
def test_nothing_waits_for_the_host_and_no_logits_are_whole(choices: dict[str, object]) -> None:
    objective_ = objective(config(**{"loss_chunk": 8, "d_ff": 32, **choices}))
    inputs, targets = batch(B=8)
    with Watch() as features:  # the experts' loop on a CPU reads how many tokens each gets
        objective_.model.features(inputs)[0].sum().backward()
    waits = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero"}
    assert not waits & features.names or choices.get("ffn") == "moe"
    with Watch() as watch:
        objective_(inputs, targets).total.backward()
        objective_.scores(inputs, targets)
    assert not waits & (watch.names - features.names)
    assert watch.largest < inputs.numel() * 61


@pytest.mark.parametrize("choices", CHOICES)
def test_scores_are_the_loss_and_the_greedy_hits(choices: dict[str, object]) -> None:
    objective_ = objective(config(**choices)).eval()
    inputs, targets = batch(B=6)
    nll, correct = objective_.scores(inputs, targets)
    assert nll.ndim == correct.ndim == 0 and not nll.requires_grad
    torch.testing.assert_close(nll, objective_(inputs, targets).nll)
    greedy = (objective_.model.features(inputs).x_BxTxD @ objective_.model.head_weight.T).argmax(-1)
    assert int(correct) == int(((greedy == targets) & (targets != IGNORED)).sum())
    learnt = torch.where(targets == IGNORED, IGNORED, greedy)  # every target hit
    assert int(objective_.scores(inputs, learnt)[1]) == int((targets != IGNORED).sum())


def test_scores_of_all_logits_at_once_are_still_in_chunks() -> None:
    objective_ = objective(config(loss_chunk=0, vocab_size=8192, context_length=64))
    ids = torch.randint(0, 8192, (32, 64))
    with Watch() as watch:
        objective_.scores(ids, ids)
    assert watch.largest == 8192 * 1024 < 32 * 64 * 8192


def test_parameters_are_the_models_own() -> None:
    """So that an optimizer over the model's parameters sees what the objective's backward leaves."""
    objective_ = objective(config())
    assert {id(p) for p in objective_.parameters()} == {id(p) for p in objective_.model.parameters()}
    assert all(name.startswith("model.") for name in objective_.state_dict())


class Fake(nn.Module):
    """Only what the objective asks of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(61, 4, generator=torch.Generator().manual_seed(0)))

    @property
    def head_weight(self) -> Tensor:
        return self.table

    def features(self, ids: Tensor, cache: None = None, documents: Tensor | None = None) -> Features:
        x = self.table[ids]
        return Features(x, x.square().mean(), torch.ones(1, 3))


def test_balance_weighs_as_a_mean_over_targets() -> None:
    """total / targets = mean loss + weight · balance, whatever the micro-batches."""
    run = config(ffn="moe", num_experts=3, load_balancing_weight=0.25)
    objective_ = Objective(Fake(), run)  # type: ignore[arg-type]
    inputs, targets = batch()
    found: Loss = objective_(inputs, targets)
    balance = float(objective_.model.features(inputs).balance.detach())
    count = int((targets != IGNORED).sum())
    assert float((found.total.detach() - found.nll) / count) == pytest.approx(0.25 * balance, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("choices", [CHOICES[1], {"tie_embeddings": True, "loss_chunk": 20, "precision": "bf16"}])
def test_compiled(choices: dict[str, object]) -> None:
    """Model and loss as one graph, with a scaled gradient; what eager gives."""
    objective_ = objective(config(**{**choices, "num_layers": 1}))
    inputs, targets = batch()
    (objective_(inputs, targets).total * 3).backward()
    expected = gradients(objective_)
    compiled = torch.compile(objective_, fullgraph=True)
    (compiled(inputs, targets).total * 3).backward()
    rel = 2e-2 if choices.get("precision") == "bf16" else 1e-5
    for name, gradient in gradients(objective_).items():
        assert float((gradient - expected[name]).norm()) <= rel * float(expected[name].norm()), name


@pytest.mark.slow
def test_costs_no_more_than_model_and_cross_entropy() -> None:
    """The plain GPT-2 shape of nanoGPT's CPU recipe, forward and backward, taking turns; one thread's own time."""
    run = config(
        vocab_size=65, d_model=128, num_layers=4, num_heads=4, context_length=64, ffn="gelu", norm="layer",
        position="learned", tie_embeddings=True, init="gpt2",
    )  # fmt: skip
    objective_ = objective(run)
    model = objective_.model
    ids = torch.randint(0, 65, (12, 65))
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def ours() -> None:
        objective_(inputs, targets).total.backward()

    def plain() -> None:
        F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="sum").backward()

    times: dict[Any, list[float]] = {ours: [], plain: []}
    for _ in range(60):
        for step, seconds in times.items():
            model.zero_grad()
            began = time.process_time()
            step()
            seconds.append(time.process_time() - began)
    fastest = [statistics.mean(sorted(seconds)[:10]) for seconds in times.values()]
    assert fastest[0] <= 1.03 * fastest[1], f"{fastest[0] * 1e3:.2f} ms against {fastest[1] * 1e3:.2f} ms"
