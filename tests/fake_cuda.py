"""Whole training steps on tensors of a CUDA device that is not there: shapes, types and devices, no contents.

torch's fake tensors of CUDA know a forward pass only: autograd's engine is C++, asks each tensor for its device, and
wants that device's streams and context. Here C++ is told "cpu" and Python, all of ours and the rules by which an
operation's result is made, "cuda". So every branch for CUDA is taken, an operation on tensors of two devices fails,
and so does whatever would wait for a value. Not traced: what torch's C++ chooses by the device (the kernel of
attention, which is therefore named here, and autocast, whose list of operations is the CPU's) and the kernels.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch._dynamo  # before anything below is replaced: it compares signatures
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention import flex_attention
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")


def attention_on_cuda(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, *, is_causal: bool, enable_gqa: bool
) -> Tensor:
    """As torch chooses on an H100: the flash kernel, with a mask the memory-efficient one, which has no GQA."""
    if mask is None:
        found = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout, is_causal)
        return found[0]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) if enable_gqa else x for x in (k, v))
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, float("-inf"))
    bias = bias.expand(q.shape[0], q.shape[1], -1, -1)
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, dropout)[0]


@contextmanager
def autocast(device: str, dtype: torch.dtype | None = None, enabled: bool = True) -> Iterator[None]:
    """Autocast for both: C++ looks for the CPU's, Python asks for CUDA's."""
    assert device == "cuda", device
    was = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    with torch.amp.autocast_mode.autocast("cpu", dtype, enabled):
        torch.set_autocast_enabled("cuda", enabled)
        torch.set_autocast_dtype("cuda", dtype or was[1])
        try:
            yield
        finally:
            torch.set_autocast_enabled("cuda", was[0])
            torch.set_autocast_dtype("cuda", was[1])


class OptionsOfCuda(TorchDispatchMode):
    """What C++ makes "as this tensor" it asks for on the device that it was told. Also counts what is called."""

    supports_higher_order_operators = True  # FlexAttention is one

    def __init__(self) -> None:
        super().__init__()
        self.called: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == CPU:
            kwargs["device"] = CUDA
        self.called[func.name().removeprefix("aten::").partition(".")[0]] += 1
        return func(*args, **kwargs)


class NothingOnCpu(TorchFunctionMode):
    """So that the line above hides nothing: what our own code makes, it makes on a device that it names."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if sys._getframe(1).f_globals["__name__"].startswith("bytekiln"):
            asked = [str(x) for x in (*args, *(kwargs or {}).values()) if isinstance(x, torch.device | str)]
            assert func is not torch.Tensor.cpu and "cpu" not in asked, f"{func} on the CPU"
            assert asked or func not in _device_constructors(), f"{func} without a device"
        return func(*args, **(kwargs or {}))


@contextmanager
def fake_cuda() -> Iterator[Counter[str]]:
    """In here CUDA tensors can be made and differentiated. Gives how often each operation was called."""
    handlers, ask = fake_tensor._DISPATCH_META_HANDLERS, torch.ops.prim.device.default
    told, made = handlers[ask], torch.Tensor._make_subclass

    def tell(args: tuple[Tensor, ...]) -> torch.device:
        device = told(args)
        return CPU if device.type == "cuda" else device

    def make(*args: object, device_for_backend_keys: object = None, **more: object) -> Tensor:
        return made(*args, device_for_backend_keys=CPU, **more)

    FakeTensorMode.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(handlers, ask, tell)
        patch.setattr(torch.Tensor, "_make_subclass", staticmethod(make))
        patch.setattr(FakeTensor, "is_cuda", property(lambda self: self.device.type == "cuda"), raising=False)
        patch.setattr(FakeTensor, "is_cpu", property(lambda self: self.device.type == "cpu"), raising=False)
        patch.setattr(torch.Tensor, "is_pinned", lambda _: True)
        patch.setattr(torch, "autocast", autocast)
        patch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
        patch.setattr(F, "scaled_dot_product_attention", attention_on_cuda)
        patch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
        with FakeTensorMode(allow_non_fake_inputs=True), OptionsOfCuda() as options, NothingOnCpu():
            yield options.called
    FakeTensorMode.cache_clear()
    torch._dynamo.reset()
