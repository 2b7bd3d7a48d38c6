"""Every choice of `ModelConfig` does something, is as large as it says, and trains with every other or is refused.

`PAIRWISE` covers every pair of choices that are accepted together; each of its models is held to the formulas, counted,
cached and trained.
"""

from __future__ import annotations

import itertools
import random

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn

from bytekiln.accounting import parameter_count
from bytekiln.attention import Sight, reference_attention, sdpa_attention
from bytekiln.config import ModelConfig
from bytekiln.errors import ConfigError
from bytekiln.model import KVCache, TransformerLM
from test_model import equals_its_formulas, ids

CHOICES: dict[str, tuple[object, ...]] = {
    "ffn": ("swiglu", "silu", "gelu", "gelu_tanh", "relu2", "moe"),
    "norm": ("rms", "layer", "none"),
    "norm_position": ("pre", "post"),
    "position": ("rope", "learned", "none"),
    "causal": ("auto", False),
    "num_kv_heads": (0, 2, 1),
    "sliding_window": (0, 5),
    "qk_norm": (False, True),
    "tie_embeddings": (False, True),
    "bias": (False, True),
    "dropout": (0.0, 0.1),
    "logit_softcap": (0.0, 5.0),
    "embedding_norm": (False, True),
    "token_shift": (0, 2),
    "value_embeddings": (False, True),
    "residual_lambdas": (False, True),
    "zero_init_projections": (False, True),
    "head_init": ("default", "small", "zero"),
    "init": ("course", "gpt2"),
    "pad_vocab": (False, True),
    "max_seq_len": (0, 20),
    "d_ff": (0, 24),
    "rope_theta": (10_000.0, 100.0),
    "expert_ffn": ("swiglu", "silu", "gelu", "gelu_tanh", "relu2"),
    "num_experts": (8, 4),
    "expert_top_k": (2, 1),
    "num_shared_experts": (0, 1),
    "router_noise": (0.0, 0.3),
    "load_balancing": ("loss", "bias", "none"),
}
"""The default first. What has no part in it: sizes, `dense_twin`, which rewrites the others, `residual_precision`,
which changes nothing in fp32, and `load_balancing_weight`, which the model itself does not use but for
`move_router_bias`."""
OF_EXPERTS = list(CHOICES)[list(CHOICES).index("expert_ffn") :]
SIZES = {"vocab_size": 50, "d_model": 16, "num_layers": 2, "num_heads": 4, "context_length": 12}
Pair = frozenset[tuple[str, object]]


def accepted(values: dict[str, object]) -> ModelConfig | None:
    """The model of these choices and defaults for the rest; None where it is refused."""
    if "ffn" not in values and any(values.get(n, CHOICES[n][0]) != CHOICES[n][0] for n in OF_EXPERTS):
        values = {**values, "ffn": "moe"}
    try:
        return ModelConfig(**SIZES, **values)
    except ConfigError:
        return None


def pairs_of(values: dict[str, object]) -> set[Pair]:
    return {frozenset(pair) for pair in itertools.combinations(values.items(), 2)}


def possible_pairs() -> set[Pair]:
    names = itertools.combinations(CHOICES, 2)
    every = (
        dict(zip(two, values, strict=True)) for two in names for values in itertools.product(*map(CHOICES.get, two))
    )
    return {frozenset(values.items()) for values in every if accepted(values)}


def pairwise() -> list[dict[str, object]]:
    """Few sets of choices that hold every possible pair, found greedily; always the same."""
    rng, sets = random.Random(0), []
    missing = possible_pairs()
    while missing:
        pair = min(missing, key=lambda p: sorted(map(str, p)))
        chosen = dict(pair)
        if any(chosen.get(n, CHOICES[n][0]) != CHOICES[n][0] for n in OF_EXPERTS):
            chosen["ffn"] = "moe"
        for name in rng.sample(list(CHOICES), len(CHOICES)):
            if name not in chosen:
                gains = {
                    v: sum(frozenset([(name, v), other]) in missing for other in chosen.items())
                    for v in CHOICES[name]
                    if accepted({**chosen, name: v})
                }
                chosen[name] = max(gains, key=lambda v: gains[v])
        sets.append({name: chosen[name] for name in CHOICES})
        missing -= pairs_of(chosen)
    return sets


PAIRWISE = pairwise()
LABELS = [f"set{i}" for i in range(len(PAIRWISE))]


