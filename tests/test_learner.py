"""A step: the gradient of the large batch, no waiting for the device, and an update that can be left out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

from bytekiln.attention import Attend
from bytekiln.batch import Batch
from bytekiln.config import ModelConfig, RunConfig
from bytekiln.data import Prefetcher, open_data
from bytekiln.learner import Learner, Taken, micro_seed, read
from bytekiln.model import TransformerLM
from bytekiln.ranks import Ranks
from fake_cuda import CUDA, fake_cuda
from lm_runs import tiny, tokens

CPU = torch.device("cpu")


class NoSync(TorchDispatchMode):
    """Fails on whatever makes a host wait for its device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.is_nonzero)
        assert func.overloadpacket not in waits, func
        return func(*args, **(kwargs or {}))


def learner_of(config: RunConfig) -> tuple[Learner, Prefetcher]:
    data = open_data(config, None)
    config = config.with_(vocab_size=data.vocab_size)
    return Learner(config, CPU, Ranks()), Prefetcher(data.train, 0)


def take(learner: Learner, batches: Prefetcher, step: int, micro_steps: int = 1, lr: float = 1e-2) -> Taken:
    first = step * micro_steps * learner.config.training.batch_size
    found = learner.gradients(batches, step, first, micro_steps)
    norm = learner.clipped_norm()
    windows = first, first + micro_steps * learner.config.training.batch_size
    return learner.update(found, norm, step=step, windows=windows, lr=lr, share=step / 10)


RECIPE: dict[str, object] = {
    "optimizer": "muon",
    "normuon": True,
    "cautious_weight_decay": True,
    "decay_embeddings": False,
    "ffn": "relu2",
    "qk_norm": True,
    "embedding_norm": True,
    "value_embeddings": True,
    "token_shift": 2,
    "residual_lambdas": True,
    "zero_init_projections": True,
    "head_init": "small",
    "loss_chunk": 100,
    "logit_softcap": 15.0,
    "residual_precision": "products",
    "attention": "sdpa",
}
"""Every part of the leaderboard's model and optimizer."""
EVERYTHING: list[dict[str, object]] = [
    {},
    {"optimizer": "muon", "averaging": "ema", "skip_spikes": True, "normuon": True},
    {"optimizer": "lion", "averaging": "tail", "dropout": 0.1},
    {"optimizer": "sgd", "precision": "fp16"},
    {"ffn": "moe", "num_experts": 4, "expert_ffn": "relu2", "load_balancing": "bias"},
    {"ffn": "moe", "num_experts": 4, "load_balancing": "loss", "router_noise": 0.1},
    {"z_loss": 1e-4, "logit_softcap": 15.0, "loss_chunk": 5, "value_embeddings": True, "residual_lambdas": True},
    {"windows": "stream", "sliding_window": 4, "qk_norm": True, "num_kv_heads": 1, "token_shift": 2},
    {**RECIPE, "precision": "bf16", "loss_chunk": 5},
]


@pytest.mark.parametrize("values", EVERYTHING, ids=lambda v: ",".join(map(str, v)) or "plain")
def test_no_step_waits_for_the_device(tmp_path: Path, values: dict[str, object]) -> None:
    """On a GPU each of these calls would stop the host until the device has done all that was asked of it."""
    learner, batches = learner_of(tiny(tmp_path, **values))
    take(learner, batches, 0)  # what is made once, on the first step, may ask
    with NoSync():
        steps = [take(learner, batches, i, micro_steps=2) for i in range(1, 4)]
    told = read(steps)
    assert [s.step for s in steps] == [2, 3, 4]
    assert all(t.alive for t in told)


def test_the_check_sees_a_wait() -> None:
    with pytest.raises(AssertionError), NoSync():
        float(torch.ones(()))


def gradient(learner: Learner) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in learner.model.named_parameters() if p.grad is not None}


