"""Hugging Face's weights of GPT-2 and Llama: their names and layouts against ours (docs/weights.md has the tables).

In: a folder with `model.safetensors`, or shards and their index. Out: a state dict of ours; and back, their tensors.
Called by `convert`. No pickle is ever opened.

Shapes: D model width, K head width, V vocabulary.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Set
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from bytekiln.config import ModelConfig
from bytekiln.errors import FileError, FormatError

LLAMA_TOP = {"token_embeddings": "model.embed_tokens", "ln_final": "model.norm", "lm_head": "lm_head"}
LLAMA_LAYER = {
    "ln1": "input_layernorm",
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "ln2": "post_attention_layernorm",
    "ffn.w1": "mlp.gate_proj",
    "ffn.w3": "mlp.up_proj",
    "ffn.w2": "mlp.down_proj",
}
GPT2_TOP = {
    "token_embeddings": "transformer.wte",
    "position_embeddings": "transformer.wpe",
    "ln_final": "transformer.ln_f",
    "lm_head": "lm_head",
}
GPT2_LAYER = {
    "ln1": "ln_1",
    "attn.q_proj": "attn.c_attn",
    "attn.k_proj": "attn.c_attn",
    "attn.v_proj": "attn.c_attn",
    "attn.output_proj": "attn.c_proj",
    "ln2": "ln_2",
    "ffn.w1": "mlp.c_fc",
    "ffn.w2": "mlp.c_proj",
}
UNUSED = re.compile(
    r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias|(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
)
"""Masks and tables that old files carry among the weights."""
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of `model.safetensors`, or of the shards that its index names, as fp32.

    Raises:
        FileError: a file is missing.
        FormatError: a pickle, a damaged file, or quantised weights.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    names = {} if single.is_file() or not index.is_file() else _read_index(index)
    if not names and not single.is_file():
        pickle = next((p for p in sorted(folder.iterdir()) if p.suffix in PICKLES), None)
        if pickle is not None:
            raise FormatError(f"{pickle}: found a pickle, which is never opened; expected model.safetensors")
        raise FileError(f"{single}: no such file; expected the weights beside config.json")
    tensors: dict[str, Tensor] = {}
    for file in [folder / f for f in sorted(set(names.values()))] or [single]:
        try:
            tensors.update(safetensors.torch.load_file(file))
        except FileNotFoundError:
            raise FileError(f"{file}: no such file; expected this shard, which {index.name} names") from None
        except (OSError, SafetensorError) as exc:
            raise FormatError(f"{file}: {exc}; expected a whole safetensors file") from None
    missing = next((n for n in names if n not in tensors), None)
    if missing is not None:
        raise FormatError(f"{folder}: found no {missing}; expected it, since {index.name} names it")
    for name in [n for n in tensors if UNUSED.fullmatch(n)]:
        del tensors[name]
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise FormatError(f"{folder}: {name}: found type {tensor.dtype}; expected floats, not quantised ones")
        tensors[name] = tensor.float()
    return tensors


def _read_index(index: Path) -> dict[str, str]:
    """The file of each tensor; files lie beside the index."""
    try:
        names = json.loads(index.read_bytes())["weight_map"]
        if names and all(isinstance(f, str) and Path(f).name == f for f in names.values()):
            return dict(names)
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    except OSError as exc:
        raise FileError(f"{index}: {(exc.strerror or 'unreadable').lower()}; expected a readable file") from None
    raise FormatError(f"{index}: found no weight_map; expected the name of a file beside it for each tensor")


def _modules(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """Every module with weights: our name and theirs."""
    gpt2 = config.position == "learned"
    for ours, theirs in (GPT2_TOP if gpt2 else LLAMA_TOP).items():
        if ours != "lm_head" or not config.tie_embeddings:
            yield ours, theirs
    for i in range(config.num_layers):
        stem = f"transformer.h.{i}" if gpt2 else f"model.layers.{i}"
        for ours, theirs in (GPT2_LAYER if gpt2 else LLAMA_LAYER).items():
            yield f"layers.{i}.{ours}", f"{stem}.{theirs}"


def _has_bias(ours: str, config: ModelConfig) -> bool:
    """Whether a module of ours has a bias: linear layers of the blocks, and LayerNorm."""
    return config.bias and (_is_linear(ours) or (config.norm == "layer" and ours.rpartition(".")[2].startswith("ln")))


def _is_linear(ours: str) -> bool:
    return ".attn." in ours or ".ffn." in ours


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Rows of q_proj or k_proj (or their bias) from half-split to interleaved rotary pairs.

    Llama in `transformers` turns the pairs (i, i + K/2) of a head, ours (2i, 2i + 1); the angle of pair i is the same.
    """
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def half_split(rows: Tensor, heads: int) -> Tensor:
    """The inverse of `interleaved`."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def from_huggingface(
    tensors: Mapping[str, Tensor], config: ModelConfig, where: str, without_biases: Set[str] = frozenset()
) -> dict[str, Tensor]:
    """Our state dict of a model of theirs, with V rows of vocabulary.

    Args:
        tensors: as their file names them, with the prefix `model.` or `transformer.` or without.
        config: what `implied` says of it.
        where: for errors.
        without_biases: parts of a layer (`attn`, `ffn`) that have none there; where ours have, they are 0.

    Raises:
        FormatError: a weight is missing, has another shape, or belongs to no such model.
    """
    gpt2 = config.position == "learned"
    prefix = "transformer." if gpt2 else "model."
    left = {n if n.startswith((prefix, "lm_head.")) else prefix + n: t for n, t in tensors.items()}
    if config.tie_embeddings:
        left.pop("lm_head.weight", None)
    used: set[str] = set()
    out: dict[str, Tensor] = {}
    for ours, theirs in _modules(config):
        for kind in ("weight", "bias") if _has_bias(ours, config) else ("weight",):
            name = f"{theirs}.{kind}"
            if kind == "bias" and not without_biases.isdisjoint(ours.split(".")):
                out[f"{ours}.bias"] = torch.zeros(len(out[f"{ours}.weight"]))
                continue
            tensor = left.get(name)
            if tensor is None:
                raise FormatError(f"{where}: found no {name}; expected it in this model")
            used.add(name)
            out[f"{ours}.{kind}"] = _ours(tensor, ours, config, f"{where}: {name}")
    spare = next((n for n in left if n not in used), None)
    if spare is not None:
        raise FormatError(f"{where}: found {spare}; expected no such weight in this model")
    return out


def _ours(tensor: Tensor, ours: str, config: ModelConfig, where: str) -> Tensor:
    """One tensor as our module `ours` holds it."""
    part = ours.rpartition(".")[2]
    if config.position == "learned":
        if _is_linear(ours) and tensor.ndim == 2:
            tensor = tensor.mT  # Conv1D holds in x out
        if part in ("q_proj", "k_proj", "v_proj"):
            if len(tensor) != 3 * config.d_model:
                raise FormatError(f"{where}: found {len(tensor)} outputs; expected {3 * config.d_model}, q, k and v")
            tensor = tensor.chunk(3)["qkv".index(part[0])].clone()
    elif part in ("q_proj", "k_proj"):
        heads, rows = (config.num_heads, config.d_model) if part == "q_proj" else (config.num_kv_heads, config.kv_width)
        if len(tensor) != rows:
            raise FormatError(f"{where}: found {len(tensor)} outputs; expected {rows}")
        tensor = interleaved(tensor, heads)
    return tensor.contiguous()


def to_huggingface(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Their tensors of `TransformerLM(config)`, without rows of padding: the inverse of `from_huggingface`.

    Raises nothing for a model that they do not have: `hf_config.described` does.
    """
    gpt2 = config.position == "learned"
    out: dict[str, Tensor] = {}
    for ours, theirs in _modules(config):
        part = ours.rpartition(".")[2]
        weight = state[f"{ours}.weight"].detach().float()
        tensors = {"weight": weight[: config.vocab_size] if part in ("token_embeddings", "lm_head") else weight}
        if _has_bias(ours, config):
            tensors["bias"] = state[f"{ours}.bias"].detach().float()
        elif gpt2 and (_is_linear(ours) or part.startswith("ln")):
            tensors["bias"] = torch.zeros(len(weight))  # GPT-2 always has them
        for kind, tensor in tensors.items():
            name = f"{theirs}.{kind}"
            if not gpt2 and part in ("q_proj", "k_proj"):
                tensor = half_split(tensor, config.num_heads if part == "q_proj" else config.num_kv_heads)
            if gpt2 and _is_linear(ours) and kind == "weight":
                tensor = tensor.mT
            if theirs.endswith("c_attn") and name in out:  # q, then k, then v
                tensor = torch.cat([out[name], tensor], dim=-1)
            out[name] = tensor.contiguous().clone()
    return out
