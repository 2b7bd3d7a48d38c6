"""The shape of a model as data: every field, what it means, and which combinations make no sense.

In: values. Out: a frozen, complete `ModelConfig`: all that `TransformerLM` needs to know. Imports no torch.
"""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import model_validator

from bytekiln.errors import ConfigError
from bytekiln.section import Float, Int, Section, setting

PAD_VOCAB_TO = 64
"""Rows of embedding and head are padded to a multiple of this by `pad_vocab`: what matrix units take at once."""
ExpertKind = Literal["swiglu", "silu", "gelu", "gelu_tanh", "relu2"]


class ModelConfig(Section):
    """The shape of a Transformer; all that `TransformerLM` needs to know."""

    vocab_size: Int = setting(
        0, "tokens in the vocabulary; 0: what the tokenizer or the data's manifest says", main=True, ge=0
    )
    context_length: Int = setting(512, "tokens in a training window", also=["block_size"], main=True, ge=1)
    max_seq_len: Int = setting(0, "positions that the model can take; 0: context_length", ge=0)
    d_model: Int = setting(768, "width of the residual stream", also=["n_embd"], main=True, ge=1)
    num_layers: Int = setting(12, "Transformer blocks", also=["n_layers", "n_layer"], main=True, ge=1)
    num_heads: Int = setting(12, "attention heads; must divide d_model", also=["n_heads", "n_head"], main=True, ge=1)
    num_kv_heads: Int = setting(
        0, "heads of keys and values, each shared by num_heads / num_kv_heads queries (GQA); 0: num_heads", ge=0
    )
    d_ff: Int = setting(
        0, "width of the feed-forward (of each expert in moe); 0: ffn_multiple × d_model", main=True, ge=0
    )
    ffn_multiple: Float = setting(
        0.0, "d_ff over d_model where d_ff is unset; 0: 8/3 rounded to 64 for swiglu, else 4", ge=0
    )
    rope_theta: Float = setting(10000.0, "base of the rotary position angles", gt=0)
    norm: Literal["rms", "layer", "none"] = setting("rms", "normalisation: RMSNorm, LayerNorm, or none")
    norm_eps: Float = setting(1e-5, "added to the mean square, or to the variance, in every norm", gt=0)
    norm_position: Literal["pre", "post"] = setting("pre", "normalise before each sub-layer or after its residual sum")
    position: Literal["rope", "learned", "none"] = setting("rope", "how the model knows where a token stands")
    ffn: Literal["swiglu", "silu", "gelu", "gelu_tanh", "relu2", "moe"] = setting(
        "swiglu",
        "feed-forward: gated SwiGLU (three matrices), an activation between two (gelu_tanh: GPT-2's), or experts (moe)",
        also=["ffn_type"],
    )
    causal: bool | Literal["auto"] = setting(
        "auto", "a position sees only itself and what stands before it; auto: unless objective = mlm"
    )
    qk_norm: bool = setting(False, "normalise queries and keys of each head (RMS, no weights) behind the positions")
    tie_embeddings: bool = setting(False, "share one matrix between the token embedding and the output head")
    bias: bool = setting(False, "biases in linear layers and in LayerNorm (GPT-2 has them); never in the head")
    dropout: Float = setting(0.0, "share of activations dropped while training", main=True, ge=0, lt=1)
    attention_dropout: bool = setting(
        True, "drop attention weights too, as GPT-2 does; false: no attention kernel needs to know of dropout"
    )
    logit_softcap: Float = setting(0.0, "c: logits become c·tanh(logits/c); 0: off", ge=0)
    sliding_window: Int = setting(0, "tokens that a position sees, itself included; 0: all before it", ge=0)
    embedding_norm: bool = setting(False, "normalise the token embeddings before the first block")
    token_shift: Int = setting(
        0, "add the embeddings of so many previous tokens, each times a learned vector that starts at zero", ge=0
    )
    value_embeddings: bool = setting(
        False, "every second layer adds an embedding of the token, gated by head, to its attention values"
    )
    residual_lambdas: bool = setting(
        False, "learned multiples of the residual stream and of the first embedding (x0) before each block"
    )
    zero_init_projections: bool = setting(
        False, "start the matrices that end on the residual stream at zero: each block begins as the identity"
    )
    residual_precision: Literal["fp32", "products"] = setting(
        "fp32", "type of the residual stream: fp32, or that of the matrix products, which in bf16 is half to move"
    )
    head_init: Literal["default", "small", "zero"] = setting(
        "default", "output head at the start: as the other matrices, from N(0, 0.001²), or zero"
    )
    init: Literal["course", "gpt2"] = setting(
        "course", "initialisation: truncated normal by fan (course) or sigma 0.02 (gpt2)"
    )
    pad_vocab: bool = setting(
        False, f"pad embedding and head to a multiple of {PAD_VOCAB_TO} tokens; ids above the vocabulary never occur"
    )
    num_experts: Int = setting(8, "moe: experts a layer, each a feed-forward of width d_ff", ge=1)
    expert_top_k: Int = setting(2, "moe: experts that work on a token", ge=1)
    num_shared_experts: Int = setting(0, "moe: further experts that work on every token", ge=0)
    expert_ffn: ExpertKind = setting("swiglu", "moe: kind of the experts")
    router_noise: Float = setting(0.0, "moe: deviation of the normal noise on router logits while training", ge=0)
    load_balancing: Literal["loss", "bias", "none"] = setting(
        "loss", "moe: even out the experts' load by an auxiliary loss, by a bias on the choice, or not"
    )
    load_balancing_weight: Float = setting(
        0.01, "moe: weight of the auxiliary loss, or the step by which the bias moves", ge=0
    )
    dense_twin: bool = setting(
        False, "moe: train the dense model with the same active work instead: expert_ffn of (top_k + shared) × d_ff"
    )

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and columns of the logits."""
        return -(-self.vocab_size // PAD_VOCAB_TO) * PAD_VOCAB_TO if self.pad_vocab else self.vocab_size

    @property
    def head_width(self) -> int:
        """Width of a head."""
        return self.d_model // self.num_heads

    @property
    def attention_dropout_rate(self) -> float:
        """Share of the attention weights dropped while training."""
        return self.dropout if self.attention_dropout else 0.0

    @property
    def kv_width(self) -> int:
        """Width of all keys, or of all values."""
        return self.num_kv_heads * self.head_width

    @property
    def bidirectional(self) -> bool:
        """Whether a position sees what comes after it."""
        return self.causal is False

    @model_validator(mode="after")
    def _complete(self) -> Self:
        rope = self.position == "rope"
        if self.d_model % self.num_heads or (rope and self.d_model // self.num_heads % 2):
            raise ConfigError(_heads_that_would_do(self.d_model, self.num_heads, rope))
        if not self.num_kv_heads:
            self.settle(num_kv_heads=self.num_heads)
        kind = self.expert_ffn if self.ffn == "moe" else self.ffn
        if self.d_ff and self.ffn_multiple and round(self.ffn_multiple * self.d_model) != self.d_ff:
            raise ConfigError(
                f"d_ff: found {self.d_ff} beside ffn_multiple {self.ffn_multiple:g}, which makes it "
                f"{round(self.ffn_multiple * self.d_model)} at d_model {self.d_model}; expected one of the two"
            )
        if not self.d_ff:
            multiple = self.ffn_multiple or (0.0 if kind == "swiglu" else 4.0)
            self.settle(
                d_ff=round(multiple * self.d_model) if multiple else max(64, round(self.d_model * 8 / 3 / 64) * 64)
            )
            if not self.d_ff:
                raise ConfigError(
                    f"ffn_multiple: found {self.ffn_multiple:g} for d_model {self.d_model}; expected at least "
                    f"{1 / self.d_model:.2g}, since d_ff would be 0"
                )
        if not self.max_seq_len:
            self.settle(max_seq_len=self.context_length)
        self._refuse_contradictions()
        if self.dense_twin:
            width = (self.expert_top_k + self.num_shared_experts) * self.d_ff
            self.settle(
                ffn=kind,
                d_ff=width,
                ffn_multiple=0.0,
                dense_twin=False,
                num_experts=8,
                expert_top_k=2,
                num_shared_experts=0,
            )
            self.settle(expert_ffn="swiglu", router_noise=0.0, load_balancing="loss", load_balancing_weight=0.01)
        return self

    def _refuse_contradictions(self) -> None:
        """What cannot be meant: a choice that another one leaves without effect, or that cannot be computed."""
        found: list[tuple[bool, str]] = [
            (
                self.max_seq_len < self.context_length,
                f"max_seq_len: found {self.max_seq_len}; expected at least context_length, {self.context_length}",
            ),
            (
                self.num_heads % self.num_kv_heads != 0,
                f"num_kv_heads: found {self.num_kv_heads}; expected a divisor of num_heads, {self.num_heads}",
            ),
            (
                self.norm == "none" and self.norm_position == "post",
                "norm_position: found post with norm none; expected a norm to place (rms or layer)",
            ),
            (
                self.norm == "none" and self.embedding_norm,
                "embedding_norm: found true with norm none; expected a norm to apply (rms or layer)",
            ),
            (
                self.tie_embeddings and self.head_init != "default",
                f"head_init: found {self.head_init} with tie_embeddings; expected default, "
                "since the head is the token embedding, which cannot start there",
            ),
            (
                self.sliding_window >= self.max_seq_len,
                f"sliding_window: found {self.sliding_window}; expected less than max_seq_len, "
                f"{self.max_seq_len}: such a window hides nothing",
            ),
            (
                self.token_shift >= self.context_length,
                f"token_shift: found {self.token_shift}; expected less than context_length, {self.context_length}: "
                "no token has so many before it",
            ),
            (
                self.position != "rope" and self.rope_theta != type(self).model_fields["rope_theta"].default,
                f"rope_theta: found {self.rope_theta:g} with position {self.position}; expected position = rope, "
                "whose angles it sets",
            ),
            (
                bool(self.sliding_window) and self.bidirectional,
                "sliding_window: found one without causal attention; expected causal = true, it looks back only",
            ),
            (
                self.ffn == "moe" and self.expert_top_k > self.num_experts,
                f"expert_top_k: found {self.expert_top_k}; expected at most num_experts, {self.num_experts}",
            ),
            (
                self.ffn == "moe"
                and not self.dense_twin
                and self.load_balancing != "none"
                and self.num_experts == self.expert_top_k,
                f"load_balancing: found {self.load_balancing} where all {self.num_experts} experts work on every "
                "token; expected none, or a smaller expert_top_k",
            ),
            (
                self.ffn == "moe"
                and self.load_balancing == "none"
                and self.load_balancing_weight != type(self).model_fields["load_balancing_weight"].default,
                f"load_balancing_weight: found {self.load_balancing_weight:g} with load_balancing none; "
                "expected load_balancing = loss or bias",
            ),
            (
                self.dense_twin and self.ffn != "moe",
                f"dense_twin: found true with ffn {self.ffn}; expected ffn = moe, whose twin it is",
            ),
        ]
        if self.ffn != "moe":
            for name in ("num_experts", "expert_top_k", "num_shared_experts", "expert_ffn", "router_noise",
                         "load_balancing", "load_balancing_weight"):  # fmt: skip
                value, usual = getattr(self, name), type(self).model_fields[name].default
                found.append((value != usual, f"{name}: found {value} with ffn {self.ffn}; expected ffn = moe"))
        for wrong, message in found:
            if wrong:
                raise ConfigError(message)


def _heads_that_would_do(d_model: int, found: int, rope: bool) -> str:
    fits = [h for h in range(1, d_model + 1) if d_model % h == 0 and not (rope and d_model // h % 2)]
    fits = sorted(sorted(fits, key=lambda h: abs(math.log(h / found)))[:4])
    why = "rotary positions need an even width a head, and " if rope and d_model % found == 0 else ""
    would = f"{', '.join(map(str, fits))} would do" if fits else "an even d_model is needed"
    return f"num_heads: found {found} for d_model {d_model}; {why}expected a divisor of {d_model}: {would}"
