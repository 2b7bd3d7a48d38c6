"""Attention kernels, what a position may see, and the cache of keys and values.

In: queries, keys and values of all heads. Out: the mixed values. Called by `model`; `choose` is for `train`, which
knows the device. Every kernel has the signature `Attend`, takes fewer heads of keys and values than of queries (GQA:
each is shared by H / G neighbouring queries), and is held to `reference_attention` by `tests/test_attention.py`.

Shapes are suffixes of names: B batch, T queries, S keys (T plus what a cache holds), H heads of queries, G heads of
keys and values, K width of a head. The last query always stands at the last key.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache as once
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, cast

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from bytekiln import kernels
from bytekiln.config import ModelConfig
from bytekiln.errors import ConfigError

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

LEAST_FLEX_WIDTH = 16
"""Narrower heads FlexAttention's kernel refuses (torch 2.15, `_inductor/kernel/flex`)."""


class Sight(NamedTuple):
    """What a position may see. `look` makes one for a whole pass, so that no layer builds the same mask again."""

    causal: bool = True
    """Nothing behind itself."""
    window: int = 0
    """At most so many positions back, itself included; 0: any number."""
    documents_BxS: Tensor | None = None
    """Number of each key's document: a position sees its own document only. None: one document."""
    mask: Tensor | None = None
    """`visible_keys` of all this, ready made for `sdpa_attention`."""
    blocks: BlockMask | None = None
    """The same for `flex_attention`."""


CAUSAL = Sight()
Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor, float, Sight], Tensor]
"""(q_BxHxTxK, k_BxGxSxK, v_BxGxSxK, dropout, sight) -> out_BxHxTxK."""


def visible_keys(sight: Sight, T: int, S: int, device: torch.device) -> Tensor:
    """Whether query t, which stands at position p = S-T+t, sees key s: the definition.

    s ≤ p where causal, p - s < window where there is one, and the same document.

    Returns:
        Booleans of shape 1×1×T×S, or B×1×T×S with documents.
    """
    key_S = torch.arange(S, device=device)
    back_TxS = key_S[S - T :, None] - key_S
    visible_TxS = back_TxS >= 0 if sight.causal else torch.ones_like(back_TxS, dtype=torch.bool)
    if sight.window:
        visible_TxS = visible_TxS & (back_TxS < sight.window)
    visible_1x1xTxS = visible_TxS[None, None]
    if sight.documents_BxS is None:
        return visible_1x1xTxS
    d = sight.documents_BxS
    return visible_1x1xTxS & (d[:, None, S - T :, None] == d[:, None, None, :])


def needs_mask(sight: Sight, T: int, S: int) -> bool:
    """Whether the kernels' own `is_causal`, or no mask at all, would not say it."""
    if sight.documents_BxS is not None:
        return True
    windowed = 0 < sight.window < S
    if not sight.causal:
        return windowed
    # torch's is_causal would align several new tokens behind a cache to the first key. A single new token needs no
    # mask: it sees all keys, or the last ones.
    return T > 1 and (windowed or T < S)


def look(attend: Attend, sight: Sight, T: int, S: int, device: torch.device) -> Sight:
    """The sight with the mask that `attend` wants, made once for all layers of a pass."""
    if attend is flex_attention and T == S:
        return sight._replace(blocks=_block_mask(sight, T, device))
    if attend is native_attention and device.type == "cpu" and sight.documents_BxS is None:
        return sight  # the core sees by itself; whatever goes to sdpa gets the mask
    if attend is not reference_attention and needs_mask(sight, T, S):
        return sight._replace(mask=visible_keys(sight, T, S, device))
    return sight


