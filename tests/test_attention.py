"""Attention kernels: all equal to the reference, the reference to its definition, and the right one is chosen."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from bytekiln import attention
from bytekiln.attention import (
    CAUSAL,
    Attend,
    KVCache,
    Sight,
    activate_flash,
    choose,
    flex_attention,
    look,
    native_attention,
    needs_mask,
    reference_attention,
    sdpa_attention,
    visible_keys,
)
from bytekiln.config import ModelConfig
from bytekiln.errors import ConfigError

CPU = torch.device("cpu")
UNCOMPILED = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def inputs(T: int, S: int, heads: tuple[int, int] = (4, 4), width: int = 16) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = ((heads[0], T), (heads[1], S), (heads[1], S))
    return [torch.randn(2, h, n, width, dtype=torch.float64, requires_grad=True) for h, n in shapes]


def documents(S: int) -> torch.Tensor:
    """Two rows of documents that end at different places, with numbers that come back."""
    rows = torch.tensor([[i * 3 // S for i in range(S)], [int(i > 1) + int(i > S // 2) for i in range(S)]])
    return rows.to(torch.int32)


SIGHTS = [
    Sight(),
    Sight(causal=False),
    Sight(window=1),
    Sight(window=3),
    Sight(causal=False, window=3),
    Sight(window=100),
    Sight(documents_BxS=documents(9)),
    Sight(causal=False, documents_BxS=documents(9)),
    Sight(window=4, documents_BxS=documents(9)),
]


@settings(max_examples=60)
@given(st.integers(1, 7), st.integers(0, 5), st.booleans(), st.integers(0, 9), st.data())
def test_visible_keys_are_their_definition(T: int, before: int, causal: bool, window: int, data: st.DataObject) -> None:
    S = T + before
    rows = data.draw(st.none() | st.lists(st.lists(st.integers(0, 2), min_size=S, max_size=S), min_size=2, max_size=2))
    sight = Sight(causal, window, None if rows is None else torch.tensor(rows, dtype=torch.int32))
    got = visible_keys(sight, T, S, CPU)
    assert got.shape == (1 if rows is None else 2, 1, T, S)
    for b, t, s in itertools.product(range(got.shape[0]), range(T), range(S)):
        place = before + t
        behind = causal and s > place
        too_far = window > 0 and place - s >= window
        elsewhere = rows is not None and rows[b][place] != rows[b][s]
        assert bool(got[b, 0, t, s]) == (not (behind or too_far or elsewhere))


def by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sight: Sight) -> torch.Tensor:
    """Attention one query at a time, over a list of the keys that it sees."""
    (B, H, T, K), (G, S) = q.shape, k.shape[1:3]
    visible = visible_keys(sight, T, S, CPU).expand(B, 1, T, S)
    out = torch.zeros_like(q)
    for b, h, t in itertools.product(range(B), range(H), range(T)):
        g = h * G // H
        seen = [s for s in range(S) if visible[b, 0, t, s]]
        weights = [math.exp(float(q[b, h, t] @ k[b, g, s]) / math.sqrt(K)) for s in seen]
        out[b, h, t] = sum(w / sum(weights) * v[b, g, s] for w, s in zip(weights, seen, strict=True))
    return out


@pytest.mark.parametrize("sight", SIGHTS)
def test_the_reference_is_its_formula(sight: Sight) -> None:
    with torch.no_grad():
        q, k, v = inputs(4, 9, (4, 2), width=4)
        torch.testing.assert_close(reference_attention(q, k, v, 0.0, sight), by_hand(q, k, v, sight))


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("T", [1, 5, 9])
@pytest.mark.parametrize("sight", SIGHTS)
def test_kernels_agree_and_so_do_their_gradients(sight: Sight, T: int, heads: tuple[int, int]) -> None:
    tensors = inputs(T, 9, heads)
    prepared = look(sdpa_attention, sight, T, 9, CPU)
    assert (prepared.mask is None) == (not needs_mask(sight, T, 9))
    outputs = [
        sdpa_attention(*tensors, 0.0, prepared),
        sdpa_attention(*tensors, 0.0, sight),
        reference_attention(*tensors, 0.0, look(reference_attention, sight, T, 9, CPU)),
    ]
    for out in outputs[:2]:
        torch.testing.assert_close(out, outputs[2])
    gradients = [torch.autograd.grad(out.square().sum(), tensors) for out in outputs]
    torch.testing.assert_close(gradients[0], gradients[2])
    torch.testing.assert_close(gradients[1], gradients[2])


class Told(TorchDispatchMode):
    """Notes of every attention kernel that runs its operator, and whether it was given a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.masked: list[bool] = []
        self.operators: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if "scaled_dot_product" in str(func) and "backward" not in str(func):
            self.operators.append(str(func))
            self.masked.append(kwargs.get("attn_mask") is not None)
        return func(*args, **kwargs)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("T", [1, 5, 9])