def build(values: dict[str, object], **more: object) -> TransformerLM:
    torch.manual_seed(1)
    return TransformerLM(ModelConfig(**{**SIZES, **values, **more}))


def test_every_possible_pair_is_covered() -> None:
    covered = set().union(*map(pairs_of, PAIRWISE))
    impossible = 0
    for two in itertools.combinations(CHOICES, 2):
        for values in itertools.product(*map(CHOICES.get, two)):
            pair = dict(zip(two, values, strict=True))
            assert (frozenset(pair.items()) in covered) == bool(accepted(pair)), pair
            impossible += not accepted(pair)
    # ffn other than moe with what belongs to experts; none with post and with embedding_norm; a tied head with two
    # starts; a window both ways; another angle in two kinds of positions without any.
    dense = len(CHOICES["ffn"]) - 1
    assert impossible == dense * sum(len(CHOICES[n]) - 1 for n in OF_EXPERTS) + 2 + 2 + 1 + 2
    assert len(PAIRWISE) < 60


@pytest.mark.parametrize("values", PAIRWISE, ids=LABELS)
def test_it_trains_with_every_other(values: dict[str, object]) -> None:
    """The loss falls, with documents on every second step, and every weight has a finite gradient."""
    model = build(values).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2, weight_decay=0.0)
    tokens = ids(8, 13)
    documents = (torch.arange(12) // 7).expand(8, 12).to(torch.int32)
    losses = []
    for step in range(12):
        out = model.features(tokens[:, :-1], None, documents if step % 2 else None)
        logits = F.linear(out.x_BxTxD, model.head_weight)
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) + 0.01 * out.balance
        optimizer.zero_grad()
        loss.backward()
        for name, p in model.named_parameters():
            assert p.grad is not None and bool(p.grad.isfinite().all()), name
        optimizer.step()
        model.move_router_bias(out.load_LxE)
        losses.append(float(loss.detach()))
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4]), losses
    still = [n for n, p in model.named_parameters() if not p.grad.any()]  # by the end, nothing is left without work
    assert not still, still


@pytest.mark.parametrize("values", PAIRWISE, ids=LABELS)
def test_it_is_its_formulas(values: dict[str, object]) -> None:
    documents = (torch.arange(12) // 5).expand(2, 12).to(torch.int32)
    equals_its_formulas(build(values), documents if PAIRWISE.index(values) % 2 else None)


@pytest.mark.parametrize("values", PAIRWISE, ids=LABELS)
def test_it_is_as_large_as_it_says(values: dict[str, object]) -> None:
    model = build(values)
    assert parameter_count(model.config) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("values", PAIRWISE, ids=LABELS)
def test_kernels_and_cache_give_the_same_logits(values: dict[str, object]) -> None:
    model = build(values).double().eval()
    with torch.no_grad():
        expected = model(ids(2, 12))
        slow = TransformerLM(model.config, attend=reference_attention).double().eval()
        slow.load_state_dict(model.state_dict())
        torch.testing.assert_close(slow(ids(2, 12)), expected)
        cache = KVCache(2)
        if model.config.bidirectional:
            with pytest.raises(ConfigError, match="cache: found one for a model with causal = false"):
                model(ids(2, 12), cache)
            return
        parts = [model(ids(2, 12)[:, a:b], cache) for a, b in ((0, 5), (5, 6), (6, 11), (11, 12))]
        torch.testing.assert_close(torch.cat(parts, dim=1), expected)


def scrambled(model: TransformerLM) -> dict[str, torch.Tensor]:
    """Weights of which none is at a value that hides a choice (gates of 0, lambdas of 1, norms of 1)."""
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.0, 0.3) if p.ndim > 1 else p.normal_(1.0, 0.3)
    return model.state_dict()


BASE: dict[str, dict[str, object]] = {
    "plain": {"d_ff": 24, "position": "rope", "max_seq_len": 12},
    "experts": {"d_ff": 24, "ffn": "moe"},
}


