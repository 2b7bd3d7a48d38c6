"""Linear maps and whole blocks of the core as the model uses them: equal to torch's operators, where they may be."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import profile

from bytekiln import block, kernels, linear
from bytekiln.config import ModelConfig, from_flat
from bytekiln.model import Block, FeedForward, KVCache, TransformerLM
from bytekiln.norms import LayerNorm, NoNorm, RMSNorm
from bytekiln.objective import Objective
from bytekiln.optim import _threads_that_pay, clip_gradients, make_optimizer
from bytekiln.stack.model import StackedObjective

SMALL: dict[str, Any] = {"vocab_size": 50, "d_model": 64, "num_layers": 2, "num_heads": 4, "context_length": 24}
IDS = torch.randint(0, 50, (3, 24), generator=torch.Generator().manual_seed(0))


def model_of(**values: Any) -> TransformerLM:
    """A model with nothing at zero."""
    torch.manual_seed(0)
    model = TransformerLM(ModelConfig(**{**SMALL, **values}))
    for p in model.parameters():
        if p.ndim < 2:
            nn.init.normal_(p, 0.5, 0.2)
    return model


def outcome(model: TransformerLM, ids: Tensor = IDS, documents: Tensor | None = None) -> list[Tensor]:
    """Logits and all gradients."""
    model.zero_grad()
    logits = model(ids, documents_BxT=documents)
    weight = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view(logits.shape)
    (logits * weight).sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [logits.detach(), *gradients]


def operators(model: TransformerLM, **given: Any) -> Counter[str]:
    """Which operators of the core a step goes through."""
    with profile() as found:
        outcome(model, **given)
    return Counter({e.key.removeprefix("bytekiln::"): e.count for e in found.key_averages() if "bytekiln::" in e.key})


VARIANTS: list[dict[str, Any]] = [
    {},
    {"norm": "layer", "position": "learned", "ffn": "gelu", "bias": True, "tie_embeddings": True},
    {"norm": "layer", "ffn": "gelu_tanh", "causal": False},
    {"norm": "none", "ffn": "silu", "num_kv_heads": 2, "position": "none"},
    {"ffn": "relu2", "qk_norm": True, "sliding_window": 7, "num_kv_heads": 2},
    {"qk_norm": True, "bias": True, "token_shift": 2, "residual_lambdas": True},
]
IN_PARTS: list[dict[str, Any]] = [
    {"value_embeddings": True, "ffn": "relu2"},
    {"ffn": "moe", "num_experts": 4, "expert_ffn": "gelu"},
]


@pytest.mark.parametrize("values", VARIANTS + IN_PARTS)
def test_it_errs_no_more_than_torch(values: dict[str, Any]) -> None:
    model = model_of(**values)
    found = operators(model)
    blocks = 2 if values in VARIANTS else int("value_embeddings" in values)  # every second layer has some
    assert (found["block"], found["block_backward"]) == (blocks, blocks)
    assert bool(found["linear"]) is (blocks < 2)
    ours = outcome(model)
    with kernels.left_to_torch():
        theirs = outcome(model)
    exact = outcome(copy.deepcopy(model).double())
    for mine, other, right in zip(ours, theirs, exact, strict=True):
        error = (other - right).abs().max()
        assert (mine - right).abs().max() <= 2 * error + 3e-7 * right.abs().max() + 1e-6


@settings(max_examples=25, deadline=None)
@given(B=st.integers(1, 4), T=st.integers(2, 60), variant=st.sampled_from(VARIANTS), threads=st.integers(1, 4))
def test_threads_and_parts_change_no_bit(B: int, T: int, variant: dict[str, Any], threads: int) -> None:
    model = model_of(**{**variant, "context_length": 60})
    ids = torch.randint(0, 50, (max(B, -(-linear.LEAST_ROWS // T)), T), generator=torch.Generator().manual_seed(T))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = outcome(model, ids)
        torch.set_num_threads(threads)
        # Torch's own sums (of the head, of embeddings) may depend on the threads; what the layers are given does not.
        x = model.token_embeddings(ids)
        together = [layer_outcome(model, x, n) for n in (1, threads)]
        assert all(torch.equal(a, b) for a, b in zip(*together, strict=True))
    finally:
        torch.set_num_threads(before)
    if not variant.get("qk_norm") and variant.get("position") in (
        "learned",
        "none",
    ):  # rotary goes through complex numbers
        with block.taken_apart():
            torch.set_num_threads(1)
            parts = outcome(model, ids)
            torch.set_num_threads(before)
        assert all(torch.equal(a, b) for a, b in zip(alone, parts, strict=True))


def layer_outcome(model: TransformerLM, x: Tensor, threads: int) -> list[Tensor]:
    """What the first layer makes of x, and its gradients."""
    from bytekiln.attention import Sight
    from bytekiln.model import Pass

    torch.set_num_threads(threads)
    layer, x = model.layers[0], x.detach().requires_grad_()
    sight = Sight(not model.config.bidirectional, model.config.sliding_window)
    y = layer(x, Pass(torch.zeros(x.shape[:2], dtype=torch.int64), sight))
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]


PARTS = ["ln1", "attn", "attn.q_proj", "attn.output_proj", "ffn", "ffn.w1", "ffn.w2", "ln2", ""]


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
@pytest.mark.parametrize("name", PARTS)
def test_whoever_listens_is_told(name: str, kind: str) -> None:
    model, heard = model_of(ffn="gelu"), []
    want = outcome(model)
    getattr(model.layers[1].get_submodule(name), f"register_{kind}_hook")(lambda *_: heard.append(name))
    found = outcome(model)
    assert heard == [name]
    for a, b in zip(want, found, strict=True):
        torch.testing.assert_close(a, b)
    assert operators(model)["block"] == (1 if name else 2)  # the other layer's; a block's own hooks are called anyhow


def test_whoever_listens_to_all_is_told() -> None:
    model, heard = model_of(), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: heard.append(type(m).__name__))
    try:
        outcome(model)
    finally:
        handle.remove()
    assert heard.count("Linear") == 2 * 7 and heard.count("RMSNorm") == 5


class Doubled(nn.Linear):
    """A stand-in, as of a method that adds to a model's maps."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_stand_in_is_asked() -> None:
    model = model_of()
    for layer in model.layers:
        own = layer.ffn.w2
        layer.ffn.w2 = Doubled(own.in_features, own.out_features, bias=False)
        layer.ffn.w2.weight = own.weight
    found = operators(model)
    assert (found["block"], found["linear"]) == (0, 4)  # the attentions' maps
    assert not torch.allclose(outcome(model)[0], outcome(model_of())[0])