@pytest.mark.parametrize("sight", SIGHTS)
def test_the_core_agrees_and_so_do_its_gradients(sight: Sight, T: int, heads: tuple[int, int]) -> None:
    """In float32, which is all it knows; what it leaves to sdpa too."""
    tensors = inputs(T, 9, heads)
    exact = reference_attention(*tensors, 0.0, sight)
    gradients = torch.autograd.grad(exact.square().sum(), tensors)
    narrow = [x.detach().float().requires_grad_() for x in tensors]
    for prepared in (sight, look(native_attention, sight, T, 9, CPU)):
        out = native_attention(*narrow, 0.0, prepared)
        torch.testing.assert_close(out, exact.float())
        ours = torch.autograd.grad(out.square().sum(), narrow)
        torch.testing.assert_close(ours, tuple(x.float() for x in gradients), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("values", "native"),
    [
        ({}, True),
        ({"sight": Sight(window=4)}, True),
        ({"sight": Sight(documents_BxS=documents(9))}, False),
        ({"dropout": 0.5}, False),
        ({"dtype": torch.bfloat16}, True),
        ({"dtype": torch.float64}, False),
        ({"width": 12}, False),
        ({"T": 1}, False),
    ],
)
def test_what_the_core_leaves_to_sdpa(values: dict[str, object], native: bool) -> None:
    given = {"sight": CAUSAL, "dropout": 0.0, "dtype": torch.float32, "width": 16, "T": 9, **values}
    tensors = [x.detach().to(given["dtype"]) for x in inputs(given["T"], 9, width=given["width"])]
    with Told() as told:
        native_attention(*tensors, given["dropout"], given["sight"])
    assert any(name.startswith("bytekiln") for name in told.operators) == native


@UNCOMPILED
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("sight", SIGHTS)
def test_flex_agrees(sight: Sight, heads: tuple[int, int]) -> None:
    tensors = [x.detach().float() for x in inputs(9, 9, heads)]
    prepared = look(flex_attention, sight, 9, 9, CPU)
    assert prepared.blocks is not None
    expected = reference_attention(*tensors, 0.0, sight)
    torch.testing.assert_close(flex_attention(*tensors, 0.0, prepared), expected)
    behind_a_cache = [tensors[0][:, :, -3:], *tensors[1:]]
    prepared = look(flex_attention, sight, 3, 9, CPU)
    expected = reference_attention(*behind_a_cache, 0.0, sight)
    torch.testing.assert_close(flex_attention(*behind_a_cache, 0.0, prepared), expected)