@pytest.mark.parametrize(
    ("base", "name", "value", "count"),
    [
        # By how much the number of weights changes: D = 16, L = 2, F = 24, V = 50, P = 12, heads 4 × 4 wide.
        ("plain", "norm", "layer", 0),
        ("plain", "norm", "none", -(2 * 2 + 1) * 16),
        ("plain", "norm_position", "post", 0),
        ("plain", "position", "learned", 12 * 16),
        ("plain", "position", "none", 0),
        ("plain", "rope_theta", 100.0, 0),
        ("plain", "ffn", "silu", -2 * 16 * 24),
        ("plain", "ffn", "gelu", -2 * 16 * 24),
        ("plain", "ffn", "gelu_tanh", -2 * 16 * 24),
        ("plain", "ffn", "relu2", -2 * 16 * 24),
        ("plain", "norm_eps", 0.5, 0),
        ("plain", "ffn", "moe", 2 * (7 * 3 * 16 * 24 + 8 * 16)),
        ("plain", "causal", False, 0),
        ("plain", "qk_norm", True, 0),
        ("plain", "num_kv_heads", 2, -2 * 2 * 16 * 8),
        ("plain", "tie_embeddings", True, -50 * 16),
        ("plain", "bias", True, 2 * (4 * 16 + 2 * 24 + 16)),
        ("plain", "logit_softcap", 1.0, 0),
        ("plain", "sliding_window", 3, 0),
        ("plain", "embedding_norm", True, 16),
        ("plain", "token_shift", 3, 3 * 16),
        ("plain", "value_embeddings", True, 50 * 16 + 4 * 16),
        ("plain", "residual_lambdas", True, 2 * 2),
        ("plain", "d_ff", 32, 2 * 3 * 16 * 8),
        ("experts", "expert_ffn", "silu", -2 * 8 * 16 * 24),
        ("experts", "expert_ffn", "gelu", -2 * 8 * 16 * 24),
        ("experts", "expert_ffn", "gelu_tanh", -2 * 8 * 16 * 24),
        ("experts", "expert_ffn", "relu2", -2 * 8 * 16 * 24),
        ("experts", "num_experts", 4, -2 * 4 * (3 * 16 * 24 + 16)),
        ("experts", "expert_top_k", 1, 0),
        ("experts", "num_shared_experts", 1, 2 * 3 * 16 * 24),
        ("experts", "dense_twin", True, -2 * (6 * 3 * 16 * 24 + 8 * 16)),
    ],
)
def test_a_choice_changes_logits_and_count(base: str, name: str, value: object, count: int) -> None:
    """On the same weights where both models have them."""
    one, other = (build({**BASE[base], **more}).eval() for more in ({}, {name: value}))
    shared = scrambled(one)
    scrambled(other)
    fits = {k: v for k, v in shared.items() if other.state_dict().get(k, torch.empty(0)).shape == v.shape}
    other.load_state_dict(fits, strict=False)
    with torch.no_grad():
        if name == "bias":  # LayerNorm's is its own; see below
            assert {k for k in other.state_dict() if k.endswith("bias")}
        assert not torch.allclose(one(ids(1, 12)), other(ids(1, 12)), atol=1e-3)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (one, other)]
    assert sizes[1] - sizes[0] == count == parameter_count(other.config) - parameter_count(one.config)


def test_what_changes_training_only() -> None:
    """Dropout, router noise: the same logits in evaluation, others in training."""
    for base, name, value in (("plain", "dropout", 0.2), ("experts", "router_noise", 1.0)):
        one, other = (build({**BASE[base], **more}) for more in ({}, {name: value}))
        other.load_state_dict(one.state_dict())
        x = ids(2, 12)
        with torch.no_grad():
            assert torch.equal(one.eval()(x), other.eval()(x))
            assert torch.equal(one.train()(x), one(x))
            assert not torch.equal(other.train()(x), other(x)) and not torch.equal(one(x), other(x))


def test_a_bias_on_the_choice_of_experts_changes_the_logits() -> None:
    one, other = (build({**BASE["experts"], "load_balancing": kind}).eval() for kind in ("none", "bias"))
    other.load_state_dict(one.state_dict(), strict=False)
    x = ids(2, 12)
    with torch.no_grad():
        assert torch.equal(one(x), other(x))  # it starts at zero
        other.move_router_bias(torch.tensor([[100.0] + [0.0] * 7] * 2))
        other.layers[0].ffn.router_bias *= 50
        assert not torch.allclose(one(x), other(x), atol=1e-3)


def test_layer_norms_have_a_bias_where_asked() -> None:
    model = build({"norm": "layer", "bias": True, "embedding_norm": True})
    names = [n for n, m in model.named_modules() if n.rpartition(".")[2].startswith("ln")]
    assert len(names) == 6 and all(f"{n}.bias" in model.state_dict() for n in names)
    assert not any("bias" in n for n in build({"norm": "layer"}).state_dict())
    assert "lm_head.bias" not in model.state_dict()
    assert not any("bias" in n for n in build({"ffn": "moe", "bias": True}).state_dict() if "router" in n)


