"""The model: equal to its specification, causal, and exactly as large as it says."""

from __future__ import annotations

import math

import pytest
import torch

from bytekiln.config import ModelConfig
from bytekiln.errors import ConfigError
from bytekiln.model import (
    KVCache,
    RotaryEmbedding,
    TransformerLM,
    parameter_count,
    reference_attention,
    sdpa_attention,
)

BASE = {"vocab_size": 50, "d_model": 32, "num_layers": 3, "num_heads": 4, "context_length": 12}
VARIANTS = [
    {},
    {"norm": "layer", "position": "learned", "ffn": "gelu", "tie_embeddings": True, "init": "gpt2"},
    {"norm": "none", "ffn": "silu"},
    {"norm_position": "post", "position": "none"},
    {"max_seq_len": 20, "d_ff": 40, "num_heads": 1, "tie_embeddings": True},
]


def build(**values: object) -> TransformerLM:
    torch.manual_seed(1)
    return TransformerLM(ModelConfig(**{**BASE, **values})).eval()


def ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("values", VARIANTS)
def test_parameter_count_is_exact(values: dict[str, object]) -> None:
    model = build(**values)
    assert parameter_count(model.config) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("vocab", "expected"), [(10_000, 22_696_448), (32_000, 45_224_448)])
def test_published_sizes(vocab: int, expected: int) -> None:
    c = ModelConfig(vocab_size=vocab, d_model=512, num_layers=4, num_heads=16, d_ff=1344, context_length=256)
    with torch.device("meta"):
        assert sum(p.numel() for p in TransformerLM(c).parameters()) == expected == parameter_count(c)


def test_swiglu_width_of_the_course() -> None:
    assert ModelConfig(d_model=512, num_heads=8).d_ff == 1344
    assert ModelConfig(d_model=768, ffn="silu").d_ff == 3072


def test_names_are_the_courses() -> None:
    layer = [f"attn.{p}_proj" for p in ("q", "k", "v", "output")] + ["ffn.w1", "ffn.w2", "ffn.w3", "ln1", "ln2"]
    expected = {"token_embeddings.weight", "ln_final.weight", "lm_head.weight"} | {
        f"layers.{i}.{part}.weight" for i in range(3) for part in layer
    }
    assert set(build().state_dict()) == expected


@pytest.mark.parametrize("values", VARIANTS)
def test_equals_the_reference_attention(values: dict[str, object]) -> None:
    fast = build(**values)
    slow = TransformerLM(fast.config, attend=reference_attention).eval()
    slow.load_state_dict(fast.state_dict())
    torch.testing.assert_close(fast(ids(2, 12)), slow(ids(2, 12)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 9), (5, 9), (9, 9)])
def test_attention_kernels_agree_and_so_do_their_gradients(T: int, S: int) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, n, 4, dtype=torch.float64, requires_grad=True) for n in (T, S, S)]
    outputs = [f(*inputs, 0.0) for f in (sdpa_attention, reference_attention)]
    torch.testing.assert_close(*outputs)
    gradients = [torch.autograd.grad(out.square().sum(), inputs) for out in outputs]
    torch.testing.assert_close(*gradients)


def leaks_nothing(model: TransformerLM) -> bool:
    """Change token t: logits before t keep every bit, those at t and behind it change."""
    before = ids(1, 12)
    whole = model(before)
    for t in range(12):
        after = before.clone()
        after[0, t] = (after[0, t] + 1) % 50
        changed = (model(after) != whole)[0].any(dim=-1)
        if changed[:t].any() or not changed[t:].all():
            return False
    return True


@pytest.mark.parametrize("values", VARIANTS)
def test_causal(values: dict[str, object]) -> None:
    torch.manual_seed(2)
    model = build(**values)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3)
        assert leaks_nothing(model)


def test_the_causality_check_sees_a_leak() -> None:
    def all_ones(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, torch.ones(q.shape[-2], k.shape[-2]) > 0)

    with torch.no_grad():
        assert not leaks_nothing(TransformerLM(build().config, attend=all_ones).eval())


