"""Hugging Face's `config.json` of GPT-2 and Llama against our `ModelConfig` (docs/weights.md has the tables).

In: a `config.json`. Out: the model that it describes, and in what ours computes another function; and back, the
dictionary of a `config.json`. Called by `convert`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bytekiln.config import ModelConfig
from bytekiln.errors import ConfigError, FileError, FormatError
from bytekiln.section import Value

ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "silu": "silu",
    "swish": "silu",
    "relu2": "relu2",
}
"""GPT-2's `activation_function` and our `ffn`."""
LLAMA_BIASES = {"attn": "attention_bias", "ffn": "mlp_bias"}
"""Part of a layer, and Llama's flag for the biases of its linear layers."""


def implied(path: Path) -> ModelConfig:
    """The model that a `config.json` describes."""
    said = _read_json(path)
    kind = said.get("model_type")
    if kind not in ("gpt2", "llama"):
        raise FormatError(f"{path}: model_type: found {kind}; expected gpt2 or llama")
    get = _Getter(path, said)
    get.refuse("quantization_config", None)
    fields = _implied_by_llama(get) if kind == "llama" else _implied_by_gpt2(get)
    eps_name = "rms_norm_eps" if kind == "llama" else "layer_norm_epsilon"
    eps = get.number(eps_name, 1e-6 if kind == "llama" else 1e-5)
    try:
        return ModelConfig(context_length=1, norm_eps=eps, **fields)
    except ConfigError as exc:
        raise FormatError(f"{path}: {exc}") from None


def without_biases(path: Path) -> frozenset[str]:
    """The parts of a layer, `attn` and `ffn`, whose linear layers have no biases by a `config.json`'s own flags.

    `ModelConfig.bias` is one flag for both: a Llama that has biases in one part only gets biases of 0 in the other.
    """
    said = _read_json(path)
    if said.get("model_type") != "llama":
        return frozenset()
    return frozenset(part for part, flag in LLAMA_BIASES.items() if not said.get(flag, False))


class _Getter:
    """Typed values of a `config.json`."""

    def __init__(self, path: Path, said: Mapping[str, Any]) -> None:
        self.path, self.said = path, said

    def whole(self, name: str, default: int | None = None) -> int:
        """A positive integer; null and absent are the default."""
        value = self.said.get(name)
        value = default if value is None else value
        if type(value) is not int or value < 1:
            raise FormatError(f"{self.path}: {name}: found {value!r}; expected a whole number above 0")
        return value

    def number(self, name: str, default: float) -> float:
        """A positive number."""
        value = self.said.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise FormatError(f"{self.path}: {name}: found {value!r}; expected a number above 0")
        return float(value)

    def refuse(self, name: str, expected: object) -> None:
        """Make sure that `name` is absent or as `expected`."""
        if self.said.get(name, expected) not in (expected, None):
            raise FormatError(
                f"{self.path}: {name}: found {json.dumps(self.said[name])[:60]}; "
                f"expected {json.dumps(expected)}: there is no such model here"
            )