def reference_attention(
    q_BxHxTxK: Tensor, k_BxGxSxK: Tensor, v_BxGxSxK: Tensor, dropout: float = 0.0, sight: Sight = CAUSAL
) -> Tensor:
    """Scaled dot-product attention in plain tensors (Vaswani et al. 2017): the specification.

    softmax(q kᵀ / √K) v over the keys in sight.
    """
    T, S, K = q_BxHxTxK.shape[-2], k_BxGxSxK.shape[-2], q_BxHxTxK.shape[-1]
    shared = q_BxHxTxK.shape[1] // k_BxGxSxK.shape[1]
    k_BxHxSxK, v_BxHxSxK = (x.repeat_interleave(shared, dim=1) for x in (k_BxGxSxK, v_BxGxSxK))
    scores_BxHxTxS = q_BxHxTxK @ k_BxHxSxK.transpose(-1, -2) / math.sqrt(K)
    visible = visible_keys(sight, T, S, scores_BxHxTxS.device)
    weights_BxHxTxS = scores_BxHxTxS.masked_fill(~visible, -math.inf).softmax(dim=-1)
    return F.dropout(weights_BxHxTxS, dropout, training=dropout > 0) @ v_BxHxSxK


def sdpa_attention(
    q_BxHxTxK: Tensor, k_BxGxSxK: Tensor, v_BxGxSxK: Tensor, dropout: float = 0.0, sight: Sight = CAUSAL
) -> Tensor:
    """The same through torch's fused kernels, without a mask wherever their `is_causal` says it."""
    T, S = q_BxHxTxK.shape[-2], k_BxGxSxK.shape[-2]
    mask = sight.mask
    if mask is None and needs_mask(sight, T, S):
        mask = visible_keys(sight, T, S, q_BxHxTxK.device)
    if mask is None and T == 1 and sight.causal and sight.window:  # a single new token sees the end of the cache
        k_BxGxSxK, v_BxGxSxK = k_BxGxSxK[..., -sight.window :, :], v_BxGxSxK[..., -sight.window :, :]
    return F.scaled_dot_product_attention(
        q_BxHxTxK,
        k_BxGxSxK,
        v_BxGxSxK,
        mask,
        dropout,
        is_causal=sight.causal and mask is None and T > 1,
        enable_gqa=q_BxHxTxK.shape[1] != k_BxGxSxK.shape[1],
    )


def native_attention(
    q_BxHxTxK: Tensor, k_BxGxSxK: Tensor, v_BxGxSxK: Tensor, dropout: float = 0.0, sight: Sight = CAUSAL
) -> Tensor:
    """The same through the Rust core, which needs no mask for windows and never visits what lies outside of them.

    On the CPU, in float32; what comes in bf16 or fp16 goes there and back, which takes a third of the time of torch's
    kernels for such types (measured with AMX). Dropout, documents and other devices are sdpa's, and so is a single new
    token behind a cache: too little work for the way there.
    """
    T, dtype = q_BxHxTxK.shape[-2], q_BxHxTxK.dtype
    q, k, v = q_BxHxTxK, k_BxGxSxK, v_BxGxSxK
    if T > 1 and not dropout and sight.documents_BxS is None and q.is_cpu:
        if dtype in (torch.bfloat16, torch.float16):
            q, k, v = q.float(), k.float(), v.float()
        if kernels.attends(q):
            return kernels.attention(q, k, v, sight.causal, sight.window).to(dtype)
    return sdpa_attention(q_BxHxTxK, k_BxGxSxK, v_BxGxSxK, dropout, sight)


def flex_attention(
    q_BxHxTxK: Tensor, k_BxGxSxK: Tensor, v_BxGxSxK: Tensor, dropout: float = 0.0, sight: Sight = CAUSAL
) -> Tensor:
    """The same through FlexAttention (Dong et al. 2024), which skips the blocks that a mask leaves empty.

    For windows and document masks on CUDA. It knows no dropout, and on the CPU no backward: `choose` refuses both.
    Behind a cache the number of keys grows with every token, and each would compile a kernel: sdpa does those.
    """
    from torch.nn.attention import flex_attention as flex  # here: it loads the compiler

    T, S = q_BxHxTxK.shape[-2], k_BxGxSxK.shape[-2]
    if T != S:
        return sdpa_attention(q_BxHxTxK, k_BxGxSxK, v_BxGxSxK, dropout, sight)
    assert not dropout
    blocks = sight.blocks if sight.blocks is not None else _block_mask(sight, T, q_BxHxTxK.device)
    # Uncompiled it would write the whole matrix of scores; inside a compiled model it is part of that graph.
    bare = torch.compiler.is_compiling() or not q_BxHxTxK.is_cuda
    kernel = cast("Callable[..., Tensor]", flex.flex_attention) if bare else _compiled_flex()
    shared = q_BxHxTxK.shape[1] != k_BxGxSxK.shape[1]
    return kernel(q_BxHxTxK, k_BxGxSxK, v_BxGxSxK, block_mask=blocks, enable_gqa=shared)