def test_micro_steps_are_weighted_by_their_targets(tmp_path: Path) -> None:
    """Padded documents: micro-steps with different numbers of targets still add up to the large batch."""
    ids = np.array([t for n in (2, 7, 3, 6, 2, 4, 7, 5, 3, 2, 6, 4) for t in [*range(1, n), 0]] * 4, dtype=np.uint16)
    tiny(tmp_path)
    np.save(tmp_path / "train.npy", ids)
    about = json.loads((tmp_path / "train.npy.json").read_text())
    about |= {"tokens": len(ids), "max_id": 6, "eot_id": 0}
    (tmp_path / "train.npy.json").write_text(json.dumps(about))
    found, counts = [], []
    for batch_size, micro_steps in ((12, 1), (2, 6)):
        config = tiny(tmp_path, batch_size=batch_size, windows="padded", sampling="sequential", context_length=40)
        learner, batches = learner_of(config)
        learner.model.double()
        told = learner.gradients(batches, 0, 0, micro_steps)
        counts.append([b.count for b in told.batches])
        found.append((gradient(learner), float(told.loss), told.tokens))
    assert len(set(counts[1])) > 1, "as many targets in each would hide a wrong weight"
    assert found[0][2] == found[1][2]
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-6)
    for name, g in found[1][0].items():
        torch.testing.assert_close(g, found[0][0][name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("windows", ["stream", "random"])
def test_accumulation_is_the_large_batch(tmp_path: Path, windows: str) -> None:
    """1 × 12 windows, 3 × 4 and 12 × 1 give the same gradient to 1e-6 relative."""
    found = []
    for batch_size, micro_steps in ((12, 1), (4, 3), (1, 12)):
        sampling = "random" if windows == "random" else "shuffled"
        config = tiny(tmp_path, batch_size=batch_size, grad_accum_steps=micro_steps, sampling=sampling)
        learner, batches = learner_of(config)
        learner.model.double()
        told = learner.gradients(batches, 3, 36, micro_steps)
        found.append((gradient(learner), float(told.loss)))
        assert told.tokens == 12 * 8
    for other, loss in found[1:]:
        assert loss == pytest.approx(found[0][1], rel=1e-6)
        for name, g in other.items():
            torch.testing.assert_close(g, found[0][0][name], rtol=1e-6, atol=1e-9)


def test_a_step_that_is_not_finite_leaves_every_tensor_as_it_was(tmp_path: Path) -> None:
    for optimizer in ("adamw", "muon", "lion", "sgd"):
        learner, batches = learner_of(tiny(tmp_path, optimizer=optimizer, averaging="ema"))
        take(learner, batches, 0)
        before = {**learner.tensors()[0], **learner.tensors()[1]}
        before = {k: v.clone() for k, v in before.items()}
        learner.gradients(batches, 1, 3, 1)
        next(learner.model.parameters()).grad[0, 0] = float("nan")  # type: ignore[index]
        found = learner.gradients(batches, 1, 3, 1)
        taken = learner.update(found, learner.clipped_norm(), step=1, windows=(3, 6), lr=1e-2, share=0.1)
        after = {**learner.tensors()[0], **learner.tensors()[1]}
        assert not read([taken])[0].alive
        for name, t in before.items():
            assert torch.equal(t, after[name]), (optimizer, name)


@pytest.mark.parametrize("values", EVERYTHING, ids=lambda v: ",".join(map(str, v)) or "plain")
def test_tensors_go_out_and_in(tmp_path: Path, values: dict[str, object]) -> None:
    """What `tensors` gives is all: another learner that takes it goes on bit for bit."""
    learner, batches = learner_of(tiny(tmp_path, **values))
    for i in range(3):
        take(learner, batches, i)
    weights, rest = ({k: v.clone() for k, v in t.items()} for t in learner.tensors())
    other, batches_too = learner_of(tiny(tmp_path, **values, seed=5).with_(seed=42))
    other.load(weights, rest, "here")
    for i in range(3, 5):
        a, b = take(learner, batches, i), take(other, batches_too, i)
        assert torch.equal(a.told, b.told)
    for x, y in zip(learner.tensors(), other.tensors(), strict=True):
        assert x.keys() == y.keys()
        assert all(torch.equal(x[k], y[k]) for k in x)


def test_seeds_of_micro_steps_differ() -> None:
    seeds = {micro_seed(s, t, m) for s in range(5) for t in range(20) for m in range(20)}
    assert len(seeds) == 5 * 20 * 20
    assert all(0 <= s < 2**63 for s in seeds)


def test_fp16_scales_the_loss_and_gives_unscaled_gradients(tmp_path: Path) -> None:
    plain, batches = learner_of(tiny(tmp_path))
    half, _ = learner_of(tiny(tmp_path, precision="fp16"))
    norms = []
    for learner in (plain, half):
        learner.gradients(batches, 0, 0, 1)
        norms.append(float(learner.clipped_norm()))
    assert float(half.guard.scale) == 2.0**16
    assert norms[1] == pytest.approx(norms[0], rel=0.02)


@pytest.mark.slow
def test_twenty_rates_are_one_compilation(tmp_path: Path) -> None:
    learner, batches = learner_of(tiny(tmp_path, optimizer="muon"))
    said: list[str] = []
    learner.compile(batches.get([(0, 0, 0, 3)])[0], said.append)
    assert said == []
    assert learner.recompiles == 0
    for i in range(20):
        take(learner, batches, i, micro_steps=1 + i // 10, lr=1e-3 * (i + 1))  # the batch grows in between
    assert learner.recompiles == 0


# --- on CUDA, as far as it goes without one ---

ON_CUDA: list[tuple[dict[str, object], str]] = [
    ({}, "_scaled_dot_product_flash_attention_backward"),
    ({"document_mask": True, "attention": "sdpa"}, "_scaled_dot_product_efficient_attention_backward"),
    ({"document_mask": True, "sliding_window": 32, "num_kv_heads": 1}, "flex_attention_backward"),
    ({"optimizer": "muon", "normuon": True, "averaging": "ema", "skip_spikes": True}, "bmm"),
    ({"loss_chunk": 100, "logit_softcap": 15.0, "z_loss": 1e-4, "tie_embeddings": True}, "scatter_add_"),
    ({"ffn": "moe", "num_experts": 4, "load_balancing": "loss", "router_noise": 0.1}, "_grouped_mm"),
    ({"ffn": "moe", "num_experts": 4, "load_balancing": "bias", "num_shared_experts": 1}, "_grouped_mm"),
    (RECIPE, "_scaled_dot_product_flash_attention_backward"),
    ({"precision": "fp16", "optimizer": "lion", "dropout": 0.1}, "_foreach_mul_"),
]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    ("values", "uses"), ON_CUDA, ids=lambda v: ",".join(map(str, v)) if isinstance(v, dict) else ""
)
def test_whole_steps_trace_on_cuda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, object], uses: str
) -> None:
    """Forward, loss, backward, clipping and update without contents: nothing is on two devices, nothing waits."""
    tokens(tmp_path / "train.npy", 4000, eot=7)
    tokens(tmp_path / "val.npy", 200, seed=1, eot=7)
    shape = {"d_model": 64, "context_length": 128, "batch_size": 4, "precision": "bf16", "windows": "packed"}
    config = tiny(tmp_path, **{**shape, **values})
    batch = open_data(config, None).train.batch(0, 0, 0, 4)
    # A weight without contents cannot be drawn, nor moved once it is there: it is born on the device.
    monkeypatch.setattr(TransformerLM, "initialise", lambda _: None)
    monkeypatch.setattr("bytekiln.learner.make_model", born_on_cuda)
    monkeypatch.setattr("bytekiln.attention._compiled_flex", lambda: flex_attention)  # Inductor asks a driver
    batches = Prefetcher(Always(batch), 0)
    with fake_cuda() as called:
        learner = Learner(config, CUDA, Ranks())
        for step in range(2):  # the second one with the state that the first one made
            found = learner.gradients(batches, step, 0, 2)
            for name, p in learner.model.named_parameters():
                assert p.grad is not None and (p.grad.device, p.grad.shape) == (CUDA, p.shape), name
            norm = learner.clipped_norm()
            told = learner.update(found, norm, step=step, windows=(0, 8), lr=1e-3, share=0.1).told
        weights, rest = learner.tensors()
        assert {t.device for t in (told, *weights.values(), *rest.values())} == {CUDA}
        with pytest.raises(DataDependentOutputException):
            told.tolist()
    assert called[uses], called


def born_on_cuda(model: ModelConfig, _: torch.device, attend: Attend) -> TransformerLM:
    with CUDA:
        return TransformerLM(model, attend=attend)


class Always:
    """A source with one batch."""

    def __init__(self, batch: Batch) -> None:
        self.only = batch

    def batch(self, step: int, first: int, place: int, count: int) -> Batch:
        return self.only
