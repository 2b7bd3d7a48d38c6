"""The model: equal to its specification, causal, and exactly as large as it says."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from bytekiln.config import ModelConfig
from bytekiln.errors import ConfigError
from bytekiln.model import (
    Attend,
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


def plain_forward(w: dict[str, torch.Tensor], c: ModelConfig, tokens: torch.Tensor) -> torch.Tensor:
    """The whole model from its formulas: tensors by name, nothing of model.py."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        if c.norm == "none":
            return x
        x = x - x.mean(-1, keepdim=True) if c.norm == "layer" else x
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"]

    def turned(x: torch.Tensor) -> torch.Tensor:  # pairs as complex numbers, multiplied by e^(i t θ^(-2j/K))
        T, K = x.shape[-2:]
        angle = torch.arange(T)[:, None].double() * c.rope_theta ** (-torch.arange(0, K, 2).double() / K)
        z = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.exp(1j * angle)
        return torch.view_as_real(z).flatten(-2)

    def attention(x: torch.Tensor, name: str) -> torch.Tensor:
        B, T, D = x.shape
        heads = [(x @ w[f"{name}.{p}_proj.weight"].T).view(B, T, c.num_heads, -1).transpose(1, 2) for p in "qkv"]
        q, k = (turned(h) for h in heads[:2]) if c.position == "rope" else heads[:2]
        scores = q @ k.transpose(-1, -2) / (D / c.num_heads) ** 0.5
        e = scores.exp() * torch.ones(T, T).tril()
        mixed = (e / e.sum(-1, keepdim=True)) @ heads[2]
        return mixed.transpose(1, 2).reshape(B, T, D) @ w[f"{name}.output_proj.weight"].T

    def feed_forward(x: torch.Tensor, name: str) -> torch.Tensor:
        h = x @ w[f"{name}.w1.weight"].T
        h = h * (1 + torch.erf(h / 2**0.5)) / 2 if c.ffn == "gelu" else h / (1 + torch.exp(-h))
        return (h * (x @ w[f"{name}.w3.weight"].T) if c.ffn == "swiglu" else h) @ w[f"{name}.w2.weight"].T

    x = w["token_embeddings.weight"][tokens]
    if c.position == "learned":
        x = x + w["position_embeddings.weight"][: tokens.shape[1]]
    for i in range(c.num_layers):
        for part, n in ((attention, f"layers.{i}.attn"), (feed_forward, f"layers.{i}.ffn")):
            ln = f"layers.{i}.ln{1 if part is attention else 2}"
            x = x + part(norm(x, ln), n) if c.norm_position == "pre" else norm(x + part(x, n), ln)
    return norm(x, "ln_final") @ w["token_embeddings.weight" if c.tie_embeddings else "lm_head.weight"].T


CHOICES = {
    "norm": ("rms", "layer", "none"),
    "norm_position": ("pre", "post"),
    "position": ("rope", "learned", "none"),
    "ffn": ("swiglu", "silu", "gelu"),
    "tie_embeddings": (False, True),
}


@pytest.mark.parametrize(("norm", "norm_position"), list(itertools.product(*list(CHOICES.values())[:2])))
def test_equals_its_formulas_in_every_variant(norm: str, norm_position: str) -> None:
    for choice in itertools.product(*list(CHOICES.values())[2:]):
        values = dict(zip(list(CHOICES)[2:], choice, strict=True))
        model = build(norm=norm, norm_position=norm_position, rope_theta=100.0, num_layers=2, **values).double()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.normal_(0, 0.3 if p.ndim == 2 else 1.0)
                if "embeddings" in name:
                    p.mul_(0.02)  # mean squares near the epsilon of the norms, so that it is seen
            expected = plain_forward(model.state_dict(), model.config, ids(2, 12))
            torch.testing.assert_close(
                model(ids(2, 12)), expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()), msg=str(values)
            )


def halved_at_random(after: torch.Tensor, before: torch.Tensor) -> bool:
    """Every element is dropped or doubled, and there are many of both kinds."""
    dropped, kept = after == 0, torch.isclose(after, 2 * before, rtol=1e-4, atol=1e-6)
    share = float(dropped.double().mean())
    return bool((dropped | kept).all()) and 0.3 < share < 0.7


@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_dropout_at_embeddings_and_both_residuals(norm_position: str) -> None:
    model = build(dropout=0.5, norm="none", norm_position=norm_position, num_layers=1).train()
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    block = model.layers[0]
    for name, part in (("block", block), ("attn", block.attn), ("ffn", block.ffn)):
        part.register_forward_hook(lambda _, taken, given, name=name: seen.update({name: (taken[0], given)}))
    model(ids(4, 12))
    embedded, out = seen["block"]
    assert halved_at_random(embedded, model.token_embeddings(ids(4, 12)))
    after_attention = seen["ffn"][0]
    assert halved_at_random(after_attention - embedded, seen["attn"][1])
    assert halved_at_random(out - after_attention, seen["ffn"][1])


def test_attention_is_told_its_dropout_in_training_only() -> None:
    told: list[float] = []

    def listen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float) -> torch.Tensor:
        told.append(dropout)
        return v

    model = TransformerLM(build(dropout=0.25).config, attend=listen)
    model.train()(ids(1, 12))
    model.eval()(ids(1, 12))
    assert told == [0.25] * 3 + [0.0] * 3


@pytest.mark.parametrize("attend", [sdpa_attention, reference_attention])
@pytest.mark.parametrize("T", [1, 16, 32])
def test_attention_drops_its_weights(attend: Attend, T: int) -> None:
    """Queries of zero weigh every visible key alike; values that are the unit matrix show the weights."""
    torch.manual_seed(0)
    q, k = torch.zeros(8, 4, T, 32), torch.zeros(8, 4, 32, 32)
    v = torch.eye(32).expand(8, 4, 32, 32)
    visible = torch.ones(T, 32).tril(32 - T) > 0
    dropped, whole = attend(q, k, v, 0.5), attend(q, k, v, 0.0)
    assert halved_at_random(dropped[..., visible], whole[..., visible])
    torch.testing.assert_close(whole.sum(-1), torch.ones(8, 4, T))


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
