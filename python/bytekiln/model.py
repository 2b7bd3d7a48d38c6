"""A decoder-only Transformer language model, to be read from top to bottom.

In: token ids. Out: logits. It knows neither loss nor optimizer nor tokenizer; `train`, `evaluate` and
`sample` call it. The base is the one of Stanford's CS336 and of Llama: pre-norm RMSNorm, rotary positions,
SwiGLU, no biases. Parameter names are the course's, so that its state dicts load without renaming:

    token_embeddings.weight                      V × D
    layers.{i}.ln1.weight, layers.{i}.ln2.weight D
    layers.{i}.attn.{q,k,v,output}_proj.weight   D × D
    layers.{i}.ffn.w1.weight, w3.weight          F × D     (w3 only in swiglu)
    layers.{i}.ffn.w2.weight                     D × F
    ln_final.weight                              D
    lm_head.weight                               V × D     (absent when embeddings are tied)
    position_embeddings.weight                   P × D     (only with learned positions)

Shapes are suffixes of names: B batch, T time (window position), D model width, H heads, K head width,
F feed-forward width, V vocabulary, S keys in sight (T plus what a cache holds), P positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor, nn

from bytekiln.config import ModelConfig
from bytekiln.errors import ConfigError

NORM_EPS = 1e-5
"""Added to the mean square in every norm, as in the course and in Llama."""

Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""(q_BxHxTxK, k_BxHxSxK, v_BxHxSxK, dropout) -> out_BxHxTxK; the last query stands at the last key."""


def reference_attention(q_BxHxTxK: Tensor, k_BxHxSxK: Tensor, v_BxHxSxK: Tensor, dropout: float = 0.0) -> Tensor:
    """Causal scaled dot-product attention in plain tensors (Vaswani et al. 2017): the specification.

    softmax(q kᵀ / √K) v, where query t of the last T positions sees keys 0 … S-T+t.
    """
    T, S, K = q_BxHxTxK.shape[-2], k_BxHxSxK.shape[-2], q_BxHxTxK.shape[-1]
    scores_BxHxTxS = q_BxHxTxK @ k_BxHxSxK.transpose(-1, -2) / math.sqrt(K)
    visible_TxS = torch.ones(T, S, dtype=torch.bool, device=scores_BxHxTxS.device).tril(S - T)
    weights_BxHxTxS = scores_BxHxTxS.masked_fill(~visible_TxS, -math.inf).softmax(dim=-1)
    return F.dropout(weights_BxHxTxS, dropout, training=dropout > 0) @ v_BxHxSxK


def sdpa_attention(q_BxHxTxK: Tensor, k_BxHxSxK: Tensor, v_BxHxSxK: Tensor, dropout: float = 0.0) -> Tensor:
    """The same through torch's fused kernels; `tests/test_model.py` holds it to `reference_attention`."""
    T, S = q_BxHxTxK.shape[-2], k_BxHxSxK.shape[-2]
    if T == 1:  # one new token sees everything before it: no mask
        return F.scaled_dot_product_attention(q_BxHxTxK, k_BxHxSxK, v_BxHxSxK, dropout_p=dropout)
    if T < S:  # several new tokens behind a cache: torch's is_causal would align them to the first key
        visible_TxS = torch.ones(T, S, dtype=torch.bool, device=q_BxHxTxK.device).tril(S - T)
        return F.scaled_dot_product_attention(q_BxHxTxK, k_BxHxSxK, v_BxHxSxK, visible_TxS, dropout)
    return F.scaled_dot_product_attention(q_BxHxTxK, k_BxHxSxK, v_BxHxSxK, dropout_p=dropout, is_causal=True)


class KVCache:
    """Keys and values of the tokens read so far, one pair a layer; lets sampling read each token once."""

    def __init__(self, num_layers: int) -> None:
        """An empty cache for a model of `num_layers`."""
        self.keys_BxHxSxK: list[Tensor | None] = [None] * num_layers
        self.values_BxHxSxK: list[Tensor | None] = [None] * num_layers

    def __len__(self) -> int:
        """Tokens read so far."""
        first = self.keys_BxHxSxK[0]
        return 0 if first is None else first.shape[-2]

    def extend(self, layer: int, k_BxHxTxK: Tensor, v_BxHxTxK: Tensor) -> tuple[Tensor, Tensor]:
        """Append the new tokens' keys and values; returns all so far."""
        k_old, v_old = self.keys_BxHxSxK[layer], self.values_BxHxSxK[layer]
        k_BxHxSxK = k_BxHxTxK if k_old is None else torch.cat([k_old, k_BxHxTxK], dim=-2)
        v_BxHxSxK = v_BxHxTxK if v_old is None else torch.cat([v_old, v_BxHxTxK], dim=-2)
        self.keys_BxHxSxK[layer], self.values_BxHxSxK[layer] = k_BxHxSxK, v_BxHxSxK
        return k_BxHxSxK, v_BxHxSxK


