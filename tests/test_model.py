"""The model: equal to its specification, causal, and exactly as large as it says."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from bytekiln.accounting import parameter_count
from bytekiln.attention import Sight, reference_attention
from bytekiln.config import ModelConfig
from bytekiln.errors import ConfigError
from bytekiln.model import KVCache, RotaryEmbedding, TransformerLM

BASE = {"vocab_size": 50, "d_model": 32, "num_layers": 3, "num_heads": 4, "context_length": 12}
VARIANTS = [
    {},
    {"norm": "layer", "position": "learned", "ffn": "gelu", "tie_embeddings": True, "init": "gpt2"},
    {"norm": "none", "ffn": "silu"},
    {"norm_position": "post", "position": "none"},
    {"max_seq_len": 20, "d_ff": 40, "num_heads": 1, "tie_embeddings": True},
    {"num_kv_heads": 2, "qk_norm": True, "sliding_window": 5, "value_embeddings": True, "logit_softcap": 15.0},
    {
        "norm": "layer",
        "bias": True,
        "ffn": "relu2",
        "residual_lambdas": True,
        "embedding_norm": True,
        "pad_vocab": True,
    },
    {"token_shift": 2, "embedding_norm": True, "tie_embeddings": True, "position": "learned"},
    {"ffn": "moe", "num_experts": 4, "num_shared_experts": 1, "num_kv_heads": 1, "d_ff": 24, "sliding_window": 3},
    {"ffn": "moe", "expert_ffn": "relu2", "expert_top_k": 1, "d_ff": 24, "load_balancing": "bias"},
]


def build(**values: object) -> TransformerLM:
    torch.manual_seed(1)
    return TransformerLM(ModelConfig(**{**BASE, **values})).eval()


def shaken(model: TransformerLM) -> TransformerLM:
    """All weights from N(0, 0.3²), so that nothing is zero or one by its initialisation."""
    torch.manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3)
    return model


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


def reach(model: TransformerLM, documents: torch.Tensor | None = None) -> torch.Tensor:
    """12 × 12: whether changing token t changes any bit of the logits at place p.

    With experts the number of rows in a matrix product depends on the tokens, and with it the last bits of every row;
    there a change counts from 1e-9 of the logits on, in float64.
    """
    before = ids(1, 12)
    experts = model.config.ffn == "moe"
    model = model.double() if experts else model
    whole = model(before, None, documents)
    least = 1e-9 * float(whole.abs().max()) if experts else 0.0
    rows = []
    for t in range(12):
        after = before.clone()
        after[0, t] = (after[0, t] + 1) % 50
        rows.append(((model(after, None, documents) - whole).abs() > least)[0].any(dim=-1))
    return torch.stack(rows)


def leaks_nothing(model: TransformerLM) -> bool:
    """Change token t: logits before t keep every bit, those that see t, also through other places, change."""
    place = torch.arange(12)
    behind = place - place[:, None]
    window, depth = model.config.sliding_window, model.config.num_layers
    return torch.equal(reach(model), (behind >= 0) & (behind <= (window - 1 if window else 12) * depth))


@pytest.mark.parametrize("values", VARIANTS)
def test_causal(values: dict[str, object]) -> None:
    model = shaken(build(**values))
    with torch.no_grad():
        assert leaks_nothing(model)


@pytest.mark.parametrize("values", [{}, {"norm": "layer", "position": "learned"}, {"num_kv_heads": 1, "ffn": "moe"}])
def test_bidirectional_sees_both_sides(values: dict[str, object]) -> None:
    with torch.no_grad():
        assert reach(shaken(build(causal=False, **values))).all()


@pytest.mark.parametrize("values", [*VARIANTS, {"causal": False}, {"causal": False, "ffn": "moe"}])
def test_documents_do_not_leak(values: dict[str, object]) -> None:
    documents = torch.tensor([[0] * 3 + [1] * 5 + [0] * 4], dtype=torch.int32)  # the first number comes back
    model = shaken(build(**values, num_layers=1))
    together = documents[0] == documents[0][:, None]
    with torch.no_grad():
        assert torch.equal(reach(model, documents), reach(model) & together)


@pytest.mark.parametrize("position", ["rope", "none"])
def test_a_document_has_the_logits_it_has_alone(position: str) -> None:
    """With positions that are relative, so that it does not matter where in the window it stands."""
    model = build(position=position).double()
    documents = torch.tensor([[4] * 5 + [9] * 7], dtype=torch.int32)
    with torch.no_grad():
        packed, alone = model(ids(1, 12), None, documents), model(ids(1, 12)[:, 5:])
    torch.testing.assert_close(packed[:, 5:], alone, rtol=1e-5, atol=1e-5)


def test_the_causality_check_sees_a_leak() -> None:
    def all_ones(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float, sight: Sight) -> torch.Tensor:
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


def test_cache_one_token_at_a_time_with_documents() -> None:
    model = shaken(build(sliding_window=4, num_kv_heads=2, value_embeddings=True, token_shift=3))
    tokens, cache = ids(2, 12), KVCache(3)
    documents = torch.tensor([[0] * 7 + [1] * 5, [0] * 2 + [1] * 10], dtype=torch.int32)
    with torch.no_grad():
        parts = [model(tokens[:, t : t + 1], cache, documents[:, t : t + 1]) for t in range(12)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens, None, documents), rtol=1e-5, atol=1e-5)


def test_a_token_shift_begins_as_nothing_and_looks_back_only() -> None:
    plain, shifted = build(), build(token_shift=2)
    shifted.load_state_dict(plain.state_dict(), strict=False)
    tokens = ids(2, 12)
    assert torch.equal(shifted.shift_lambdas, torch.zeros(2, 32))
    assert torch.equal(plain(tokens), shifted(tokens))
    shaken(shifted)
    other = tokens.clone()
    other[:, 7] = (other[:, 7] + 1) % 50
    with torch.no_grad():
        assert torch.equal(shifted(tokens)[:, :7], shifted(other)[:, :7])
        # One layer of nothing but feed-forwards: what token 7 is reaches positions 7, 8 and 9.
        bare = shaken(build(token_shift=2, num_layers=1, zero_init_projections=True))
        bare.layers[0].attn.output_proj.weight.zero_()
        changed = (bare(tokens) != bare(other)).any(-1).any(0)
    assert changed.tolist() == [7 <= t <= 9 for t in range(12)]


@pytest.mark.parametrize("precision", ["fp32", "products"])
def test_the_residual_stream_has_the_type_that_was_asked_for(precision: str) -> None:
    """bf16 products over fp32 weights either way; the stream is fp32, or bf16 from the embedding on."""
    model = shaken(build(residual_precision=precision, residual_lambdas=True, token_shift=2, embedding_norm=True,
                         value_embeddings=True, qk_norm=True))  # fmt: skip
    seen: list[torch.dtype] = []
    for layer in model.layers:
        layer.register_forward_hook(lambda _m, _a, out: seen.append(out.dtype))
    exact = model(ids(2, 12)).detach()
    assert set(seen) == {torch.float32}
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        low = model(ids(2, 12))
        low.float().square().sum().backward()
    assert set(seen) == {torch.bfloat16 if precision == "products" else torch.float32}
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float32}
    assert float((low.detach().float() - exact).norm() / exact.norm()) < 0.05


def test_features_are_all_but_the_head() -> None:
    for values in ({}, {"tie_embeddings": True, "logit_softcap": 2.0, "pad_vocab": True}):
        model = shaken(build(**values))
        x, balance, load = model.features(ids(2, 12))
        assert model.head_weight.shape == (model.config.padded_vocab_size, 32)
        logits = (x @ model.head_weight.T)[..., :50]
        expected = 2 * torch.tanh(logits / 2) if values else logits
        torch.testing.assert_close(model(ids(2, 12)), expected)
        assert (balance.shape, balance.dtype, float(balance)) == ((), torch.float32, 0.0)
        assert load.shape == (0, 0)


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


def test_dropout_works_in_training_only() -> None:
    model = build(dropout=0.5)
    x = ids(1, 12)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def plain_forward(
    w: dict[str, torch.Tensor], c: ModelConfig, tokens: torch.Tensor, documents: torch.Tensor | None = None
) -> torch.Tensor:
    """The whole model from its formulas: tensors by name, nothing of model.py or attention.py."""

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros(()))

    def rms(x: torch.Tensor) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + c.norm_eps).sqrt()

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        if c.norm == "none":
            return x
        x = x - x.mean(-1, keepdim=True) if c.norm == "layer" else x
        return rms(x) * w[f"{name}.weight"] + w.get(f"{name}.bias", torch.zeros(()))

    def turned(x: torch.Tensor) -> torch.Tensor:  # pairs as complex numbers, multiplied by e^(i t θ^(-2j/K))
        T, K = x.shape[-2:]
        angle = torch.arange(T)[:, None].double() * c.rope_theta ** (-torch.arange(0, K, 2).double() / K)
        z = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.exp(1j * angle)
        return torch.view_as_real(z).flatten(-2)

    def visible(b: int, t: int, s: int) -> bool:
        past = c.causal is False or (s <= t and (not c.sliding_window or t - s < c.sliding_window))
        return past and (documents is None or bool(documents[b, t] == documents[b, s]))

    def attention(x: torch.Tensor, name: str) -> torch.Tensor:
        B, T, D = x.shape
        K = D // c.num_heads
        q, k, v = (linear(x, f"{name}.{p}_proj").view(B, T, -1, K).transpose(1, 2) for p in "qkv")
        if f"{name}.value_gate.weight" in w:
            open_ = 2 / (1 + (-linear(x[..., :32], f"{name}.value_gate")).exp())
            v = v + open_.transpose(1, 2)[..., None] * w[f"{name}.value_embeddings.weight"][tokens].view(
                B, T, -1, K
            ).transpose(1, 2)
        q, k = (turned(q), turned(k)) if c.position == "rope" else (q, k)
        q, k = (rms(q), rms(k)) if c.qk_norm else (q, k)
        k, v = (torch.stack([h[:, i * c.num_kv_heads // c.num_heads] for i in range(c.num_heads)], 1) for h in (k, v))
        scores = q @ k.transpose(-1, -2) / K**0.5
        seen = torch.tensor([[[visible(b, t, s) for s in range(T)] for t in range(T)] for b in range(B)])
        e = scores.exp() * seen[:, None]
        mixed = (e / e.sum(-1, keepdim=True)) @ v
        return linear(mixed.transpose(1, 2).reshape(B, T, D), f"{name}.output_proj")

    def activated(h: torch.Tensor, kind: str) -> torch.Tensor:
        if kind == "gelu":
            return h * (1 + torch.erf(h / 2**0.5)) / 2
        if kind == "gelu_tanh":
            return h * (1 + torch.tanh((2 / math.pi) ** 0.5 * (h + 0.044715 * h**3))) / 2
        return h.clamp(min=0) ** 2 if kind == "relu2" else h / (1 + torch.exp(-h))

    def feed_forward(x: torch.Tensor, name: str, kind: str = "") -> torch.Tensor:
        if c.ffn == "moe" and not kind:
            return experts(x, name)
        h = activated(linear(x, f"{name}.w1"), kind or c.ffn)
        return linear(h * linear(x, f"{name}.w3") if (kind or c.ffn) == "swiglu" else h, f"{name}.w2")

    def experts(x: torch.Tensor, name: str) -> torch.Tensor:
        out = torch.zeros_like(x)
        for b, t in itertools.product(*map(range, x.shape[:2])):
            p = (w[f"{name}.router.weight"] @ x[b, t]).exp()
            p = p / p.sum()
            score = p + w.get(f"{name}.router_bias", torch.zeros(()))
            chosen = sorted(range(c.num_experts), key=lambda e: -float(score[e]))[: c.expert_top_k]
            whole = sum(p[e] for e in chosen) if c.expert_top_k > 1 else 1.0
            for e in chosen:
                h = activated(w[f"{name}.experts_w1"][e] @ x[b, t], c.expert_ffn)
                h = h * (w[f"{name}.experts_w3"][e] @ x[b, t]) if c.expert_ffn == "swiglu" else h
                out[b, t] += p[e] / whole * (w[f"{name}.experts_w2"][e] @ h)
        return out + feed_forward(x, f"{name}.shared", c.expert_ffn) if c.num_shared_experts else out

    x = w["token_embeddings.weight"][tokens]
    if c.token_shift:
        alone, x = x, x.clone()
        for b, t, j in itertools.product(*map(range, tokens.shape), range(1, c.token_shift + 1)):
            if t >= j and (documents is None or documents[b, t - j] == documents[b, t]):
                x[b, t] += w["shift_lambdas"][j - 1] * alone[b, t - j]
    if c.embedding_norm:
        x = norm(x, "ln_embedding")
    if c.position == "learned":
        x = x + w["position_embeddings.weight"][: tokens.shape[1]]
    x0 = x
    for i in range(c.num_layers):
        if c.residual_lambdas:
            x = w["residual_lambdas"][i] * x + w["x0_lambdas"][i] * x0
        for part, n in ((attention, f"layers.{i}.attn"), (feed_forward, f"layers.{i}.ffn")):
            ln = f"layers.{i}.ln{1 if part is attention else 2}"
            x = x + part(norm(x, ln), n) if c.norm_position == "pre" else norm(x + part(x, n), ln)
    x = norm(x, "ln_final")
    logits = x @ w["token_embeddings.weight" if c.tie_embeddings else "lm_head.weight"][: c.vocab_size].T
    return c.logit_softcap * torch.tanh(logits / c.logit_softcap) if c.logit_softcap else logits


def equals_its_formulas(model: TransformerLM, documents: torch.Tensor | None = None) -> None:
    """On random weights; embeddings so small that mean squares come near the epsilon of the norms."""
    model = model.double().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(0, 0.3 if p.ndim >= 2 else 1.0)
            if "embeddings" in name and "value" not in name:
                p.mul_(0.02)
        for name, b in model.named_buffers():
            if name.endswith("router_bias"):
                b.normal_(0, 0.1)
        expected = plain_forward(model.state_dict(), model.config, ids(2, 12), documents)
        torch.testing.assert_close(
            model(ids(2, 12), None, documents),
            expected,
            rtol=1e-4,
            atol=1e-6 * float(expected.abs().max()),
            msg=lambda told: f"{model.config}\n{told}",
        )


NORMS = [("rms", "pre"), ("layer", "pre"), ("none", "pre"), ("rms", "post"), ("layer", "post")]


@pytest.mark.parametrize(("norm", "norm_position"), NORMS)
def test_equals_its_formulas_in_every_variant(norm: str, norm_position: str) -> None:
    """All combinations of the oldest choices; pairs of all choices are in `test_model_choices.py`."""
    for position, ffn, tied in itertools.product(
        ("rope", "learned", "none"), ("swiglu", "silu", "gelu", "gelu_tanh", "relu2"), (False, True)
    ):
        equals_its_formulas(
            build(
                norm=norm, norm_position=norm_position, position=position, ffn=ffn, tie_embeddings=tied,
                rope_theta=100.0 if position == "rope" else 10_000.0, num_layers=2,
            )
        )  # fmt: skip


def halved_at_random(after: torch.Tensor, before: torch.Tensor) -> bool:
    """Every element is dropped or doubled, and there are many of both kinds."""
    dropped, kept = after == 0, torch.isclose(after, 2 * before, rtol=1e-4, atol=1e-6)
    share = float(dropped.double().mean())
    return bool((dropped | kept).all()) and 0.3 < share < 0.7


@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_dropout_at_embeddings_and_both_residuals(norm_position: str) -> None:
    model = build(dropout=0.5, norm_position=norm_position, num_layers=1).train()
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    block = model.layers[0]
    block.ln1 = block.ln2 = torch.nn.Identity()  # so that sums show what was added
    for name, part in (("block", block), ("attn", block.attn), ("ffn", block.ffn)):
        part.register_forward_hook(lambda _, taken, given, name=name: seen.update({name: (taken[0], given)}))
    model(ids(4, 12))
    embedded, out = seen["block"]
    assert halved_at_random(embedded, model.token_embeddings(ids(4, 12)))
    after_attention = seen["ffn"][0]
    assert halved_at_random(after_attention - embedded, seen["attn"][1])
    assert halved_at_random(out - after_attention, seen["ffn"][1])


@pytest.mark.parametrize(("attention", "rate"), [(True, 0.25), (False, 0.0)])
def test_attention_is_told_its_dropout_in_training_only(attention: bool, rate: float) -> None:
    told: list[float] = []

    def listen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float, sight: Sight) -> torch.Tensor:
        told.append(dropout)
        return v

    model = TransformerLM(build(dropout=0.25, attention_dropout=attention).config, attend=listen)
    model.train()(ids(1, 12))
    model.eval()(ids(1, 12))
    assert told == [rate] * 3 + [0.0] * 3


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
