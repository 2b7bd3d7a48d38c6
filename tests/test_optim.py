"""Every rule against torch's own or a plain float64 loop, its memory as tensors, and steps that are left out."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from bytekiln.averaging import Averaging
from bytekiln.config import ModelConfig, OptimizerConfig
from bytekiln.errors import FormatError
from bytekiln.model import TransformerLM
from bytekiln.optim import AdamW, Optimizer, clip_gradients, groups_of, kind_of, make_optimizer
from named_model import KINDS, SHAPES, NoSync, bits, fill_gradients, named_model

BASE = OptimizerConfig(lr=1e-2, weight_decay=0.1, beta1=0.9, beta2=0.95)
SCALES = {"embedding": 3.0, "head": 0.5, "scalar": 2.0, "gate": 2.0, "matrix": 1.0}
EVERY = {
    "adamw": {"optimizer": "adamw"},
    "adamw-cautious": {"optimizer": "adamw", "cautious_weight_decay": True},
    "lion": {"optimizer": "lion"},
    "lion-cautious": {"optimizer": "lion", "cautious_weight_decay": True},
    "sgd": {"optimizer": "sgd"},
    "sgd-plain": {"optimizer": "sgd", "nesterov": False, "weight_decay": 0.0},
    "muon": {"optimizer": "muon"},
    "muon-jordan": {"optimizer": "muon", "ns_coefficients": "jordan", "nesterov": False, "muon_scale": "rms"},
    "normuon": {"optimizer": "muon", "normuon": True, "cautious_weight_decay": True},
}
every = pytest.mark.parametrize("values", EVERY.values(), ids=EVERY.keys())


def config(**values: object) -> OptimizerConfig:
    return BASE.model_copy(update=values)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in model.named_parameters()}


def plain_adamw(model: nn.Module, c: OptimizerConfig) -> Optimizer:
    return Optimizer(model, [AdamW(groups_of(list(model.named_parameters()), c), c, fused=False)])


def decay_of(name: str, c: OptimizerConfig) -> float:
    kind = KINDS.get(name, "matrix")
    left_out = kind == "scalar" or (kind in ("embedding", "head") and not c.decay_embeddings)
    return 0.0 if left_out else c.weight_decay


def float64_step(
    name: str, c: OptimizerConfig, w: Tensor, g: Tensor, memory: dict[str, Tensor], t: int, lr: float
) -> tuple[Tensor, Tensor]:
    """The rules as their papers have them, one parameter at a time.

    Returns the new weight, and where a sign decided that fp32 may round the other way.
    """
    lr *= {"embedding": c.embedding_lr_scale, "head": c.head_lr_scale, "matrix": 1.0}.get(
        KINDS.get(name, "matrix"), c.scalar_lr_scale
    )
    m = memory.setdefault("m", torch.zeros_like(w))
    v = memory.setdefault("v", torch.zeros_like(w))
    if c.optimizer == "adamw":
        memory["m"] = c.beta1 * m + (1 - c.beta1) * g
        memory["v"] = c.beta2 * v + (1 - c.beta2) * g * g
        update = memory["m"] / (1 - c.beta1**t) / ((memory["v"] / (1 - c.beta2**t)).sqrt() + c.eps)
    elif c.optimizer == "lion":
        mixed = c.beta1 * m + (1 - c.beta1) * g
        update = torch.sign(mixed)
        memory["m"] = c.beta2 * m + (1 - c.beta2) * g
    else:
        memory["m"] = c.momentum * m + g
        update = g + c.momentum * memory["m"] if c.nesterov else memory["m"]
    mask = (update * w >= 0).double() if c.cautious_weight_decay else 1.0
    doubtful = torch.zeros_like(w, dtype=torch.bool)
    if c.cautious_weight_decay:
        doubtful |= (update.abs() < 1e-5) | (w.abs() < 1e-5)
    if c.optimizer == "lion":
        doubtful |= mixed.abs() < 1e-7
    return w - lr * decay_of(name, c) * mask * w - lr * update, doubtful


@pytest.mark.parametrize(
    ("rule", "cautious", "eps"),
    [
        *(("adamw", cautious, eps) for cautious in (False, True) for eps in (1e-8, 1e-2, 1.0)),
        *(("adamw-unfused", cautious, 1e-8) for cautious in (False, True)),
        *((rule, cautious, 1e-8) for rule in ("lion", "sgd", "sgd-heavy-ball") for cautious in (False, True)),
    ],
)
def test_a_hundred_steps_by_hand(rule: str, cautious: bool, eps: float) -> None:
    c = config(
        optimizer=rule.split("-")[0],
        nesterov=rule != "sgd-heavy-ball",
        cautious_weight_decay=cautious,
        eps=eps,
        decay_embeddings=not cautious,
        embedding_lr_scale=SCALES["embedding"],
        head_lr_scale=SCALES["head"],
        scalar_lr_scale=SCALES["scalar"],
    )
    m = named_model()
    optimizer = plain_adamw(m, c) if rule == "adamw-unfused" else make_optimizer(m, c)
    plain = {n: p.double().clone() for n, p in weights(m).items()}
    memory: dict[str, dict[str, Tensor]] = {n: {} for n in plain}
    doubts = 0
    for t in range(1, 101):
        fill_gradients(m, t, 0.1)
        lr = 1e-2 / math.sqrt(t)
        doubtful = {}
        for n, p in m.named_parameters():
            assert p.grad is not None
            plain[n], doubtful[n] = float64_step(n, c, plain[n], p.grad.double(), memory[n], t, lr)
        optimizer.step(lr)
        for n, p in weights(m).items():
            plain[n] = torch.where(doubtful[n], p.double(), plain[n])
            doubts += int(doubtful[n].sum())
    assert doubts < (1e-3 if cautious or rule == "lion" else 1e-9) * 100 * sum(p.numel() for p in m.parameters())
    for n, p in weights(m).items():
        torch.testing.assert_close(p.double(), plain[n], rtol=1e-4, atol=2e-6, msg=lambda s, n=n: f"{n}: {s}")


def torchs(model: nn.Module, c: OptimizerConfig) -> torch.optim.Optimizer:
    scalars = [p for n, p in model.named_parameters() if p.ndim < 2 or n == "shift_lambdas"]
    groups = [
        {"params": [p for p in model.parameters() if all(p is not s for s in scalars)], "weight_decay": c.weight_decay},
        {"params": scalars, "weight_decay": 0.0},
    ]
    if c.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps, fused=True)
    return torch.optim.SGD(model.parameters(), lr=c.lr, momentum=c.momentum, nesterov=c.nesterov)


@pytest.mark.parametrize("take", [None, True], ids=["always", "taken"])
def test_adamw_is_torchs_to_the_bit(take: bool | None) -> None:
    c = config()
    ours, theirs = named_model(), named_model()
    optimizer, reference = make_optimizer(ours, c), torchs(theirs, c)
    for t in range(1, 101):
        fill_gradients(ours, t)
        fill_gradients(theirs, t)
        for group in reference.param_groups:
            group["lr"] = 1e-2 / t
        optimizer.step(1e-2 / t, None if take is None else torch.tensor(take))
        reference.step()
    assert bits(weights(ours)) == bits(weights(theirs))


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_torchs(nesterov: bool) -> None:
    c = config(optimizer="sgd", nesterov=nesterov, weight_decay=0.0)
    ours, theirs = named_model(), named_model()
    optimizer, reference = make_optimizer(ours, c), torchs(theirs, c)
    for t in range(1, 101):
        fill_gradients(ours, t, 0.1)
        fill_gradients(theirs, t, 0.1)
        optimizer.step(c.lr)
        reference.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_groups_by_name() -> None:
    assert {n: kind_of(n, torch.empty(s)) for n, s in SHAPES.items()} == {n: KINDS.get(n, "matrix") for n in SHAPES}
    c = config(embedding_lr_scale=3.0, head_lr_scale=0.5, scalar_lr_scale=2.0, decay_embeddings=False)
    named = list(named_model().named_parameters())
    groups = {g.name: g for g in groups_of(named, c)}
    assert sorted(n for g in groups.values() for n in g.bundle.names) == sorted(SHAPES)
    assert {n: g.lr_scale for n, g in groups.items()} == SCALES
    assert {n: g.weight_decay for n, g in groups.items()} == {
        "matrix": 0.1,
        "gate": 0.1,
        "embedding": 0.0,
        "head": 0.0,
        "scalar": 0.0,
    }
    assert {g.weight_decay for g in groups_of(named, config()) if g.name != "scalar"} == {0.1}


def everything_on() -> TransformerLM:
    torch.manual_seed(0)
    return TransformerLM(
        ModelConfig(
            vocab_size=20, d_model=16, num_layers=2, num_heads=2, context_length=8, ffn="moe", num_experts=3,
            num_shared_experts=1, value_embeddings=True, residual_lambdas=True, embedding_norm=True, bias=True,
            token_shift=2,
            norm="layer", position="learned",
        )
    )  # fmt: skip


def test_the_models_own_names_fall_into_these_groups() -> None:
    kinds: dict[str, set[str]] = {}
    for n, p in everything_on().named_parameters():
        kinds.setdefault(kind_of(n, p), set()).add(re.sub(r"layers\.\d\.|\.weight$", "", n))
    assert all(n.endswith("bias") or n.startswith("ln") or n.endswith("lambdas") for n in kinds.pop("scalar"))
    assert kinds == {
        "embedding": {"token_embeddings", "position_embeddings", "attn.value_embeddings"},
        "head": {"lm_head"},
        "gate": {"ffn.router", "attn.value_gate"},
        "matrix": {
            *(f"attn.{x}_proj" for x in ("q", "k", "v", "output")),
            *(f"ffn.experts_w{i}" for i in (1, 2, 3)),
            *(f"ffn.shared.w{i}" for i in (1, 2, 3)),
        },
    }


@every
def test_an_update_that_is_tried_out_moves_nothing(values: dict[str, object]) -> None:
    m = everything_on()
    optimizer = make_optimizer(m, config(**values))
    fill_gradients(m, 0)
    before = bits(m.state_dict())
    optimizer.try_out()
    assert bits(m.state_dict()) == before and optimizer.state_tensors() == {}
    optimizer.step(1e-2)
    fill_gradients(m, 1)
    stood = bits({**m.state_dict(), **optimizer.state_tensors()})
    optimizer.try_out()
    assert bits({**m.state_dict(), **optimizer.state_tensors()}) == stood


@every
def test_every_rule_learns(values: dict[str, object]) -> None:
    m = everything_on()
    ids_BxT = torch.randint(20, (4, 9))
    optimizer = make_optimizer(m, config(**values))
    lr = {"lion": 1e-3, "sgd": 1e-2}.get(str(values["optimizer"]), 1e-2)
    losses = []
    for _ in range(40):
        loss = nn.functional.cross_entropy(m(ids_BxT[:, :-1]).flatten(0, 1), ids_BxT[:, 1:].flatten())
        loss.backward()
        clip_gradients(list(m.parameters()), 1.0)
        optimizer.step(lr, loss.isfinite())
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


def test_muon_takes_the_blocks_matrices_and_adamw_the_rest() -> None:
    m = named_model()
    optimizer = make_optimizer(m, config(optimizer="muon", normuon=True))
    fill_gradients(m, 1)
    optimizer.step(1e-3)
    tensors = optimizer.state_tensors()
    matrices = {n for n in SHAPES if n not in KINDS}
    assert {k.split("/")[1] for k in tensors if k.startswith("momentum/")} == matrices
    assert {k.split("/")[1] for k in tensors if k.startswith("exp_avg/")} == set(KINDS)
    assert {k for k in tensors if k.startswith("step/")} == {f"step/{g}" for g in SCALES if g != "matrix"}
    assert all(tensors[f"momentum/{n}"].shape == SHAPES[n] for n in matrices)
    assert all(tensors[f"row_square/{n}"].shape == SHAPES[n][:-1] for n in matrices)


def test_what_wants_no_gradient_is_left_alone_and_tied_weights_move_once() -> None:
    m = named_model()
    m.get_submodule("lm_head").weight = m.get_submodule("token_embeddings").weight
    frozen = m.get_parameter("layers.0.ffn.w1.weight")
    frozen.requires_grad_(False)
    before = frozen.clone()
    optimizer = make_optimizer(m, config(optimizer="muon"))
    fill_gradients(m, 1)
    optimizer.step(1e-2)
    assert torch.equal(before, frozen)
    assert "exp_avg/token_embeddings.weight" in optimizer.state_tensors()
    assert not any("lm_head" in k or "layers.0.ffn.w1" in k for k in optimizer.state_tensors())
    optimizer.zero_grad()
    assert all(p.grad is None for p in m.parameters() if p.requires_grad)


@every
def test_a_step_that_is_not_taken_leaves_every_bit(values: dict[str, object]) -> None:
    m = named_model()
    with torch.no_grad():
        for p in m.parameters():
            p.view(-1)[0] = -0.0
    optimizer = make_optimizer(m, config(**values))
    for t in range(3):
        fill_gradients(m, t)
        for p in m.parameters():
            assert p.grad is not None
            p.grad.view(-1)[1] = -0.0
        optimizer.step(1e-2 if t else 0.0, torch.tensor(True))
    for tensor in optimizer.state_tensors().values():
        if tensor.ndim:
            tensor.view(-1)[0] = -0.0
    before = bits(weights(m)), bits(optimizer.state_tensors())
    for bad in (math.nan, math.inf, 1.0):
        fill_gradients(m, 7)
        for p in m.parameters():
            assert p.grad is not None
            p.grad *= bad
        optimizer.step(1e-2, torch.tensor(False))
        assert (bits(weights(m)), bits(optimizer.state_tensors())) == before
    fill_gradients(m, 7)
    optimizer.step(1e-2, torch.tensor(True))
    after = bits(weights(m)), bits(optimizer.state_tensors())
    assert all(a != b for a, b in zip(before[0].values(), after[0].values(), strict=True))
    assert all(after[1][k] != before[1][k] for k in before[1])


def test_the_plain_adamw_leaves_out_steps_too() -> None:
    c = config(cautious_weight_decay=True)
    m = named_model()
    optimizer = plain_adamw(m, c)
    fill_gradients(m, 1)
    optimizer.step(1e-2, torch.tensor(True))
    before = bits(weights(m)), bits(optimizer.state_tensors())
    fill_gradients(m, 2, math.nan)
    optimizer.step(1e-2, torch.tensor(False))
    assert (bits(weights(m)), bits(optimizer.state_tensors())) == before


@every
def test_left_out_steps_do_not_count(values: dict[str, object]) -> None:
    """Good steps with bad ones between them end where the good ones alone do; `take` True is no take at all."""
    runs = [named_model(), named_model()]
    optimizers = [make_optimizer(m, config(**values)) for m in runs]
    for t in range(6):
        fill_gradients(runs[0], t)
        fill_gradients(runs[1], t)
        optimizers[0].step(1e-2)
        optimizers[1].step(1e-2, torch.tensor(True))
        fill_gradients(runs[1], 99, math.nan)
        optimizers[1].step(1e-2, torch.tensor(False))
    assert bits(weights(runs[0])) == bits(weights(runs[1]))
    assert bits(optimizers[0].state_tensors()) == bits(optimizers[1].state_tensors())


@every
@pytest.mark.parametrize("steps", [1, 3])
def test_state_goes_out_and_in_to_the_bit(values: dict[str, object], steps: int, tmp_path: Path) -> None:
    runs = [named_model(), named_model(1)]
    optimizers = [make_optimizer(m, config(**values)) for m in runs]
    assert optimizers[0].state_tensors() == {}
    optimizers[0].load_state_tensors({}, "here")
    for t in range(steps):
        fill_gradients(runs[0], t)
        optimizers[0].step(1e-2)
    runs[1].load_state_dict(runs[0].state_dict())
    safetensors.torch.save_file(optimizers[0].state_tensors(), tmp_path / "t.safetensors")
    stored = safetensors.torch.load_file(tmp_path / "t.safetensors")
    optimizers[1].load_state_tensors({**stored, "guard/scale": torch.ones(())}, "here")
    assert bits(optimizers[1].state_tensors()) == bits(optimizers[0].state_tensors())
    for t in range(10, 13):
        for m, optimizer in zip(runs, optimizers, strict=True):
            fill_gradients(m, t)
            optimizer.step(1e-2, torch.tensor(t != 11))
    assert bits(weights(runs[0])) == bits(weights(runs[1]))
    name = next(iter(stored))
    whole = bits(optimizers[1].state_tensors())
    with pytest.raises(FormatError, match=rf"^here: found nothing for {name}; expected shape"):
        optimizers[1].load_state_tensors({k: v * 0 for k, v in stored.items() if k != name}, "here")
    with pytest.raises(FormatError, match=rf"^here: found shape \(7,\) for {name}; expected shape"):
        optimizers[1].load_state_tensors({**stored, name: torch.zeros(7)}, "here")
    assert bits(optimizers[1].state_tensors()) == whole, "a refused state was half loaded"


@every
def test_nobody_waits_for_the_device(values: dict[str, object]) -> None:
    m = named_model()
    optimizer = make_optimizer(m, config(**values))
    for take in (None, torch.tensor(True), torch.tensor(False)):
        fill_gradients(m, 1)
        with NoSync():
            clip_gradients(list(m.parameters()), 1.0)
            clip_gradients(list(m.parameters()), 0)
            optimizer.step(1e-2, take)
            optimizer.zero_grad()
            optimizer.state_tensors()


def test_the_watch_sees_a_sync() -> None:
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoSync():
        float(torch.ones(()))
    with pytest.raises(AssertionError, match="nonzero"), NoSync():
        torch.ones(3).nonzero()


def on_one_of_two(rank: int, store: str) -> None:
    """Two sharded processes must do what one alone does."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor

    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    for rule in ("adamw-cautious", "lion", "normuon"):
        c = config(**EVERY[rule], averaging="ema")
        sharded, alone = named_model(), named_model()
        fully_shard(sharded, mesh=mesh)
        optimizers = make_optimizer(sharded, c), make_optimizer(alone, c)
        averages = Averaging(sharded, c), Averaging(alone, c)
        for t in range(5):
            fill_gradients(alone, t, math.nan if t == 3 else 1.0)
            for n, p in sharded.named_parameters():
                p.grad = distribute_tensor(alone.get_parameter(n).grad, p.device_mesh, p.placements)
            for optimizer, average in zip(optimizers, averages, strict=True):
                optimizer.step(1e-2, torch.tensor(t != 3))
                average.update(t / 5, torch.tensor(t != 3))
            if t == 2:  # out and in again, while it runs
                optimizers[0].load_state_tensors(
                    {k: v.clone() for k, v in optimizers[0].state_tensors().items()}, "here"
                )
                averages[0].load({k: v.clone() for k, v in averages[0].tensors().items()}, "here")
        for found, expected in (
            ({n: p.full_tensor() for n, p in sharded.named_parameters()}, weights(alone)),
            (optimizers[0].state_tensors(), optimizers[1].state_tensors()),
            (averages[0].tensors(), averages[1].tensors()),
        ):
            assert found.keys() == expected.keys()
            for k, v in expected.items():
                torch.testing.assert_close(found[k], v, rtol=1e-5, atol=1e-6)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_sharded_processes_do_what_one_does(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(on_one_of_two, (str(tmp_path / "store"),), nprocs=2)


@every
def test_nothing_waits_on_cuda_either(values: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors of the device have no values: whatever asked for one would fail."""
    monkeypatch.setattr("bytekiln.muon.has_fast_bf16", lambda _: True)
    with FakeTensorMode(), torch.device("cuda"):
        m = named_model()
        optimizer = make_optimizer(m, config(**values))
        average = Averaging(m, config(averaging="ema"))
        take = torch.ones((), dtype=torch.bool)
        for p in m.parameters():
            p.grad = torch.randn_like(p)
        assert clip_gradients(list(m.parameters()), 1.0).device.type == "cuda"
        optimizer.step(1e-2, take)
        optimizer.step(1e-2)
        average.update(0.5, take)
        assert {t.device.type for t in optimizer.state_tensors().values()} == {"cuda"}
        with pytest.raises(DataDependentOutputException):
            bool(take)


def test_clipping_returns_the_norm_before_it() -> None:
    m = named_model()
    for p in m.parameters():
        p.grad = torch.ones_like(p)
    norm = math.sqrt(sum(p.numel() for p in m.parameters()))
    assert float(clip_gradients(list(m.parameters()), 0)) == pytest.approx(norm)
    assert all(bool((p.grad == 1).all()) for p in m.parameters())
    assert float(clip_gradients(list(m.parameters()), 1.0)) == pytest.approx(norm)
    assert float(clip_gradients(list(m.parameters()), 1.0)) == pytest.approx(1.0, rel=1e-4)


def test_an_infinite_norm_leaves_unclipped_gradients_alone() -> None:
    m = named_model()
    fill_gradients(m, 1)
    m.get_parameter("residual_lambdas").grad.fill_(math.inf)
    assert float(clip_gradients(list(m.parameters()), 0)) == math.inf
    assert bool(m.get_parameter("lm_head.weight").grad.isfinite().all())