def test_rope_depends_on_distance_only() -> None:
    rope = RotaryEmbedding(8, 64, 10_000.0)
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8).unbind(0)
    products = [float((rope(q, start=a) * rope(k, start=a + 5)).sum()) for a in (0, 1, 17, 50)]
    assert max(products) - min(products) < 1e-5
    assert abs(products[0] - float((rope(q, start=0) * rope(k, start=6)).sum())) > 1e-3
    torch.testing.assert_close(rope(q, start=40).norm(), q.norm())


def test_rope_turns_interleaved_pairs() -> None:
    turned = RotaryEmbedding(4, 8, 100.0)(torch.tensor([[[[1.0, 0.0, 1.0, 0.0]]]]), start=3)[0, 0, 0]
    expected = [math.cos(3), math.sin(3), math.cos(3 * 100**-0.5), math.sin(3 * 100**-0.5)]
    torch.testing.assert_close(turned, torch.tensor(expected))


@pytest.mark.parametrize("values", VARIANTS)
def test_cache_gives_the_logits_of_the_whole(values: dict[str, object]) -> None:
    model = build(**values)
    tokens, cache = ids(2, 12), KVCache(3)
    with torch.no_grad():
        parts = [model(tokens[:, a:b], cache) for a, b in ((0, 5), (5, 6), (6, 9), (9, 12))]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), rtol=1e-5, atol=1e-5)
    assert len(cache) == 12


def test_initialisation_of_the_course() -> None:
    torch.manual_seed(0)
    model = TransformerLM(ModelConfig(**{**BASE, "vocab_size": 4000, "d_model": 128}))
    w1, emb = model.layers[0].ffn.w1.weight, model.token_embeddings.weight
    sigma = math.sqrt(2 / sum(w1.shape))
    cut = math.sqrt(0.9733)
    assert float(w1.detach().abs().max()) <= 3 * sigma
    assert float(w1.detach().std()) == pytest.approx(sigma * cut, rel=0.02)
    assert float(emb.detach().abs().max()) <= 3
    assert float(emb.detach().std()) == pytest.approx(cut, rel=0.02)
    assert model.ln_final.weight.eq(1).all()


def test_initialisation_of_gpt2() -> None:
    torch.manual_seed(0)
    model = TransformerLM(ModelConfig(**{**BASE, "d_model": 128, "init": "gpt2", "ffn": "gelu"}))
    assert float(model.layers[1].ffn.w1.weight.detach().std()) == pytest.approx(0.02, rel=0.03)
    for w in (model.layers[1].ffn.w2.weight, model.layers[0].attn.output_proj.weight):
        assert float(w.detach().std()) == pytest.approx(0.02 / math.sqrt(6), rel=0.03)


@pytest.mark.parametrize(
    "values",
    [
        {"norm": "none"},
        {"norm": "layer"},
        {"norm_position": "post"},
        {"position": "none"},
        {"position": "learned"},
        {"ffn": "silu"},
        {"ffn": "gelu"},
        {"tie_embeddings": True},
        {"rope_theta": 100.0},
    ],
)
def test_every_choice_changes_the_logits_on_the_same_weights(values: dict[str, object]) -> None:
    base, other = build(d_ff=48), build(d_ff=48, **values)
    shared = {k: v for k, v in base.state_dict().items() if k in other.state_dict()}
    other.load_state_dict(shared, strict=False)
    assert not torch.allclose(base(ids(1, 12)), other(ids(1, 12)), atol=1e-4)


def test_dropout_works_in_training_only() -> None:
    model = build(dropout=0.5)
    x = ids(1, 12)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="vocab_size: found 0"):
        TransformerLM(ModelConfig())
    with pytest.raises(ConfigError, match="found a sequence of 13 tokens; expected at most 12"):
        build()(ids(1, 13))
    with pytest.raises(ConfigError, match=r"found 6 for d_model 512.*4, 8, 16"):
        ModelConfig(d_model=512, num_heads=6)
    with pytest.raises(ConfigError, match="even width a head"):
        ModelConfig(d_model=12, num_heads=4)
    with pytest.raises(ConfigError, match="max_seq_len: found 4; expected at least context_length, 8"):
        ModelConfig(max_seq_len=4, context_length=8)