@once
def _compiled_flex() -> Callable[..., Tensor]:
    """FlexAttention as a graph of its own, for models that are not compiled."""
    from torch.nn.attention.flex_attention import flex_attention as kernel

    return torch.compile(kernel, dynamic=False)


def _block_mask(sight: Sight, T: int, device: torch.device) -> BlockMask:
    from torch.nn.attention.flex_attention import create_block_mask

    causal, window, documents = sight.causal, sight.window, sight.documents_BxS

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = q >= k if causal else q == q
        if window:
            seen = seen & (q - k < window)
        return seen if documents is None else seen & (documents[b, q] == documents[b, k])

    batch = None if documents is None else documents.shape[0]
    return create_block_mask(visible, batch, None, T, T, device=device)


def choose(name: str, config: ModelConfig, device: torch.device, documents: bool) -> Attend:
    """The kernel of the field `attention`.

    auto is the Rust core on the CPU wherever it can train the model, on CUDA FlexAttention where there is a mask to
    profit from and nothing against it, else torch's fused kernels.

    Args:
        name: auto, native, sdpa, flex or reference.
        config: the model, which is to be trained.
        device: where it runs.
        documents: whether attention stops at the ends of documents.

    Raises:
        ConfigError: flex or native was asked for and cannot train this model here.
    """
    against = _against_flex(config, device)
    if name == "flex" and against:
        raise ConfigError(f"attention: found flex {against}; expected sdpa or auto")
    if name == "native" and (why := _against_native(config, device, documents)):
        raise ConfigError(f"attention: found native {why}; expected sdpa or auto")
    if name == "auto":
        name = "flex" if not against and (documents or config.sliding_window) else "sdpa"
        name = name if _against_native(config, device, documents) else "native"
    named: dict[str, Attend] = {
        "native": native_attention,
        "sdpa": sdpa_attention,
        "flex": flex_attention,
        "reference": reference_attention,
    }
    return named[name]


def activate_flash(wanted: str, config: ModelConfig, device: torch.device, precision: str) -> str:
    """Have torch's fused attention call another FlashAttention, where one is installed that can train this model.

    FA3 (the package flash_attn_3) is for Hopper, FA4 (flash_attn's CuTe kernels) for Hopper and Blackwell. Newer
    versions of torch have a registry of them; they are swapped for its own behind the same operator, in all of the
    process.

    Args:
        wanted: the field `flash`: torch, auto, FA3 or FA4.
        config: the model. device: where it is trained. precision: of the run.

    Returns:
        The one that is active now; "torch" for its own.

    Raises:
        ConfigError: one was asked for by name and cannot be had here.
    """
    if wanted == "torch":
        return wanted
    against = _against_other_flash(config, device, precision)
    if not against:
        from torch.nn import attention as registry

        major = torch.cuda.get_device_capability(device)[0]
        for name in {9: ("FA3", "FA4"), 10: ("FA4",)}.get(major, ()):
            if wanted in ("auto", name):
                try:
                    registry.activate_flash_attention_impl(name)
                except (AttributeError, ImportError, RuntimeError, ValueError):
                    continue  # an older torch, not installed, or without a kernel for this device
                return name
        against = f"which is not installed, or not for devices of compute capability {major}"
    if wanted == "auto":
        return "torch"
    raise ConfigError(f"flash: found {wanted} {against}; expected torch or auto")