class RotaryEmbedding(nn.Module):
    """Rotary positions (Su et al. 2021) on interleaved pairs: (x0, x1), (x2, x3) … are turned by t·θ^(-2i/K).

    The product of a turned query and a turned key depends on their distance alone. Hugging Face's Llama pairs
    x_i with x_{i+K/2}: exporting permutes the rows of q_proj and k_proj.
    """

    cos_PxK2: Tensor
    sin_PxK2: Tensor

    def __init__(self, head_width: int, positions: int, theta: float) -> None:
        """Tables for `positions` positions; not part of the state dict."""
        super().__init__()
        angle_K2 = theta ** (-torch.arange(0, head_width, 2, dtype=torch.float64) / head_width)
        turn_PxK2 = torch.arange(positions, dtype=torch.float64)[:, None] * angle_K2
        self.register_buffer("cos_PxK2", turn_PxK2.cos().float(), persistent=False)
        self.register_buffer("sin_PxK2", turn_PxK2.sin().float(), persistent=False)

    def forward(self, x_BxHxTxK: Tensor, start: int = 0) -> Tensor:
        """Turn the vectors at positions start … start+T-1."""
        T = x_BxHxTxK.shape[-2]
        cos_TxK2, sin_TxK2 = self.cos_PxK2[start : start + T], self.sin_PxK2[start : start + T]
        even, odd = x_BxHxTxK.float().reshape(*x_BxHxTxK.shape[:-1], -1, 2).unbind(-1)
        turned = torch.stack((even * cos_TxK2 - odd * sin_TxK2, even * sin_TxK2 + odd * cos_TxK2), dim=-1)
        return turned.flatten(-2).type_as(x_BxHxTxK)


