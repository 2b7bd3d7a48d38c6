"""A module with one parameter of every kind, named as the Transformer's are; and a watch for host syncs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

SHAPES: dict[str, tuple[int, ...]] = {
    "token_embeddings.weight": (20, 8),
    "position_embeddings.weight": (6, 8),
    "ln_embedding.weight": (8,),
    "residual_lambdas": (2,),
    "shift_lambdas": (3, 8),
    "layers.0.ln1.weight": (8,),
    "layers.0.attn.q_proj.weight": (8, 8),
    "layers.0.attn.q_proj.bias": (8,),
    "layers.0.attn.k_proj.weight": (4, 8),
    "layers.0.attn.output_proj.weight": (8, 8),
    "layers.0.ffn.w1.weight": (12, 8),
    "layers.0.ffn.w2.weight": (8, 12),
    "layers.1.attn.value_embeddings.weight": (20, 4),
    "layers.1.attn.value_gate.weight": (2, 8),
    "layers.1.ffn.router.weight": (3, 8),
    "layers.1.ffn.experts_w1": (3, 12, 8),
    "layers.1.ffn.experts_w2": (3, 8, 12),
    "layers.1.ffn.shared.w1.weight": (12, 8),
    "lm_head.weight": (20, 8),
}
KINDS = {
    "token_embeddings.weight": "embedding",
    "position_embeddings.weight": "embedding",
    "layers.1.attn.value_embeddings.weight": "embedding",
    "ln_embedding.weight": "scalar",
    "residual_lambdas": "scalar",
    "shift_lambdas": "scalar",
    "layers.0.ln1.weight": "scalar",
    "layers.0.attn.q_proj.bias": "scalar",
    "layers.1.attn.value_gate.weight": "gate",
    "layers.1.ffn.router.weight": "gate",
    "lm_head.weight": "head",
}
"""All others are matrices."""


def named_model(seed: int = 0) -> nn.Module:
    """The module; its weights depend on the seed alone."""
    torch.manual_seed(seed)
    root = nn.Module()
    for name, shape in SHAPES.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(last, nn.Parameter(torch.randn(shape) * 0.5))
    return root


def fill_gradients(model: nn.Module, seed: int, size: float = 1.0) -> None:
    """New normal gradients, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for _, p in sorted(model.named_parameters()):
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype) * size


def bits(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    """What is stored, so that -0.0 differs from 0.0 and NaN equals itself."""
    return {n: t.detach().contiguous().numpy().tobytes() for n, t in tensors.items()}


class NoSync(TorchDispatchMode):
    """Refuses what makes the host wait for a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        assert not name.startswith(("aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.equal")), name
        return func(*args, **(kwargs or {}))