def _implied_by_llama(get: _Getter) -> dict[str, Any]:
    said = get.said
    if said.get("hidden_act", "silu") not in ("silu", "swish"):
        get.refuse("hidden_act", "silu")
    heads, width = get.whole("num_attention_heads"), get.whole("hidden_size")
    get.refuse("head_dim", width // heads)
    rope = said.get("rope_parameters") or said.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
    if kind != "default" or not isinstance(rope, dict):
        raise FormatError(f"{get.path}: rope_type: found {kind}; expected default: there is no such model here")
    top = {"rope_theta": said["rope_theta"]} if said.get("rope_theta") is not None else {}
    theta = _Getter(get.path, {**rope, **top})
    for part in (get, theta):
        part.refuse("partial_rotary_factor", 1.0)
    return {
        "vocab_size": get.whole("vocab_size"),
        "max_seq_len": get.whole("max_position_embeddings", 2048),
        "d_model": width,
        "num_layers": get.whole("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": get.whole("num_key_value_heads", heads),
        "d_ff": get.whole("intermediate_size"),
        "rope_theta": theta.number("rope_theta", 10000.0),
        "norm": "rms",
        "position": "rope",
        "ffn": "swiglu",
        "tie_embeddings": bool(said.get("tie_word_embeddings", False)),
        "bias": any(bool(said.get(flag, False)) for flag in LLAMA_BIASES.values()),
    }


def _implied_by_gpt2(get: _Getter) -> dict[str, Any]:
    said = get.said
    for name, expected in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
    ):
        get.refuse(name, expected)
    activation = said.get("activation_function", "gelu_new")
    if activation not in ACTIVATIONS:
        get.refuse("activation_function", "gelu_new")
    width = get.whole("n_embd")
    return {
        "vocab_size": get.whole("vocab_size"),
        "max_seq_len": get.whole("n_positions", 1024),
        "d_model": width,
        "num_layers": get.whole("n_layer"),
        "num_heads": get.whole("n_head"),
        "d_ff": get.whole("n_inner", 4 * width),
        "norm": "layer",
        "position": "learned",
        "ffn": ACTIVATIONS.get(activation, "gelu"),
        "tie_embeddings": bool(said.get("tie_word_embeddings", True)),
        "bias": True,
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        said = json.loads(path.read_bytes())
    except OSError as exc:
        raise FileError(f"{path}: {(exc.strerror or 'unreadable').lower()}; expected a readable file") from None
    except ValueError:
        raise FormatError(f"{path}: found no JSON; expected Hugging Face's {path.name}") from None
    if not isinstance(said, dict):
        raise FormatError(f"{path}: found no object; expected Hugging Face's {path.name}")
    return said


def described(config: ModelConfig, eot_id: int | None) -> dict[str, Any]:
    """The `config.json` of a model: GPT-2's where positions are learned, else Llama's.

    Raises:
        ConfigError: names the first field that their model does not have.
    """
    _refuse_what_they_lack(config, gpt2=config.position == "learned")
    both: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": eot_id,
        "eos_token_id": eot_id,
        "torch_dtype": "float32",
    }
    if config.position == "learned":
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "n_embd": config.d_model,
            "n_layer": config.num_layers,
            "n_head": config.num_heads,
            "n_inner": config.d_ff,
            "n_positions": config.max_seq_len,
            "activation_function": next(k for k, v in ACTIVATIONS.items() if v == config.ffn),
            "layer_norm_epsilon": config.norm_eps,
            **{f"{where}_pdrop": config.dropout for where in ("resid", "embd")},
            "attn_pdrop": config.attention_dropout_rate,
            **both,
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_width,
        "intermediate_size": config.d_ff,
        "max_position_embeddings": config.max_seq_len,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        # transformers 4 reads the first, 5 the second
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        **dict.fromkeys(LLAMA_BIASES.values(), config.bias),
        **both,
    }


def _refuse_what_they_lack(config: ModelConfig, *, gpt2: bool) -> None:
    theirs, has = ("GPT-2", ("layer", "learned")) if gpt2 else ("Llama", ("rms", "rope"))
    wanted: dict[str, tuple[Value, ...]] = {
        "norm": (has[0],),
        "norm_position": ("pre",),
        "position": (has[1],),
        "ffn": tuple(dict.fromkeys(ACTIVATIONS.values())) if gpt2 else ("swiglu",),
        "qk_norm": (False,),
        "logit_softcap": (0,),
        "sliding_window": (0,),
        "token_shift": (0,),
        "embedding_norm": (False,),
        "value_embeddings": (False,),
        "residual_lambdas": (False,),
        "causal": (True, "auto"),
        **({"num_kv_heads": (config.num_heads,)} if gpt2 else {}),
    }
    for name, values in wanted.items():
        found = getattr(config, name)
        if found not in values:
            expected = " or ".join(str(v).lower() for v in values)
            raise ConfigError(f"{name}: found {str(found).lower()}; expected {expected}, since {theirs} has no other")