def test_where_value_embeddings_are() -> None:
    for layers, expected in ((4, {1, 3}), (5, {0, 2, 4}), (1, {0})):
        names = build({"value_embeddings": True, "num_layers": layers}).state_dict()
        assert {int(n.split(".")[1]) for n in names if "value_embeddings" in n} == expected
        assert {int(n.split(".")[1]) for n in names if "value_gate" in n} == expected


def test_starts() -> None:
    """What initialisation promises beside the two families: zeros, ones, small heads, and the identity."""
    model = build(
        {
            "norm": "layer", "bias": True, "value_embeddings": True, "residual_lambdas": True, "head_init": "small",
            "zero_init_projections": True, "d_model": 64, "vocab_size": 900, "ffn": "moe", "num_shared_experts": 1,
        }
    )  # fmt: skip
    zero = {n for n, p in model.named_parameters() if not p.any()}
    for name, p in model.named_parameters():
        ends = name.endswith(("output_proj.weight", "w2.weight", "experts_w2"))
        assert (name in zero) == (ends or "bias" in name or "value_gate" in name or name == "x0_lambdas"), name
        if p.ndim == 1 and name not in zero:
            assert bool((p == 1).all()), name
    assert float(model.lm_head.weight.detach().std()) == pytest.approx(0.001, rel=0.02)
    x = model.token_embeddings(ids(1, 12))
    torch.testing.assert_close(model.features(ids(1, 12)).x_BxTxD, model.ln_final(x))
    assert not build({"head_init": "zero"}).lm_head.weight.any()
    assert build({"ffn": "moe", "init": "gpt2"}).layers[0].ffn.experts_w2.detach().std().item() == pytest.approx(
        0.01, rel=0.05
    )
    experts = build({"ffn": "moe", "d_ff": 48, "d_model": 80}).layers[0].ffn.experts_w1
    assert float(experts.detach().std()) == pytest.approx((2 / 128 * 0.9733) ** 0.5, rel=0.02)