class RMSNorm(nn.Module):
    """x / RMS(x) · weight (Zhang and Sennrich 2019)."""

    def __init__(self, width: int) -> None:
        """Weight 1 in every place."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_BxTxD: Tensor) -> Tensor:
        """Normalise the last axis."""
        return F.rms_norm(x_BxTxD, self.weight.shape, self.weight, NORM_EPS)


class LayerNorm(nn.Module):
    """(x - mean) / deviation · weight, without bias (nanoGPT's `bias=False`)."""

    def __init__(self, width: int) -> None:
        """Weight 1 in every place."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_BxTxD: Tensor) -> Tensor:
        """Normalise the last axis."""
        return F.layer_norm(x_BxTxD, self.weight.shape, self.weight, None, NORM_EPS)


def _norm(config: ModelConfig) -> nn.Module:
    if config.norm == "none":
        return nn.Identity()
    return RMSNorm(config.d_model) if config.norm == "rms" else LayerNorm(config.d_model)


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: ModelConfig, attend: Attend, rotary: RotaryEmbedding | None) -> None:
        """`attend` does the arithmetic; `rotary` is shared by all layers."""
        super().__init__()
        D = config.d_model
        self.num_heads, self.attend, self.dropout = config.num_heads, attend, config.dropout
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(D, D, bias=False) for _ in range(3))
        self.output_proj = nn.Linear(D, D, bias=False)
        self._rotary = (rotary,)  # in a tuple: shared, and not a submodule of every layer

    def forward(self, x_BxTxD: Tensor, layer: int, cache: KVCache | None = None, start: int = 0) -> Tensor:
        """Mix the positions; `cache` holds the `start` tokens before these, this one's `layer` among the others."""
        q, k, v = (
            proj(x_BxTxD).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        rotary = self._rotary[0]
        if rotary is not None:
            q, k = rotary(q, start), rotary(k, start)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        out_BxHxTxK = self.attend(q, k, v, self.dropout if self.training else 0.0)
        return self.output_proj(out_BxHxTxK.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """w2(silu(w1 x) · w3 x) for swiglu (Shazeer 2020), w2(act(w1 x)) otherwise."""

    def __init__(self, config: ModelConfig) -> None:
        """Two matrices, three for swiglu."""
        super().__init__()
        D, width = config.d_model, config.d_ff
        self.kind = config.ffn
        self.w1 = nn.Linear(D, width, bias=False)
        self.w2 = nn.Linear(width, D, bias=False)
        if config.ffn == "swiglu":
            self.w3 = nn.Linear(D, width, bias=False)

    def forward(self, x_BxTxD: Tensor) -> Tensor:
        """The same function at every position."""
        h_BxTxF = self.w1(x_BxTxD)
        h_BxTxF = F.gelu(h_BxTxF) if self.kind == "gelu" else F.silu(h_BxTxF)
        if self.kind == "swiglu":
            h_BxTxF = h_BxTxF * self.w3(x_BxTxD)
        return self.w2(h_BxTxF)  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention, then feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig, attend: Attend, rotary: RotaryEmbedding | None) -> None:
        """Parts of one layer."""
        super().__init__()
        self.pre = config.norm_position == "pre"
        self.ln1, self.ln2 = _norm(config), _norm(config)
        self.attn = Attention(config, attend, rotary)
        self.ffn = FeedForward(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x_BxTxD: Tensor, layer: int, cache: KVCache | None = None, start: int = 0) -> Tensor:
        """One layer; arguments as `Attention`."""
        if self.pre:
            x_BxTxD = x_BxTxD + self.drop(self.attn(self.ln1(x_BxTxD), layer, cache, start))
            return x_BxTxD + self.drop(self.ffn(self.ln2(x_BxTxD)))  # type: ignore[no-any-return]
        x_BxTxD = self.ln1(x_BxTxD + self.drop(self.attn(x_BxTxD, layer, cache, start)))
        return self.ln2(x_BxTxD + self.drop(self.ffn(x_BxTxD)))  # type: ignore[no-any-return]


class TransformerLM(nn.Module):
    """Token ids in, logits out.

    >>> model = TransformerLM(ModelConfig(vocab_size=300, d_model=32, num_layers=2, num_heads=2, context_length=8))
    >>> model(torch.zeros(1, 8, dtype=torch.int64)).shape
    torch.Size([1, 8, 300])
    """

    def __init__(self, config: ModelConfig, *, attend: Attend = sdpa_attention) -> None:
        """Build and initialise; the global torch seed decides the weights.

        Args:
            config: shape of the model; `vocab_size` must be set.
            attend: the attention arithmetic, `sdpa_attention` or `reference_attention`.

        Raises:
            ConfigError: the vocabulary's size is unknown.
        """
        super().__init__()
        if not config.vocab_size:
            raise ConfigError("vocab_size: found 0; expected the size of the data's vocabulary")
        self.config = config
        D, head_width = config.d_model, config.d_model // config.num_heads
        rotary = (
            RotaryEmbedding(head_width, config.max_seq_len, config.rope_theta) if config.position == "rope" else None
        )
        self.rotary = rotary
        self.token_embeddings = nn.Embedding(config.vocab_size, D)
        self.position_embeddings = nn.Embedding(config.max_seq_len, D) if config.position == "learned" else None
        self.drop = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config, attend, rotary) for _ in range(config.num_layers))
        self.ln_final = _norm(config)
        self.lm_head = None if config.tie_embeddings else nn.Linear(D, config.vocab_size, bias=False)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Draw every weight anew; the whole initialisation is here.

        course: Linear from a normal of variance 2/(in+out) cut at three deviations, embeddings from N(0, 1) cut
        at ±3 (CS336, assignment 1). gpt2: all from N(0, 0.02²), the projections that end on the residual stream
        from N(0, 0.02²/(2·layers)) (Radford et al. 2019, nanoGPT). Norm weights are 1.
        """
        for name, weight in self.named_parameters():
            if weight.ndim < 2:
                weight.fill_(1.0)
            elif self.config.init == "gpt2":
                ends_on_residual = name.endswith(("output_proj.weight", "w2.weight"))
                weight.normal_(0.0, 0.02 / math.sqrt(2 * self.config.num_layers if ends_on_residual else 1))
            elif "embeddings" in name:
                # A tied matrix is a Linear too: deviation 1 would start it with logits of size √D.
                std = (
                    math.sqrt(2 / sum(weight.shape)) if self.config.tie_embeddings and name.startswith("token") else 1.0
                )
                nn.init.trunc_normal_(weight, 0.0, std, -3 * std, 3 * std)
            else:
                std = math.sqrt(2 / sum(weight.shape))
                nn.init.trunc_normal_(weight, 0.0, std, -3 * std, 3 * std)

    def forward(self, ids_BxT: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits for the token after each position.

        Args:
            ids_BxT: int64 ids below the vocabulary's size.
            cache: the tokens before these; extended in place.

        Returns:
            logits_BxTxV.

        Raises:
            ConfigError: more positions than the model has.
        """
        start = 0 if cache is None else len(cache)
        T = ids_BxT.shape[-1]
        if start + T > self.config.max_seq_len:
            raise ConfigError(
                f"model: found a sequence of {start + T} tokens; expected at most {self.config.max_seq_len}"
            )
        x_BxTxD = self.token_embeddings(ids_BxT)
        if self.position_embeddings is not None:
            x_BxTxD = x_BxTxD + self.position_embeddings.weight[start : start + T]
        x_BxTxD = self.drop(x_BxTxD)
        for i, layer in enumerate(self.layers):
            x_BxTxD = layer(x_BxTxD, i, cache, start)
        x_BxTxD = self.ln_final(x_BxTxD)
        head_VxD = self.token_embeddings.weight if self.lm_head is None else self.lm_head.weight
        return F.linear(x_BxTxD, head_VxD)


def parameter_count(config: ModelConfig) -> int:
    """Parameters of the model, exactly, without building it.

    >>> parameter_count(ModelConfig(vocab_size=10_000, d_model=512, num_layers=4, num_heads=16, d_ff=1344))
    22696448
    """
    V, D, width = config.vocab_size, config.d_model, config.d_ff
    norm = 0 if config.norm == "none" else D
    layer = 4 * D * D + (3 if config.ffn == "swiglu" else 2) * D * width + 2 * norm
    positions = config.max_seq_len * D if config.position == "learned" else 0
    return V * D * (1 if config.tie_embeddings else 2) + positions + config.num_layers * layer + norm
