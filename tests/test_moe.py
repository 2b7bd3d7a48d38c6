"""Mixture of experts: no token dropped, equal to a token-by-token specification, grouped as looped, and balanced."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from bytekiln.accounting import active_parameter_count, forward_flops_by_part, parameter_count
from bytekiln.attention import CAUSAL
from bytekiln.config import ModelConfig
from bytekiln.model import MixtureOfExperts, Pass, TransformerLM, grouped_experts, looped_experts
from test_model import ids

SIZES = {"vocab_size": 50, "d_model": 16, "num_layers": 2, "num_heads": 2, "context_length": 12, "d_ff": 24}
KINDS = ["swiglu", "silu", "gelu", "relu2"]


def config(**values: object) -> ModelConfig:
    return ModelConfig(**{**SIZES, "ffn": "moe", **values})


def layer(**values: object) -> MixtureOfExperts:
    """One layer alone, float64, with weights that spread the choice."""
    torch.manual_seed(0)
    moe = MixtureOfExperts(config(**values)).double().eval()
    with torch.no_grad():
        for p in moe.parameters():
            p.normal_(0, 0.5)
        if moe.router_bias is not None:
            moe.router_bias.normal_(0, 0.2)
    return moe


def told() -> Pass:
    return Pass(torch.empty(0), CAUSAL)


def token_by_token(moe: MixtureOfExperts, x_BxTxD: torch.Tensor) -> tuple[torch.Tensor, list[list[int]]]:
    """The specification: each token by itself, its experts found by sorting; also who they are."""
    rows, chosen_by = [], []
    for x in x_BxTxD.flatten(0, 1):
        p = torch.softmax(moe.router.weight @ x, 0)
        score = p if moe.router_bias is None else p + moe.router_bias
        chosen = sorted(range(len(p)), key=lambda e: -float(score[e].detach()))[: moe.top_k]
        out = torch.zeros_like(x)
        for e in chosen:
            h = moe.experts_w1[e] @ x
            act = {"gelu": F.gelu, "relu2": lambda v: v.clamp(min=0) ** 2}.get(moe.kind, F.silu)(h)
            act = act * (moe.experts_w3[e] @ x) if moe.experts_w3 is not None else act
            gate = p[e] / sum(p[i] for i in chosen) if moe.top_k > 1 else p[e]
            out = out + gate * (moe.experts_w2[e] @ act)
        rows.append(out if moe.shared is None else out + moe.shared(x))
        chosen_by.append(chosen)
    return torch.stack(rows).view_as(x_BxTxD), chosen_by


@pytest.mark.parametrize(
    "values",
    [
        *({"expert_ffn": kind} for kind in KINDS),
        {"expert_top_k": 1},
        {"expert_top_k": 4, "num_experts": 4, "load_balancing": "none"},
        {"load_balancing": "bias", "num_shared_experts": 2},
        {"num_experts": 16, "expert_top_k": 3},  # more experts than tokens to go round: some stay idle
    ],
)
def test_equals_the_specification_and_so_do_gradients(values: dict[str, object]) -> None:
    moe, this = layer(**values), told()
    x = torch.randn(1, 7, 16, dtype=torch.float64, requires_grad=True)
    fast = moe(x, this)
    slow, chosen = token_by_token(moe, x)
    torch.testing.assert_close(fast, slow)
    weights = [x, *moe.parameters()]
    gradients = [torch.autograd.grad((out * torch.arange(16)).sum(), weights) for out in (fast, slow)]
    torch.testing.assert_close(gradients[0], gradients[1])
    counted = [sum(e in c for c in chosen) for e in range(moe.router.out_features)]
    assert this.loads_E[0].tolist() == counted


@settings(max_examples=50)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 20), st.floats(0, 30), st.integers(0, 99))
def test_every_token_gets_exactly_k_experts(E: int, k: int, N: int, skew: float, seed: int) -> None:
    """However uneven the router is: nobody is dropped, no expert taken twice, gates sum to 1."""
    k = min(k, E)
    torch.manual_seed(seed)
    moe = MixtureOfExperts(config(num_experts=E, expert_top_k=k, load_balancing="none")).eval()
    with torch.no_grad():
        for p in moe.parameters():
            p.normal_(0, 0.5)
        moe.router.weight[0] += skew
        x, this = torch.randn(1, N, 16) + 1, told()
        chosen, gates, p_NxE = moe.route(x[0])
        assert chosen.shape == gates.shape == (N, k) and p_NxE.shape == (N, E)
        assert all(len(set(row)) == k for row in chosen.tolist())
        if k > 1:
            torch.testing.assert_close(gates.sum(1), torch.ones(N))
        out = moe(x, this)
    assert out.shape == x.shape and bool(out.isfinite().all())
    assert this.loads_E[0].tolist() == torch.bincount(chosen.flatten(), minlength=E).tolist()
    assert int(this.loads_E[0].sum()) == N * k


def experts(E: int, kind: str, width: int, dtype: torch.dtype) -> list[torch.Tensor | None]:
    torch.manual_seed(1)
    shapes = [(E, width, 16), (E, 16, width), (E, width, 16)]
    made = [(torch.randn(s) / 4).to(dtype).requires_grad_() for s in shapes]
    return [*made[:2], made[2] if kind == "swiglu" else None]


LOADS = [(3, 0, 5, 2), (0, 0, 0, 10), (10, 0, 0, 0), (1, 2, 3, 4)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("load", LOADS)
def test_grouped_products_are_the_loop(load: tuple[int, ...], kind: str) -> None:
    """torch has the operator on the CPU too, which holds the arithmetic of rows and ends; idle experts included."""
    weights = experts(4, kind, 24, torch.float32)
    torch.manual_seed(2)
    x, shade = torch.randn(10, 16, requires_grad=True), torch.randn(10, 16)
    outputs = [f(x, torch.tensor(load), kind, *weights) for f in (looped_experts, grouped_experts)]
    torch.testing.assert_close(outputs[1], outputs[0])
    inputs = [x, *(w for w in weights if w is not None)]
    gradients = [torch.autograd.grad((out * shade).sum(), inputs) for out in outputs]
    torch.testing.assert_close(gradients[1], gradients[0])
    for w in gradients[1][1:]:
        assert [bool(g.any()) for g in w] == [n > 0 for n in load]


@pytest.mark.parametrize("load", LOADS[:2])
def test_grouped_products_take_autocasts_type(load: tuple[int, ...]) -> None:
    weights = experts(4, "swiglu", 24, torch.float32)
    torch.manual_seed(2)
    x, shade = torch.randn(10, 16, requires_grad=True), torch.randn(10, 16)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [f(x, torch.tensor(load), "swiglu", *weights) for f in (looped_experts, grouped_experts)]
    assert [out.dtype for out in outputs] == [torch.bfloat16] * 2
    torch.testing.assert_close(outputs[1], outputs[0], rtol=2e-2, atol=2e-2)
    gradients = [torch.autograd.grad((out * shade).sum(), [x, *weights]) for out in outputs]
    assert all(g.dtype == torch.float32 for g in gradients[1])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=5e-2, atol=5e-2)


def device_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the path of CUDA on the CPU."""
    monkeypatch.setattr("bytekiln.model.looped_experts", grouped_experts)


