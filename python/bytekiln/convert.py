"""Weights to start a new run from (`--init-from`), and weights for `transformers`.

In: a run of ours, a checkpoint, or a folder of Hugging Face's layout of GPT-2 or Llama (`hf_config`, `hf_weights`),
and the model that is to take them. Out: its state dict, or an error that names the field which disagrees; and the way
back. Called by `prepare`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bytekiln.checkpoint import Checkpoint, is_checkpoint, weights_of
from bytekiln.config import ModelConfig
from bytekiln.errors import FileError, FormatError, MismatchError
from bytekiln.hf_config import described, implied, without_biases
from bytekiln.hf_weights import PICKLES, from_huggingface, read_weights, to_huggingface
from bytekiln.model import TransformerLM
from bytekiln.section import Value

Notice = Callable[[str], object]

FREE = {
    "context_length", "max_seq_len", "dropout", "attention_dropout", "pad_vocab", "ffn_multiple", "dense_twin",
    "init", "head_init", "zero_init_projections",
    "router_noise", "load_balancing", "load_balancing_weight",
}  # fmt: skip
"""Fields that may differ between weights and model: they change neither the shapes nor what a trained weight means."""
NOTICED = {"causal", "logit_softcap", "sliding_window", "expert_top_k"}
"""Fields that change the function and fit the weights still; a difference is said in a line."""


def load_initial(
    path: str, config: ModelConfig, notice: Notice = lambda _: None, say: Notice = lambda _: None
) -> dict[str, Tensor]:
    """Weights for a new `TransformerLM(config)`: `--init-from`.

    Args:
        path: a run folder (its best checkpoint, else its newest whole one), a checkpoint, or a folder with
            `config.json` and `model.safetensors` (or shards and their index) of GPT-2 or Llama.
        config: the model that takes them; `vocab_size` is set.
        notice: told, in a line each, what differs and fits still.
        say: told which checkpoint of a run it is.

    Returns:
        A whole state dict, fp32 on the CPU. Rows of padding (`pad_vocab`) are the mean of the real ones: so their
        share of a softmax that sees them stays below their share of the rows (Jensen).

    Raises:
        MismatchError: names the first field of `config` that disagrees with the weights.
        FileError, FormatError: nothing there, malformed, of another kind, or a pickle.
    """
    theirs, read = _source(Path(path), notice, say)
    _compare(config, theirs, path, notice)
    state = read()
    return _fitted(state, config, theirs, path)


def config_of(path: str | Path, notice: Notice = lambda _: None) -> dict[str, Value]:
    """The `ModelConfig` fields that a folder of Hugging Face's layout, a run or a checkpoint implies.

    `ModelConfig(context_length=…, **config_of(path))` is a model that `load_initial` fills. Fields that weights say
    nothing of (`FREE`) are left out, `max_seq_len` excepted.

    Raises:
        FileError, FormatError: as `load_initial`.
    """
    theirs, _ = _source(Path(path), notice)
    names = [n for n in ModelConfig.model_fields if n not in FREE or n == "max_seq_len"]
    return {n: getattr(theirs, n) for n in names if n != "causal" or theirs.bidirectional}


def export(
    state: Mapping[str, Tensor], config: ModelConfig, *, eot_id: int | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and `config.json` with which `transformers` computes the same logits.

    A model with learned positions becomes a GPT-2, one with rotary positions a Llama. Write the tensors with
    `safetensors.torch.save_file(tensors, "model.safetensors", metadata={"format": "pt"})`.

    Args:
        state: state dict of `TransformerLM(config)`.
        config: its shape.
        eot_id: the end-of-text token, where there is one.

    Raises:
        ConfigError: names the first field that their model does not have.
    """
    described_so = described(config, eot_id)
    return to_huggingface(state, config), described_so


