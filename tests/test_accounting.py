"""Parameters and operations, counted from a config, held to the model as it is built and as it runs."""

from __future__ import annotations

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from bytekiln import accounting, model
from bytekiln.accounting import (
    active_parameter_count,
    flops_per_token,
    forward_flops_by_part,
    parameter_count,
    parameters_by_part,
)
from bytekiln.attention import reference_attention
from bytekiln.errors import ConfigError
from bytekiln.model import TransformerLM
from bytekiln.model_config import ModelConfig

XL = ModelConfig(vocab_size=50_257, context_length=1024, d_model=1600, num_layers=48, num_heads=25, d_ff=4288)
"""GPT-2 XL's shape with SwiGLU: the course's exercise."""


class Hollow(TransformerLM):
    """Parameters without contents: built on the meta device, where nothing can be drawn."""

    def initialise(self) -> None:
        pass


def built(config: ModelConfig) -> Hollow:
    with torch.device("meta"):
        return Hollow(config)


@st.composite
def shapes(draw: st.DrawFn) -> ModelConfig:
    heads = draw(st.sampled_from([2, 4, 6]))
    ffn = draw(st.sampled_from(["swiglu", "silu", "gelu", "relu2", "moe", "moe"]))
    experts: dict[str, object] = {}
    if ffn == "moe":
        number = draw(st.integers(2, 5))
        experts = {
            "num_experts": number,
            "expert_top_k": draw(st.integers(1, number - 1)),
            "num_shared_experts": draw(st.integers(0, 2)),
            "expert_ffn": draw(st.sampled_from(["swiglu", "silu", "gelu", "relu2"])),
            "load_balancing": draw(st.sampled_from(["loss", "bias", "none"])),
            "dense_twin": draw(st.booleans()),
        }
    values = {
        "vocab_size": draw(st.integers(3, 200)),
        "context_length": draw(st.integers(1, 9)),
        "max_seq_len": draw(st.sampled_from([0, 16])),
        "d_model": heads * draw(st.sampled_from([2, 4, 8])),
        "num_layers": draw(st.integers(1, 3)),
        "num_heads": heads,
        "num_kv_heads": draw(st.sampled_from([0, 1, 2])),
        "d_ff": draw(st.sampled_from([0, 5, 16])),
        "norm": draw(st.sampled_from(["rms", "layer", "none"])),
        "norm_position": draw(st.sampled_from(["pre", "post"])),
        "position": draw(st.sampled_from(["rope", "learned", "none"])),
        "ffn": ffn,
        "qk_norm": draw(st.booleans()),
        "tie_embeddings": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "embedding_norm": draw(st.booleans()),
        "token_shift": draw(st.sampled_from([0, 0, 2])),
        "value_embeddings": draw(st.booleans()),
        "residual_lambdas": draw(st.booleans()),
        "pad_vocab": draw(st.booleans()),
        **experts,
    }
    try:
        return ModelConfig(**values)
    except ConfigError:
        assume(False)
        raise


@given(shapes())
@settings(max_examples=80)
def test_parameters_are_those_of_the_model_as_built(config: ModelConfig) -> None:
    parameters = dict(built(config).named_parameters())
    assert parameter_count(config) == sum(p.numel() for p in parameters.values())

    found: dict[str, int] = {}
    for name, p in parameters.items():
        part = next(part for start, part in PARTS if start in name)
        found[part] = found.get(part, 0) + p.numel()
    assert parameters_by_part(config) == found

    idle = sum(p.numel() for name, p in parameters.items() if ".ffn.experts_" in name)
    idle = idle * (config.num_experts - config.expert_top_k) // config.num_experts
    assert active_parameter_count(config) == parameter_count(config) - idle


PARTS = [
    ("token_embeddings", "embedding"),
    ("position_embeddings", "positions"),
    (".value_", "value_embeddings"),
    (".attn.", "attention"),
    (".router", "router"),
    (".shared.", "shared_experts"),
    (".ffn.", "feed_forward"),
    ("shift_lambdas", "token_shift"),
    ("lambdas", "residual_lambdas"),
    ("lm_head", "head"),
    ("ln", "norms"),
]
"""A piece of a parameter's name, and the part that it belongs to; the first that fits."""


@given(shapes())
@settings(max_examples=30)
def test_operations_are_those_that_torch_counts(config: ModelConfig) -> None:
    lm = TransformerLM(config, attend=reference_attention)
    ids_BxT = torch.zeros(2, config.context_length, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        lm(ids_BxT)
    assert sum(forward_flops_by_part(config).values()) * ids_BxT.numel() == counter.get_total_flops()


def test_training_costs_three_forwards_as_torch_counts_it() -> None:
    config = ModelConfig(vocab_size=64, context_length=8, d_model=16, num_layers=2, num_heads=2, value_embeddings=True)
    lm = TransformerLM(config, attend=reference_attention)
    ids_BxT = torch.zeros(1, 8, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        lm(ids_BxT).sum().backward()
    assert flops_per_token(config) * 8 == counter.get_total_flops()


def test_the_courses_figures_for_gpt2_xl() -> None:
    parts = {part: flops * 1024 for part, flops in forward_flops_by_part(XL).items()}
    total = sum(parts.values())
    assert round(total / 1e12, 3) == 3.517
    shares = {part: round(100 * flops / total, 1) for part, flops in parts.items()}
    assert shares == {"attention_projections": 28.6, "attention_scores": 9.2, "feed_forward": 57.5, "head": 4.7}


def test_known_parameter_counts() -> None:
    base = ModelConfig(vocab_size=10_000, context_length=256, d_model=512, num_layers=4, num_heads=16, d_ff=1344)
    assert parameter_count(base) == 22_696_448
    assert parameter_count(base.model_copy(update={"vocab_size": 32_000})) == 45_224_448
    gpt2 = ModelConfig(
        vocab_size=50_257, context_length=1024, d_model=768, num_layers=12, num_heads=12, norm="layer", bias=True,
        position="learned", ffn="gelu", tie_embeddings=True,
    )  # fmt: skip
    assert parameter_count(gpt2) == 124_439_808  # as Hugging Face counts GPT-2 small


def test_a_window_costs_what_it_shows() -> None:
    full = forward_flops_by_part(XL)
    narrow = forward_flops_by_part(XL.model_copy(update={"sliding_window": 256}))
    assert narrow["attention_scores"] * 4 == full["attention_scores"]
    assert {**narrow, "attention_scores": 0} == {**full, "attention_scores": 0}
    assert forward_flops_by_part(XL, context=512)["attention_scores"] * 2 == full["attention_scores"]


def test_a_dense_twin_does_the_same_work_on_a_token() -> None:
    values = {"vocab_size": 64, "d_model": 32, "num_layers": 2, "num_heads": 2, "ffn": "moe", "num_shared_experts": 1}
    moe, twin = ModelConfig(**values), ModelConfig(**values, dense_twin=True)
    work = forward_flops_by_part(moe)
    router = work.pop("router")
    assert sum(work.values()) == sum(forward_flops_by_part(twin).values())
    assert router == 2 * 2 * 8 * 32


def test_the_gate_is_as_wide_as_the_models() -> None:
    assert accounting.GATE_WIDTH == model.GATE_WIDTH