def test_the_model_is_the_same_on_both_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = TransformerLM(config(num_shared_experts=1))
    results = []
    for _ in range(2):
        model.zero_grad()
        out = model.features(ids(3, 12))
        (out.x_BxTxD.square().sum() + out.balance).backward()
        results.append((out.x_BxTxD.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
        device_path(monkeypatch)
    assert len(results[0][1]) == len(list(model.parameters())) - 1  # all but the head
    torch.testing.assert_close(results[1], results[0])


class Waits(TorchDispatchMode):
    """Notes operators whose result the host must wait for, or whose shape depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(word in str(func) for word in ("_local_scalar_dense", "nonzero", "bincount", "unique", "masked_select")):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def test_the_host_never_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    device_path(monkeypatch)
    model = TransformerLM(config(load_balancing="bias", router_noise=0.1)).train()
    tokens = ids(2, 12)
    with Waits() as waits:
        out = model.features(tokens)
        out.x_BxTxD.square().sum().backward()
        model.move_router_bias(out.load_LxE)
    assert waits.found == []
    with Waits() as waits:
        float(out.load_LxE.sum())
    assert waits.found


def on_fake_cuda(**values: object) -> None:
    """A forward pass in bf16; the backward of fake tensors asks for a real device, and so does autocast."""
    with FakeTensorMode(), torch.no_grad():
        with torch.device("cuda"):
            torch.set_default_dtype(torch.bfloat16)
            try:
                model = TransformerLM(config(init="gpt2", **values))
            finally:
                torch.set_default_dtype(torch.float32)
            tokens, documents = torch.zeros(2, 12, dtype=torch.int64), torch.zeros(2, 12, dtype=torch.int32)
        out = model.features(tokens, None, documents)
        assert out.x_BxTxD.shape == (2, 12, 16) and out.x_BxTxD.dtype == torch.bfloat16
        assert (out.balance.dtype, out.balance.shape) == (torch.float32, ())
        assert out.load_LxE.shape == (2, 8) and out.load_LxE.device.type == "cuda"


def test_the_cuda_path_traces() -> None:
    """Fake tensors know no data: whatever would wait for it raises, as the loop does when rows are too short."""
    on_fake_cuda(num_shared_experts=1, value_embeddings=True, num_kv_heads=1, sliding_window=4)
    with pytest.raises(DataDependentOutputException):
        on_fake_cuda(d_ff=20)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("load", LOADS)
def test_grouped_products_are_the_loop_on_cuda(load: tuple[int, ...]) -> None:
    weights = [w.detach().cuda().requires_grad_() for w in experts(4, "swiglu", 24, torch.float32)]
    torch.manual_seed(2)
    x, shade = torch.randn(10, 16, device="cuda", requires_grad=True), torch.randn(10, 16, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        rows = torch.tensor(load, device="cuda")
        outputs = [f(x, rows, "swiglu", *weights) for f in (looped_experts, grouped_experts)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=2e-2, atol=2e-2)
    gradients = [torch.autograd.grad((out * shade).sum(), [x, *weights]) for out in outputs]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=5e-2, atol=5e-2)


def test_balance_is_its_formula() -> None:
    """E Σ f_e p_e: 1 where the load is even, E where one expert has it all, summed over layers, with a gradient."""
    model = TransformerLM(config(num_experts=4))
    seen: list[torch.Tensor] = []
    for block in model.layers:
        block.ffn.register_forward_hook(lambda moe, taken, _: seen.append(moe.route(taken[0].flatten(0, 1))[2]))
    out = model.features(ids(3, 12))
    expected = sum(4 * (load / 72 * p.mean(0)).sum() for load, p in zip(out.load_LxE, seen, strict=True))
    torch.testing.assert_close(out.balance, expected)
    assert out.load_LxE.sum(1).tolist() == [72, 72] and not out.load_LxE.requires_grad
    gradient = torch.autograd.grad(out.balance, [block.ffn.router.weight for block in model.layers])
    assert all(bool(g.any()) for g in gradient)
    with torch.no_grad():
        for block in model.layers:
            block.ffn.router.weight.zero_()
    torch.testing.assert_close(model.features(ids(3, 12)).balance, torch.tensor(2.0))  # p even, whatever f is
    planted = TransformerLM(config(num_experts=4, expert_top_k=1, norm="none", num_layers=1))
    with torch.no_grad():
        planted.token_embeddings.weight.fill_(1.0)
        planted.layers[0].attn.output_proj.weight.zero_()
        planted.layers[0].ffn.router.weight.zero_()[2] = 9.0
    torch.testing.assert_close(planted.features(ids(3, 12)).balance, torch.tensor(4.0))


class Summed(torch.nn.Module):
    """A model with a loss, as the loop wraps it."""

    def __init__(self, model: TransformerLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = self.model.features(tokens)
        return (out.x_BxTxD @ self.model.head_weight.T).logsumexp(-1).sum() + 10 * out.balance, out.load_LxE


def test_figures_and_their_gradients_survive_fsdp() -> None:
    """FSDP rebuilds the arguments of every layer that it wraps, the lists that figures are left in among them."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    plain = Summed(TransformerLM(config(num_layers=3, value_embeddings=True, residual_lambdas=True)))
    sharded = Summed(TransformerLM(plain.model.config))
    sharded.load_state_dict(plain.state_dict())
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for part in (*sharded.model.layers, sharded):
            fully_shard(part, mesh=mesh)
        results = [f(ids(2, 12)) for f in (plain, sharded)]
        torch.testing.assert_close(results[1], results[0])
        for loss, _ in results:
            loss.backward()
        for (name, one), other in zip(plain.named_parameters(), sharded.parameters(), strict=True):
            torch.testing.assert_close(
                other.grad.full_tensor(), one.grad, msg=lambda told, name=name: f"{name}: {told}"
            )
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["bias", "none"])
def test_no_balance_loss_unless_asked(kind: str) -> None:
    out = TransformerLM(config(load_balancing=kind)).features(ids(1, 12))
    assert float(out.balance) == 0 and not out.balance.requires_grad and out.load_LxE.shape == (2, 8)


def test_the_bias_moves_against_the_load() -> None:
    model = TransformerLM(config(load_balancing="bias", load_balancing_weight=0.25, num_experts=4))
    model.move_router_bias(torch.tensor([[8.0, 0.0, 4.0, 4.0], [1.0, 1.0, 1.0, 1.0]]))
    model.move_router_bias(torch.tensor([[8.0, 0.0, 4.0, 4.0], [1.0, 2.0, 0.0, 1.0]]))
    assert [block.ffn.router_bias.tolist() for block in model.layers] == [[-0.5, 0.5, 0, 0], [0, -0.25, 0.25, 0]]
    assert {n for n in model.state_dict() if "bias" in n} == {f"layers.{i}.ffn.router_bias" for i in range(2)}
    other = TransformerLM(config())
    other.move_router_bias(torch.ones(2, 8))
    assert not any("bias" in n for n in other.state_dict())
    TransformerLM(ModelConfig(**SIZES)).move_router_bias(torch.zeros(0, 0))


def test_the_bias_chooses_but_does_not_weigh() -> None:
    moe = layer(load_balancing="bias")
    x = torch.randn(5, 16, dtype=torch.float64)
    moe.router_bias.zero_()[3] = 10.0
    chosen, gates, p = moe.route(x)
    assert (chosen[:, 0] == 3).all()
    own = p.gather(1, chosen)
    torch.testing.assert_close(gates, own / own.sum(1, keepdim=True))


def test_routing_stays_in_float32_under_autocast() -> None:
    moe = layer().float()
    x = torch.randn(40, 16)
    with torch.autocast("cpu", torch.bfloat16):
        within = moe.route(x)
    for a, b in zip(within, moe.route(x), strict=True):
        assert torch.equal(a, b)


def test_router_noise() -> None:
    moe = layer(router_noise=0.7)
    x = torch.zeros(4000, 16, dtype=torch.float64)
    assert torch.equal(moe.route(x)[2], torch.full((4000, 8), 0.125, dtype=torch.float64))
    p = moe.train().route(x)[2]
    logits = p.log() - p.log().mean(dim=1, keepdim=True)
    assert float(logits.detach().std()) == pytest.approx(0.7 * (7 / 8) ** 0.5, rel=0.02)


def loads_while_training(kind: str, weight: float) -> list[float]:
    """Greatest load over the mean, over each 20 of 200 steps, of a layer whose router sends every token to expert 0."""
    torch.manual_seed(0)
    more = {} if kind == "none" else {"load_balancing_weight": weight}
    c = config(
        **more, load_balancing=kind, vocab_size=32, num_layers=1, context_length=16, norm="layer", bias=True,
        expert_ffn="silu", d_ff=16,
    )  # fmt: skip
    model = TransformerLM(c)
    with torch.no_grad():
        model.layers[0].ln2.bias.fill_(1.0)  # what all tokens have in common …
        model.layers[0].ffn.router.weight[0] += 0.3  # … expert 0 likes: its logits lie 4.8 above the others
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    follows = torch.randperm(32)
    tens, total = [], torch.zeros(8)
    for step in range(200):
        draw = torch.Generator().manual_seed(step)
        x = torch.randint(0, 32, (16, 16), generator=draw)
        y = (follows[x] + (torch.rand(16, 16, generator=draw) < 0.2)) % 32
        out = model.features(x)
        loss = F.cross_entropy(F.linear(out.x_BxTxD, model.head_weight).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        (loss + c.load_balancing_weight * out.balance).backward()
        optimizer.step()
        model.move_router_bias(out.load_LxE)
        total = total + out.load_LxE[0]
        if step % 20 == 19:
            tens.append(float(total.max() / total.mean()))
            total = torch.zeros(8)
    assert float(loss.detach()) < 1.0  # from ln 32 = 3.5: it does learn meanwhile
    return tens


@pytest.mark.parametrize(("kind", "weight"), [("loss", 0.1), ("bias", 0.01)])
def test_a_planted_router_is_balanced(kind: str, weight: float) -> None:
    loads = loads_while_training(kind, weight)
    assert loads[0] > 2 and loads[-1] < 1.5, loads


def test_a_planted_router_stays_uneven_without_balancing() -> None:
    assert min(loads_while_training("none", 0.0)) > 3


@pytest.mark.parametrize(
    "values",
    [{}, {"expert_ffn": "relu2", "num_shared_experts": 2}, {"expert_top_k": 3, "num_experts": 5, "bias": True}],
)
def test_the_dense_twin_does_the_same_work(values: dict[str, object]) -> None:
    """The same active FLOPs a token but for the router; it has nothing else of the experts."""
    moe, twin = config(**values), config(**values, dense_twin=True)
    assert twin.ffn == moe.expert_ffn and twin.d_ff == (moe.expert_top_k + moe.num_shared_experts) * 24
    work, same = forward_flops_by_part(moe), forward_flops_by_part(twin)
    router = work.pop("router")
    assert router == 2 * 2 * 16 * moe.num_experts
    assert sum(work.values()) == sum(same.values())
    model = TransformerLM(twin)
    assert not any(word in n for n in model.state_dict() for word in ("router", "expert", "shared"))
    assert model(ids(1, 12)).shape == (1, 12, 50)
    if not moe.bias:
        routers = 2 * 16 * moe.num_experts
        assert (
            active_parameter_count(moe) - routers == parameter_count(twin) == sum(p.numel() for p in model.parameters())
        )