def _source(
    path: Path, notice: Notice, say: Notice = lambda _: None
) -> tuple[ModelConfig, Callable[[], dict[str, Tensor]]]:
    """The shape of the weights at `path`, and how to read them."""
    if path.is_file():
        raise FormatError(
            f"{path}: found a file; expected a run, a checkpoint, or a folder with config.json and model.safetensors"
            + (" (pickles are never opened)" if path.suffix in PICKLES else "")
        )
    if (path / "config.json").is_file():
        theirs = implied(path / "config.json")
        none = without_biases(path / "config.json")
        return theirs, lambda: from_huggingface(read_weights(path), theirs, str(path), none)
    if path.is_dir() and any(path.glob("*.safetensors")) and not is_checkpoint(path):
        raise FileError(f"{path / 'config.json'}: no such file; expected it beside the weights")
    checkpoint = _own_weights(path, notice)
    say(f"Weights: {checkpoint.path}, step {checkpoint.step}")
    return checkpoint.config.model, lambda: checkpoint.model


def _own_weights(path: Path, notice: Notice) -> Checkpoint:
    try:
        return weights_of(path, notice)
    except FileError as exc:
        if path.exists():
            raise
        raise FileError(f"{exc}, or a folder with config.json and model.safetensors; nothing is downloaded") from None


def _compare(config: ModelConfig, theirs: ModelConfig, where: str, notice: Notice) -> None:
    """Refuse the first field that disagrees; say what changes the function only."""
    for name in ModelConfig.model_fields:
        found, expected = getattr(config, name), getattr(theirs, name)
        if found == expected or name in FREE or (name == "rope_theta" and config.position != "rope"):
            continue
        if name == "causal" and config.bidirectional == theirs.bidirectional:
            continue
        if name not in NOTICED:
            raise MismatchError(f"{name}: found {_said(found)}; expected {_said(expected)}, that of {where}")
        notice(f"{name}: found {_said(found)}; the weights of {where} were trained with {_said(expected)}")
    found, expected = config.max_seq_len, theirs.max_seq_len
    if config.position == "learned" and found > expected:
        raise MismatchError(f"max_seq_len: found {found}; expected at most {expected}, the positions of {where}")
    if config.position == "learned" and found < expected:
        notice(f"max_seq_len: found {found}; the first so many of the {expected} positions of {where} are taken")
    elif found > expected:
        notice(f"max_seq_len: found {found}; the weights of {where} were trained on {expected} positions")


def _said(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _fitted(state: Mapping[str, Tensor], config: ModelConfig, theirs: ModelConfig, where: str) -> dict[str, Tensor]:
    """The state dict with the rows that `config` wants, every name and shape checked against the model itself."""
    with torch.device("meta"):
        wanted = {name: tensor.shape for name, tensor in TransformerLM(config).state_dict().items()}
    out: dict[str, Tensor] = {}
    for name, shape in wanted.items():
        tensor = state.get(name)
        if tensor is None and name.endswith("router_bias"):
            tensor = torch.zeros(shape)
        if tensor is None:
            raise FormatError(f"{where}: found no {name}; expected it with shape {_shape(shape)}")
        by_vocabulary = name == "lm_head.weight" or name.endswith(
            ("token_embeddings.weight", "value_embeddings.weight")
        )
        if by_vocabulary and len(tensor) != shape[0] and len(tensor) >= theirs.vocab_size:
            real_VxD = tensor[: theirs.vocab_size].float()
            pad_PxD = real_VxD.mean(dim=0, keepdim=True).expand(max(shape[0] - len(real_VxD), 0), -1)
            tensor = torch.cat([real_VxD, pad_PxD])
        if name == "position_embeddings.weight":
            tensor = tensor[: shape[0]]
        if tensor.shape != shape:
            raise FormatError(f"{where}: {name}: found shape {_shape(tensor.shape)}; expected {_shape(shape)}")
        out[name] = tensor.float().contiguous()
    spare = [n for n in state if n not in wanted and not n.endswith("router_bias")]
    if spare:
        raise FormatError(f"{where}: found {spare[0]}; expected no such weight")
    return out


def _shape(shape: torch.Size) -> str:
    return " x ".join(map(str, shape))