def _against_other_flash(config: ModelConfig, device: torch.device, precision: str) -> str:
    if device.type != "cuda":
        return f"on {device.type}; it is for CUDA"
    if precision not in ("bf16", "fp16"):
        return f"in {precision}; it computes in bf16 and fp16"
    return _dropped(config, "it")


def _dropped(config: ModelConfig, who: str) -> str:
    rate = config.attention_dropout_rate
    return f"with dropout {rate:g}, which {who} does not have; attention_dropout = false leaves it out" if rate else ""


def _against_native(config: ModelConfig, device: torch.device, documents: bool) -> str:
    if device.type != "cpu":
        return f"on {device.type}; the core computes on the CPU"
    if dropped := _dropped(config, "the core"):
        return dropped
    if documents:
        return "with document_mask, which the core does not have"
    if config.head_width % 8 or config.head_width > kernels.WIDEST_HEAD:
        return f"with heads {config.head_width} wide; the core takes multiples of 8 up to {kernels.WIDEST_HEAD}"
    return ""


def _against_flex(config: ModelConfig, device: torch.device) -> str:
    if device.type != "cuda":
        return f"on {device.type}, where FlexAttention has no backward"
    if dropped := _dropped(config, "FlexAttention"):
        return dropped
    if config.head_width < LEAST_FLEX_WIDTH:
        return f"with heads {config.head_width} wide; FlexAttention needs {LEAST_FLEX_WIDTH}"
    return ""


class KVCache:
    """Keys and values of the tokens read so far, one pair a layer; lets sampling read each token once."""

    def __init__(self, num_layers: int) -> None:
        """An empty cache for a model of `num_layers`."""
        self.keys_BxGxSxK: list[Tensor | None] = [None] * num_layers
        self.values_BxGxSxK: list[Tensor | None] = [None] * num_layers
        self.documents_BxS: Tensor | None = None
        self.inputs_BxJxD: Tensor | None = None
        """Embeddings of the last tokens, as many as the model looks back for."""

    def __len__(self) -> int:
        """Tokens read so far."""
        first = self.keys_BxGxSxK[0]
        return 0 if first is None else first.shape[-2]

    def extend(self, layer: int, k_BxGxTxK: Tensor, v_BxGxTxK: Tensor) -> tuple[Tensor, Tensor]:
        """Append the new tokens' keys and values; returns all so far."""
        k_old, v_old = self.keys_BxGxSxK[layer], self.values_BxGxSxK[layer]
        k_BxGxSxK = k_BxGxTxK if k_old is None else torch.cat([k_old, k_BxGxTxK], dim=-2)
        v_BxGxSxK = v_BxGxTxK if v_old is None else torch.cat([v_old, v_BxGxTxK], dim=-2)
        self.keys_BxGxSxK[layer], self.values_BxGxSxK[layer] = k_BxGxSxK, v_BxGxSxK
        return k_BxGxSxK, v_BxGxSxK

    def extend_documents(self, documents_BxT: Tensor | None) -> Tensor | None:
        """Append the new tokens' documents, before their keys; returns all so far.

        Raises:
            ConfigError: some tokens have documents and others none.
        """
        if len(self) and (self.documents_BxS is None) != (documents_BxT is None):
            raise ConfigError("cache: found tokens with and without documents; expected documents for all or for none")
        if documents_BxT is not None and self.documents_BxS is not None:
            documents_BxT = torch.cat([self.documents_BxS, documents_BxT], dim=-1)
        self.documents_BxS = documents_BxT
        return documents_BxT

    def extend_inputs(self, x_BxTxD: Tensor, back: int) -> Tensor:
        """The new tokens' embeddings behind those of up to `back` tokens before them; the last `back` are kept."""
        x_BxSxD = x_BxTxD if self.inputs_BxJxD is None else torch.cat([self.inputs_BxJxD, x_BxTxD], dim=1)
        self.inputs_BxJxD = x_BxSxD[:, -back:]
        return x_BxSxD
