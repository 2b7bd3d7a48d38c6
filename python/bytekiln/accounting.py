"""Parameters and floating-point operations of a model, exactly, by part, from its config alone.

In: a `ModelConfig`. Out: whole numbers. Called by `train`, `prepare`, `plan` and `report`; imports no torch.
`tests/test_accounting.py` holds the parameters to the model as it is built, and the operations to those that torch
counts while it runs.

Conventions of the operations, those of CS336 and of Kaplan et al. 2020:

- Matrix products only: m×k by k×n costs 2·m·k·n. Norms, activations, softmax, rotary angles, additions of biases and
  look-ups of embeddings are left out: they are below 1 % at any width that is worth planning for.
- Forward. Training costs three times as much: the backward makes two products, one for the gradient of the input and
  one for that of the weight, where the forward makes one.
- Causal attention counts every key of the window, the masked half too, as the course and most published utilisations
  do (PaLM, appendix B). A kernel that skips the masked half does less than is counted here. With a sliding window
  of w a query counts w keys.
- Of a mixture of experts the experts count that work on a token.
"""

from __future__ import annotations

from bytekiln.model_config import ModelConfig

GATE_WIDTH = 32
"""Features of the residual stream that the gate of the value embeddings reads."""
TRAINING_OVER_FORWARD = 3
"""Cost of forward and backward over that of the forward."""


def parameter_count(config: ModelConfig) -> int:
    """Parameters of the model, without building it.

    >>> parameter_count(ModelConfig(vocab_size=10_000, d_model=512, num_layers=4, num_heads=16, d_ff=1344))
    22696448
    """
    return sum(parameters_by_part(config).values())


def active_parameter_count(config: ModelConfig) -> int:
    """Parameters that a token meets on its way: all but those of the experts that it is not sent to.

    >>> moe = ModelConfig(vocab_size=64, d_model=8, num_layers=1, num_heads=1, d_ff=16, ffn="moe", num_experts=4)
    >>> parameter_count(moe) - active_parameter_count(moe) == (4 - 2) * 3 * 8 * 16
    True
    """
    idle = config.num_experts - config.expert_top_k if config.ffn == "moe" else 0
    return parameter_count(config) - config.num_layers * idle * _expert(config)


def parameters_by_part(config: ModelConfig) -> dict[str, int]:
    """Parameters of each part of the model; parts that it does not have are left out.

    Their sum is `parameter_count`. `embedding` is also the head where the two are tied.
    """
    D, Vp, F, L = config.d_model, config.padded_vocab_size, config.d_ff, config.num_layers
    bias = int(config.bias)
    projections = 2 * D * (D + config.kv_width) + bias * 2 * (D + config.kv_width)
    norm = {"none": 0, "rms": D, "layer": D * (1 + bias)}[config.norm]
    moe = config.ffn == "moe"
    feed_forward = config.num_experts * _expert(config) if moe else _dense(config, F)
    parts = {
        "embedding": Vp * D,
        "positions": config.max_seq_len * D if config.position == "learned" else 0,
        "token_shift": config.token_shift * D,
        "attention": L * projections,
        "value_embeddings": _layers_with_values(config) * (Vp * config.kv_width + _gate(config)),
        "feed_forward": L * feed_forward,
        "shared_experts": L * _dense(config, config.num_shared_experts * F) if moe and config.num_shared_experts else 0,
        "router": L * config.num_experts * D if moe else 0,
        "norms": norm * (2 * L + 1 + config.embedding_norm),
        "residual_lambdas": 2 * L if config.residual_lambdas else 0,
        "head": 0 if config.tie_embeddings else Vp * D,
    }
    return {part: count for part, count in parts.items() if count}


def forward_flops_by_part(config: ModelConfig, context: int = 0) -> dict[str, int]:
    """Operations of the forward pass for one token of a window, by part; conventions at the top.

    Args:
        config: the model.
        context: tokens in the window; 0: `context_length`.

    GPT-2 XL's shape with SwiGLU, a window of 1,024 (the course's exercise):

    >>> xl = ModelConfig(vocab_size=50_257, context_length=1024, d_model=1600, num_layers=48, num_heads=25, d_ff=4288)
    >>> {part: f"{flops * 1024 / 1e12:.3f}" for part, flops in forward_flops_by_part(xl).items()}
    {'attention_projections': '1.007', 'attention_scores': '0.322', 'feed_forward': '2.023', 'head': '0.165'}
    """
    D, F, L = config.d_model, config.d_ff, config.num_layers
    T = context or config.context_length
    keys = min(T, config.sliding_window or T)
    moe = config.ffn == "moe"
    matrices = _matrices(config)
    parts = {
        "attention_projections": L * 2 * 2 * D * (D + config.kv_width),
        "attention_scores": L * 2 * 2 * keys * D,  # scores q·k and mixtures of v, each head K wide over all its keys
        "value_gates": 2 * _layers_with_values(config) * _gate(config),
        "feed_forward": L * 2 * matrices * D * F * (config.expert_top_k if moe else 1),
        "shared_experts": L * 2 * matrices * D * F * config.num_shared_experts if moe else 0,
        "router": L * 2 * config.num_experts * D if moe else 0,
        "head": 2 * config.padded_vocab_size * D,
    }
    return {part: flops for part, flops in parts.items() if flops}


def flops_per_token(config: ModelConfig, context: int = 0) -> int:
    """Operations of training on one token: forward and backward."""
    return TRAINING_OVER_FORWARD * sum(forward_flops_by_part(config, context).values())


def _matrices(config: ModelConfig) -> int:
    kind = config.expert_ffn if config.ffn == "moe" else config.ffn
    return 3 if kind == "swiglu" else 2


def _expert(config: ModelConfig) -> int:
    return _matrices(config) * config.d_model * config.d_ff


def _dense(config: ModelConfig, width: int) -> int:
    biases = (_matrices(config) - 1) * width + config.d_model if config.bias else 0
    return _matrices(config) * config.d_model * width + biases


def _layers_with_values(config: ModelConfig) -> int:
    return -(-config.num_layers // 2) if config.value_embeddings else 0


def _gate(config: ModelConfig) -> int:
    return config.num_kv_heads * min(GATE_WIDTH, config.d_model)