class Sign(RMSNorm):
    """A norm of somebody's own."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sign()


class Halved(FeedForward):
    """A feed-forward of somebody's own."""

    def forward(self, x: Tensor, this: Any = None) -> Tensor:
        return 0.5 * super().forward(x, this)


def of_other_class(m: nn.Module, other: type) -> nn.Module:
    m.__class__ = other
    return m


def as_plain_tensor(m: nn.Module) -> None:
    weight = m.weight.detach().clone()
    del m.weight
    m.weight = weight


CHANGES: dict[str, Any] = {
    "another norm second": lambda layer: setattr(layer, "ln2", LayerNorm(64, 1e-5, bias=True)),
    "no norm second": lambda layer: setattr(layer, "ln2", NoNorm()),
    "another epsilon": lambda layer: setattr(layer.ln1, "eps", 10.0),
    "a norm of one's own": lambda layer: of_other_class(layer.ln1, Sign),
    "a feed-forward of one's own": lambda layer: of_other_class(layer.ffn, Halved),
    "another forward": lambda layer: setattr(layer.ffn.w2, "forward", lambda h: h[..., :64].tanh()),
    "a weight that is none": lambda layer: as_plain_tensor(layer.attn.k_proj),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_changed_stays_changed(name: str) -> None:
    model = model_of(ffn="gelu")
    before = outcome(model)[0]
    CHANGES[name](model.layers[0])
    found = outcome(model)
    with kernels.left_to_torch():
        want = outcome(model)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert name == "a weight that is none" or not torch.allclose(before, found[0], atol=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_a_traced_model_is_torchs() -> None:
    model = model_of().eval()
    with torch.no_grad():
        traced = torch.jit.trace(model, IDS, check_trace=False)
        torch.testing.assert_close(traced(IDS), model(IDS))


def test_stacked_runs_are_single_ones_to_the_bit() -> None:
    config = from_flat(
        {**SMALL, "ffn": "gelu", "norm": "layer", "bias": True, "position": "learned", "precision": "fp32"}
    )
    targets = IDS.roll(-1)

    def objectives() -> list[Objective]:
        torch.manual_seed(3)
        return [Objective(TransformerLM(config.model), config) for _ in range(3)]

    single = objectives()
    for run, objective in enumerate(single):
        objective(IDS.roll(run, 1), targets.roll(run, 1)).total.backward()
    stacked = StackedObjective(objectives())
    batch = torch.cat([IDS.roll(run, 1) for run in range(3)])
    found: Counter[str] = Counter()
    with profile() as seen:
        loss = stacked(batch, torch.cat([targets.roll(run, 1) for run in range(3)]), None, torch.ones(3))
        loss.total.backward()
    found.update(e.key for e in seen.key_averages())
    assert found["bytekiln::block"] and found["bytekiln::block_backward"]
    stacked.hand_out()
    for own, objective in zip(stacked._own, single, strict=True):
        for name, p in objective.model.named_parameters():
            assert torch.equal(own[name].grad, p.grad), name


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_no_memory_is_an_error_and_not_the_end() -> None:
    code = """
import resource, torch
from bytekiln.config import ModelConfig
from bytekiln.model import TransformerLM
torch.set_num_threads(1)
model = TransformerLM(ModelConfig(vocab_size=50, d_model=64, num_layers=1, num_heads=2, context_length=64))
ids = torch.zeros(1500, 64, dtype=torch.int64)
loss = model(ids).sum()
held = 1024 * int(next(l for l in open("/proc/self/status") if l.startswith("VmSize")).split()[1])
resource.setrlimit(resource.RLIMIT_AS, (held + 200_000_000, resource.RLIM_INFINITY))
try:
    loss.backward()
except MemoryError as e:
    print(e)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "kernels: no memory to work in\n"), run.stderr
    assert "panic" not in run.stderr


def test_where_the_core_must_not() -> None:
    model = model_of()
    documents = torch.zeros(IDS.shape, dtype=torch.int32)
    assert operators(model, documents=documents)["block"] == 0  # attention is torch's there
    with kernels.left_to_torch():
        assert operators(model)["linear"] == 0
    with block.taken_apart():
        assert (operators(model)["block"], operators(model)["linear"]) == (0, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert operators(model)["linear"] == 0
    assert operators(model.double())["block"] == 0
    assert operators(model_of(d_model=72, num_heads=3))["linear"] == 0  # no multiple of 32
    assert operators(model_of(d_model=linear.WIDEST + 64, d_ff=64))["linear"] == 0
    assert operators(model_of(norm_position="post"))["block"] == 0


def test_dropout_comes_before_the_residual() -> None:
    model = model_of(dropout=0.3, attention_dropout=False)
    torch.manual_seed(1)
    found = operators(model)
    assert (found["block"], found["linear"]) == (0, 8)
    results = []
    for apart in (False, True):
        torch.manual_seed(1)
        with block.taken_apart() if apart else kernels.left_to_torch():
            results.append(outcome(model)[0])
    model.eval()
    assert operators(model)["block"] == 2
    plain = outcome(model)[0]
    assert all((r - plain).abs().max() > 0.1 for r in results)


def test_a_cache_gives_what_the_whole_gives() -> None:
    model = model_of(qk_norm=True)
    with torch.no_grad():
        whole = model(IDS)
        cache = KVCache(2)
        pieces = [model(IDS[:, at : at + n], cache) for at, n in ((0, 10), (10, 1), (11, 13))]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-4)


def test_what_is_made_has_the_shapes_that_are_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    for values in VARIANTS:
        real = [t.shape for t in outcome(model_of(**values))]
        monkeypatch.setattr(TransformerLM, "initialise", lambda _: None)  # there is nothing to be drawn
        with FakeTensorMode():
            hollow = model_of(**values)
            ids = torch.zeros(IDS.shape, dtype=torch.int64)
            assert [t.shape for t in outcome(hollow, ids)] == real


def test_frozen_parameters_stay() -> None:
    model = model_of()
    model.layers[0].attn.q_proj.weight.requires_grad_(False)
    model.layers[1].ln2.weight.requires_grad_(False)
    frozen = outcome(model)
    assert model.layers[0].attn.q_proj.weight.grad is None
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    every = dict(zip(["logits", *(n for n, _ in model_of().named_parameters())], outcome(model_of()), strict=True))
    for name, found in zip(["logits", *names], frozen, strict=True):
        assert torch.equal(found, every[name]), name


def test_a_gradient_of_a_gradient_is_refused() -> None:
    model = model_of()
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(model(IDS).sum(), list(model.parameters()), create_graph=True)


def given_block() -> tuple[Tensor, block.Kind, list[Tensor | None], Block]:
    """What an operator is called with."""
    layer = model_of(ffn="gelu").layers[0]
    x = torch.randn(2, 8, 64)
    parameters: list[Tensor | None] = [layer.ln1.weight, None, layer.ln2.weight, None]
    for m in (layer.attn.q_proj, layer.attn.k_proj, layer.attn.v_proj, layer.attn.output_proj, layer.ffn.w1, None,
              layer.ffn.w2):  # fmt: skip
        parameters += [None, None] if m is None else [m.weight, m.bias]
    return x, block.Kind(4, 4, True, 0, "rms", 1e-5, False, "gelu"), parameters, layer


def test_the_operators_refuse_what_would_be_foreign_memory() -> None:
    x, kind, parameters, _ = given_block()
    op: Any = torch.ops.bytekiln.block
    y, kept = op(x, parameters, None, None, *kind)
    assert y.shape == x.shape and kept.dim() == 1

    def refused(match: str, x: Tensor = x, changed: dict[int, Tensor | None] | None = None, **other: Any) -> None:
        given = [changed[i] if changed and i in changed else p for i, p in enumerate(parameters)]
        with pytest.raises(ValueError, match=match):
            op(x, given, None, None, *kind._replace(**other))

    refused("expected B×T×D", x[0])
    refused("expected float32", x.double())
    refused("widths", changed={12: torch.ones(60, 64), 16: torch.ones(64, 60)})
    refused(re.escape("found (65,)"), changed={0: torch.ones(65)})
    refused("expected W3 with swiglu alone", activation="swiglu")
    refused("expected W3 with swiglu alone", window=-1)
    refused("rms or layer and their weights", norm="none")
    refused("rms or layer and their weights", changed={0: None})
    refused("heads of a multiple of 8", heads=3)
    refused("none of q, k, v", changed={4: None})
    refused("bias without its weight", changed={15: torch.ones(256)})
    with pytest.raises(ValueError, match="one table"):
        op(x, parameters, torch.ones(8, 8), None, *kind)
    with pytest.raises(ValueError, match="block_backward"):
        torch.ops.bytekiln.block_backward(x[:1], x, kept, parameters, None, None, *kind)
    with pytest.raises(ValueError, match="block_backward"):
        torch.ops.bytekiln.block_backward(x, x, kept[1:], parameters, None, None, *kind)

    op, weight = torch.ops.bytekiln.linear, torch.randn(32, 64)

    def refused_map(match: str, *given: Any) -> None:
        with pytest.raises(ValueError, match=match):
            op(*given)

    assert op(x, None, "none", 0.0, None, None, [weight], [None], None)[0].shape == (2, 8, 32)
    refused_map("multiples of 32", x, None, "none", 0.0, None, None, [torch.randn(31, 64)], [None], None)
    refused_map("expected float32", x, None, "none", 0.0, None, None, [weight.double()], [None], None)
    refused_map("expected float32", x, None, "none", 0.0, None, None, [weight], [torch.ones(31)], None)
    refused_map("second tensor with swiglu alone", x, x, "gelu", 0.0, None, None, [weight], [None], None)
    refused_map("weight with rms and layer alone", x, None, "rms", 0.0, None, None, [weight], [None], None)
    refused_map("linear: found", x, None, "none", 0.0, None, None, [weight], [None], torch.randn(2, 8, 64))
    refused_map("expected one map", x, None, "none", 0.0, None, None, [weight] * 2, [None] * 2, torch.randn(2, 8, 32))
    refused_map("at least one", x, None, "none", 0.0, None, None, [], [], None)
    refused_map("at least one", x, None, "none", 0.0, None, torch.ones(64), [weight], [None], None)
    refused_map(
        "as many rows for each run", x[:1, :7], None, "none", 0.0, None, None, [torch.randn(2, 32, 64)], [None], None
    )


def test_operators_alone_have_gradients() -> None:
    x, kind, parameters, _ = given_block()
    x.requires_grad_()
    y, _ = torch.ops.bytekiln.block(x, parameters, None, None, *kind)
    (by_operator,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    (by_function,) = torch.autograd.grad(block.block(x, kind, parameters, None).sum(), x)
    assert torch.equal(by_operator, by_function)


def test_clipping_and_updates_of_small_tensors_leave_the_threads_as_they_were() -> None:
    before, at_work, real = torch.get_num_threads(), [], torch._fused_adamw_

    def watched(*given: Any, **more: Any) -> None:
        at_work.append(torch.get_num_threads())
        real(*given, **more)

    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            model = model_of(d_model=256)
            optimizer = make_optimizer(model, from_flat({**SMALL, "lr": 1e-2}).optimizer)
            torch.manual_seed(5)
            for p in optimizer.parameters:
                p.grad = torch.randn_like(p)
            assert max(p.numel() for p in optimizer.parameters) > 32_768  # torch would share the work on it
            norm = clip_gradients(optimizer.parameters, 1.0)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch, "_fused_adamw_", watched)
                optimizer.step(1e-2)
            assert torch.get_num_threads() == threads
            results.append([norm, *(p.detach().clone() for p in model.parameters())])
        assert set(at_work) == {1}
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        assert clip_gradients([], 1.0) == 0
        with pytest.raises(RuntimeError), _threads_that_pay(list(model.parameters())):
            raise RuntimeError
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