def test_padding_of_the_vocabulary() -> None:
    model = build({"pad_vocab": True})
    assert model.head_weight.shape == (64, 16) and model.token_embeddings.weight.shape == (64, 16)
    assert model(ids(1, 12)).shape == (1, 12, 50)
    assert build({"pad_vocab": True, "vocab_size": 128}).head_weight.shape == (128, 16)


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"norm": "none", "norm_position": "post"}, "norm_position: found post with norm none; expected a norm"),
        ({"norm": "none", "embedding_norm": True}, "embedding_norm: found true with norm none"),
        ({"tie_embeddings": True, "head_init": "zero"}, "head_init: found zero with tie_embeddings; expected default"),
        ({"tie_embeddings": True, "head_init": "small"}, "head_init: found small with tie_embeddings"),
        ({"causal": False, "sliding_window": 4}, "sliding_window: found one without causal attention"),
        ({"sliding_window": 12}, "sliding_window: found 12; expected less than max_seq_len, 12"),
        ({"sliding_window": 20, "max_seq_len": 20}, "sliding_window: found 20; expected less than max_seq_len, 20"),
        ({"position": "learned", "rope_theta": 5e5}, "rope_theta: found 500000 with position learned; expected"),
        ({"position": "none", "rope_theta": 100.0}, "rope_theta: found 100 with position none"),
        ({"ffn_multiple": 0.03}, r"ffn_multiple: found 0\.03 for d_model 16; expected at least 0\.062, since d_ff"),
        (
            {"ffn": "moe", "load_balancing": "none", "load_balancing_weight": 0.1},
            r"load_balancing_weight: found 0\.1 with load_balancing none; expected load_balancing = loss or bias",
        ),
        ({"num_kv_heads": 3}, "num_kv_heads: found 3; expected a divisor of num_heads, 4"),
        ({"num_kv_heads": 8}, "num_kv_heads: found 8; expected a divisor"),
        ({"max_seq_len": 4}, "max_seq_len: found 4; expected at least context_length, 12"),
        ({"ffn": "moe", "num_experts": 2, "expert_top_k": 3}, "expert_top_k: found 3; expected at most num_experts, 2"),
        ({"ffn": "moe", "num_experts": 2}, "load_balancing: found loss where all 2 experts work on every token"),
        ({"dense_twin": True}, "dense_twin: found true with ffn swiglu; expected ffn = moe"),
        ({"num_experts": 4}, "num_experts: found 4 with ffn swiglu; expected ffn = moe"),
        ({"expert_top_k": 1}, "expert_top_k: found 1 with ffn swiglu"),
        ({"num_shared_experts": 1}, "num_shared_experts: found 1 with ffn swiglu"),
        ({"expert_ffn": "gelu"}, "expert_ffn: found gelu with ffn swiglu"),
        ({"router_noise": 0.1}, r"router_noise: found 0\.1 with ffn swiglu"),
        ({"load_balancing": "none"}, "load_balancing: found none with ffn swiglu"),
        ({"load_balancing_weight": 0.1}, r"load_balancing_weight: found 0\.1 with ffn swiglu"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(values: dict[str, object], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        ModelConfig(**SIZES, **values)
    assert accepted({**values, "ffn": "swiglu"} if "ffn" not in values else values) is None


def test_what_makes_sense_is_accepted() -> None:
    def of(**values: object) -> ModelConfig:
        return ModelConfig(**{**SIZES, **values})

    for window in (12, 19):  # it hides something from what a cache makes longer than a training window
        assert of(sliding_window=window, max_seq_len=20).sliding_window == window
    assert of(ffn="moe", num_experts=2, dense_twin=True) == of(d_ff=2 * of().d_ff)
    assert of(ffn_multiple=0.05).d_ff == 1
    assert of(position="learned", rope_theta=10_000.0).position == "learned"
    assert of(ffn="moe", load_balancing="bias", load_balancing_weight=0.1).load_balancing_weight == 0.1


def test_a_window_longer_than_training_ones_hides_the_rest() -> None:
    model = build({"sliding_window": 14, "max_seq_len": 20, "num_layers": 1}).eval()
    plain = build({"max_seq_len": 20, "num_layers": 1}).eval()
    x = ids(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(model(x)[:, :14], plain(x)[:, :14])
        assert not torch.allclose(model(x)[:, 14:], plain(x)[:, 14:], atol=1e-3)


def test_normalised_queries_and_keys_have_the_values_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA autocast gives norms back in float32, which is played here; kernels want one type."""
    types: list[set[torch.dtype]] = []

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float, sight: Sight) -> torch.Tensor:
        types.append({q.dtype, k.dtype, v.dtype})
        return sdpa_attention(q, k, v, dropout, sight)

    norm = F.rms_norm
    monkeypatch.setattr(F, "rms_norm", lambda x, *rest: norm(x.float(), *rest))
    model = TransformerLM(ModelConfig(**SIZES, qk_norm=True), attend=attend)
    with torch.autocast("cpu", torch.bfloat16):
        model(ids(2, 12))
    assert types == [{torch.bfloat16}] * 2


class Trained(nn.Module):
    """What the loop compiles, in small: features, head and loss."""

    def __init__(self, model: TransformerLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
        out = self.model.features(tokens[:, :-1], None, documents)
        logits = F.linear(out.x_BxTxD, self.model.head_weight)
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) + 0.01 * out.balance


@pytest.mark.slow
@pytest.mark.timeout(1200)  # 80 s of one core, which may be shared
def test_one_graph_without_breaks_that_stays() -> None:
    """`fullgraph` refuses whatever depends on the data; other tokens, documents and loads need no second graph."""
    model = build(
        {
            "ffn": "moe", "num_shared_experts": 1, "expert_ffn": "relu2", "num_kv_heads": 2, "qk_norm": True,
            "sliding_window": 5, "value_embeddings": True, "residual_lambdas": True, "logit_softcap": 15.0,
            "embedding_norm": True, "d_ff": 24, "num_layers": 1,
        }
    ).train()  # fmt: skip
    plain = Trained(model)
    compiled = torch.compile(plain, fullgraph=True)
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    for seed in range(3):
        tokens, documents = ids(4, 13, seed=seed), ids(4, 12, seed=seed).sort().values.to(torch.int32) // 17
        results = []
        for f in (plain, compiled):
            model.zero_grad()
            loss = f(tokens, documents)
            loss.backward()
            results.append((loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}))
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    assert graphs["unique_graphs"] == 1