@UNCOMPILED
def test_flex_agrees_over_several_blocks() -> None:
    """FlexAttention's blocks are 128 wide: a window and documents that leave whole blocks out."""
    T = 300
    tensors = [x.detach().float() for x in inputs(T, T)]
    ends = torch.tensor([[i // 140 for i in range(T)], [i // 77 for i in range(T)]], dtype=torch.int32)
    sight = Sight(window=90, documents_BxS=ends)
    prepared = look(flex_attention, sight, T, T, CPU)
    assert prepared.blocks is not None and prepared.blocks.sparsity() > 30
    expected = reference_attention(*tensors, 0.0, sight)
    torch.testing.assert_close(flex_attention(*tensors, 0.0, prepared), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("sight", SIGHTS)
def test_flex_agrees_on_cuda_in_its_gradients_too(sight: Sight, heads: tuple[int, int]) -> None:
    device = torch.device("cuda")
    tensors = [x.detach().float().to(device).requires_grad_() for x in inputs(9, 9, heads)]
    if sight.documents_BxS is not None:
        sight = sight._replace(documents_BxS=sight.documents_BxS.to(device))
    outputs = [f(*tensors, 0.0, look(f, sight, 9, 9, device)) for f in (flex_attention, reference_attention)]
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-3)  # TF32
    gradients = [torch.autograd.grad(out.square().sum(), tensors) for out in outputs]
    torch.testing.assert_close(*gradients, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("sight", "T", "S", "masked"),
    [
        (Sight(), 9, 9, False),
        (Sight(), 1, 9, False),
        (Sight(), 3, 9, True),
        (Sight(causal=False), 9, 9, False),
        (Sight(window=4), 9, 9, True),
        (Sight(window=4), 1, 9, False),
        (Sight(window=9), 9, 9, False),
        (Sight(documents_BxS=documents(9)), 9, 9, True),
    ],
)
def test_no_mask_where_none_is_needed(sight: Sight, T: int, S: int, masked: bool) -> None:
    tensors = [x.detach().float() for x in inputs(T, S)]
    with Told() as told:
        sdpa_attention(*tensors, 0.0, sight)
    assert told.masked == [masked]


def halved_at_random(after: torch.Tensor, before: torch.Tensor) -> bool:
    """Every element is dropped or doubled, and there are many of both kinds."""
    dropped, kept = after == 0, torch.isclose(after, 2 * before, rtol=1e-4, atol=1e-6)
    share = float(dropped.double().mean())
    return bool((dropped | kept).all()) and 0.3 < share < 0.7


@pytest.mark.parametrize("attend", [native_attention, sdpa_attention, reference_attention])
@pytest.mark.parametrize("T", [1, 16, 32])
@pytest.mark.parametrize("sight", [CAUSAL, Sight(window=20)])
def test_attention_drops_its_weights(attend: Attend, T: int, sight: Sight) -> None:
    """Queries of zero weigh every visible key alike; values that are the unit matrix show the weights."""
    torch.manual_seed(0)
    q, k = torch.zeros(8, 4, T, 32), torch.zeros(8, 4, 32, 32)
    v = torch.eye(32).expand(8, 4, 32, 32)
    visible = visible_keys(sight, T, 32, CPU).expand(8, 4, T, 32)
    dropped, whole = attend(q, k, v, 0.5, sight), attend(q, k, v, 0.0, sight)
    assert halved_at_random(dropped[visible], whole[visible])
    assert not dropped[~visible].any() and not whole[~visible].any()
    torch.testing.assert_close(whole.sum(-1), torch.ones(8, 4, T))


WIDE = ModelConfig(vocab_size=50, d_model=64, num_layers=1, num_heads=4, context_length=8)


def changed(**values: object) -> ModelConfig:
    return ModelConfig(**{**WIDE.model_dump(), **values})


def test_the_chosen_kernel() -> None:
    cuda, windowed = torch.device("cuda"), changed(sliding_window=4)
    assert choose("auto", WIDE, CPU, False) is native_attention
    assert choose("auto", windowed, CPU, False) is native_attention
    assert choose("auto", windowed, CPU, True) is sdpa_attention
    assert choose("auto", changed(dropout=0.1), CPU, False) is sdpa_attention
    assert choose("auto", changed(dropout=0.1, attention_dropout=False), CPU, False) is native_attention
    assert choose("sdpa", WIDE, CPU, False) is sdpa_attention
    assert choose("native", WIDE, CPU, False) is native_attention
    assert choose("auto", WIDE, cuda, False) is sdpa_attention
    assert choose("auto", WIDE, cuda, True) is flex_attention
    assert choose("auto", windowed, cuda, False) is flex_attention
    assert choose("auto", changed(sliding_window=4, dropout=0.1), cuda, True) is sdpa_attention
    assert choose("auto", changed(num_heads=8), cuda, True) is sdpa_attention
    assert choose("flex", WIDE, cuda, False) is flex_attention
    assert choose("sdpa", windowed, cuda, True) is sdpa_attention
    assert choose("reference", WIDE, CPU, True) is reference_attention


@pytest.mark.parametrize(
    ("values", "device", "why"),
    [
        ({}, "cpu", "on cpu, where FlexAttention has no backward; expected sdpa or auto"),
        ({}, "mps", "on mps, where"),
        ({"dropout": 0.1}, "cuda", r"with dropout 0\.1, which FlexAttention does not have"),
        ({"num_heads": 8}, "cuda", "with heads 8 wide; FlexAttention needs 16"),
    ],
)
def test_flex_is_refused_where_it_cannot_train(values: dict[str, object], device: str, why: str) -> None:
    with pytest.raises(ConfigError, match=f"attention: found flex {why}"):
        choose("flex", changed(**values), torch.device(device), True)


@pytest.mark.parametrize(
    ("values", "device", "documents", "why"),
    [
        ({}, "cuda", False, "on cuda; the core computes on the CPU"),
        ({"dropout": 0.1}, "cpu", False, r"with dropout 0\.1, which the core does not have"),
        ({}, "cpu", True, "with document_mask, which"),
        ({"d_model": 48}, "cpu", False, "with heads 12 wide; the core takes multiples of 8 up to 128"),
    ],
)
def test_native_is_refused_where_it_would_not_run(
    values: dict[str, object], device: str, documents: bool, why: str
) -> None:
    with pytest.raises(ConfigError, match=f"attention: found native {why}"):
        choose("native", changed(**values), torch.device(device), documents)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [0, 5])
def test_native_takes_narrow_types_there_and_back(dtype: torch.dtype, window: int) -> None:
    """The core's float32 result and gradients, rounded: no kernel for such a type is nearer."""
    sight = Sight(window=window)
    narrow = [x.detach().to(dtype).requires_grad_() for x in inputs(9, 9)]
    wide = [x.detach().float().requires_grad_() for x in narrow]
    found, expected = native_attention(*narrow, sight=sight), reference_attention(*wide, sight=sight)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    found.float().sum().backward()
    expected.sum().backward()
    for x, exact in zip(narrow, wide, strict=True):
        assert x.grad is not None and exact.grad is not None
        torch.testing.assert_close(x.grad, exact.grad.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


def test_flex_has_no_backward_on_the_cpu_still() -> None:
    """The reason for refusing it; once this fails, `choose` may offer it."""
    with pytest.raises(NotImplementedError, match="backward on CPU"):
        flex_attention(*(x.float() for x in inputs(9, 9)))


def test_a_cache_grows() -> None:
    cache = KVCache(2)
    assert len(cache) == 0
    x = torch.arange(24.0).view(1, 2, 3, 4)
    for layer in range(2):
        cache.extend(layer, x[:, :, :1], -x[:, :, :1])
        k, v = cache.extend(layer, x[:, :, 1:], -x[:, :, 1:])
        assert torch.equal(k, x) and torch.equal(v, -x)
    assert len(cache) == 3


def test_a_cache_remembers_documents() -> None:
    cache, x = KVCache(1), torch.zeros(1, 2, 3, 4)
    first = torch.tensor([[0, 0, 1]], dtype=torch.int32)
    assert torch.equal(cache.extend_documents(first), first)
    cache.extend(0, x, x)
    assert cache.extend_documents(first).tolist() == [[0, 0, 1, 0, 0, 1]]
    with pytest.raises(ConfigError, match="tokens with and without documents"):
        cache.extend_documents(None)


def test_masks_are_made_once_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    from bytekiln.model import TransformerLM

    made: list[int] = []
    whole = attention.visible_keys
    monkeypatch.setattr(attention, "visible_keys", lambda *args: made.append(1) or whole(*args))
    model = TransformerLM(changed(sliding_window=4, num_layers=3), attend=sdpa_attention)
    model(torch.zeros(1, 8, dtype=torch.int64))
    assert len(made) == 1
    model = TransformerLM(changed(sliding_window=4, num_layers=3))
    model(torch.zeros(1, 8, dtype=torch.int64))
    assert len(made) == 1  # the core needs none
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.zeros(1, 8, dtype=torch.int64))
    assert len(made) == 1  # nor in bf16
    model(torch.zeros(1, 8, dtype=torch.int64), documents_BxT=torch.zeros(1, 8, dtype=torch.int32))
    assert len(made) == 2


# --- another FlashAttention, on devices that are not here ---


@pytest.mark.parametrize(
    ("wanted", "capability", "installed", "active"),
    [
        ("auto", (9, 0), {"FA3", "FA4"}, "FA3"),
        ("auto", (9, 0), {"FA4"}, "FA4"),
        ("auto", (10, 0), {"FA3", "FA4"}, "FA4"),
        ("auto", (8, 0), {"FA3", "FA4"}, "torch"),
        ("auto", (9, 0), set(), "torch"),
        ("FA4", (9, 0), {"FA3", "FA4"}, "FA4"),
        ("torch", (9, 0), {"FA3"}, "torch"),
    ],
)
def test_another_flash_attention_where_one_is_installed(
    monkeypatch: pytest.MonkeyPatch, wanted: str, capability: tuple[int, int], installed: set[str], active: str
) -> None:
    made: list[str] = []

    def activate(name: str) -> None:
        if name not in installed:
            raise ModuleNotFoundError(name)
        made.append(name)

    monkeypatch.setattr("torch.nn.attention.activate_flash_attention_impl", activate)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    cuda, model = torch.device("cuda", 0), ModelConfig(d_model=64, num_heads=2)
    assert activate_flash(wanted, model, cuda, "bf16") == active
    assert made == ([active] if active != "torch" else [])


def test_a_flash_attention_that_cannot_be_had_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    cuda, cpu, model = torch.device("cuda", 0), torch.device("cpu"), ModelConfig(d_model=64, num_heads=2)
    wet = ModelConfig(d_model=64, num_heads=2, dropout=0.1)
    for device, config, precision, why in (
        (cpu, model, "bf16", "found FA3 on cpu; it is for CUDA"),
        (cuda, model, "fp32", "found FA3 in fp32; it computes in bf16"),
        (cuda, wet, "bf16", "found FA3 with dropout 0.1"),
        (cuda, model, "bf16", "found FA3 which is not installed"),  # torch's own registry, without the package
    ):
        with pytest.raises(ConfigError, match=why):
            activate_flash("FA3", config, device, precision)
        assert activate_flash("auto", config, device, precision) == "torch"
