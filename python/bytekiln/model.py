"""A Transformer language model, to be read from top to bottom.

In: token ids. Out: logits, or the features before the head. It knows neither loss nor optimizer nor tokenizer;
`objective`, `train` and `sample` call it. The base is the one of Stanford's CS336 and of Llama: pre-norm RMSNorm,
rotary positions, SwiGLU, no biases; every other choice is a field of `ModelConfig`. Parameter names are the course's,
so that its state dicts load without renaming; V is the vocabulary, padded with `pad_vocab`, G the heads of keys and
values:

    token_embeddings.weight                      V × D
    position_embeddings.weight                   P × D     (learned positions)
    shift_lambdas                                J × D     (token_shift)
    ln_embedding.weight                          D         (embedding_norm)
    residual_lambdas, x0_lambdas                 L         (residual_lambdas)
    layers.{i}.ln1.weight, layers.{i}.ln2.weight D         (nothing without norm)
    layers.{i}.attn.{q,output}_proj.weight       D × D
    layers.{i}.attn.{k,v}_proj.weight            G·K × D
    layers.{i}.attn.value_embeddings.weight      V × G·K   (value_embeddings; every second layer, the last among them)
    layers.{i}.attn.value_gate.weight            G × min(32, D)
    layers.{i}.ffn.w1.weight, w3.weight          F × D     (w3 only in swiglu)
    layers.{i}.ffn.w2.weight                     D × F
    layers.{i}.ffn.router.weight                 E × D     (moe, and the five below)
    layers.{i}.ffn.experts_w1, experts_w3        E × F × D (experts_w3 only for swiglu experts)
    layers.{i}.ffn.experts_w2                    E × D × F
    layers.{i}.ffn.shared.w1.weight, …           as a feed-forward (num_shared_experts)
    layers.{i}.ffn.router_bias                   E         (a buffer; load_balancing = bias)
    ln_final.weight                              D
    lm_head.weight                               V × D     (absent when embeddings are tied)

With `bias` every projection but the head, the router, the gates and the experts has one, and every LayerNorm.

Shapes are suffixes of names: B batch, T time (window position), D model width, H heads, G heads of keys and values,
K head width, F feed-forward width, V vocabulary, S keys in sight (T plus what a cache holds), P positions, L layers,
J tokens back; for experts: N tokens (B·T), E experts, M = N·top_k pieces of work.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor, nn

from bytekiln import kernels
from bytekiln.attention import Attend, KVCache, Sight, look, native_attention
from bytekiln.block import Kind, block, is_taken_apart
from bytekiln.config import ModelConfig
from bytekiln.errors import ConfigError
from bytekiln.linear import NOTHING, Before, added, are_plain, is_untouched, linear, of_one, parameters_of, takes
from bytekiln.norms import norm_of, rms_norm
from bytekiln.positions import RotaryEmbedding, add_previous

__all__ = ["Features", "KVCache", "RotaryEmbedding", "TransformerLM"]

GATE_WIDTH = 32
"""Places of a layer's input that the gates of its value embeddings read."""


class Pass:
    """What every layer is told in one pass, and where the experts' layers leave their figures.

    A plain object: FSDP takes tuples, lists and dataclasses among a layer's arguments apart and hands over copies, in
    which figures and their gradients would be lost.
    """

    def __init__(self, ids_BxT: Tensor, sight: Sight, cache: KVCache | None = None, start: int = 0) -> None:
        """`start` tokens are in the cache before this pass."""
        self.ids_BxT, self.sight, self.cache, self.start = ids_BxT, sight, cache, start
        self.balances: list[Tensor] = []
        self.loads_E: list[Tensor] = []


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, config: ModelConfig, layer: int, attend: Attend, rotary: RotaryEmbedding | None) -> None:
        """`attend` does the arithmetic; `rotary` is shared by all layers."""
        super().__init__()
        D, self.num_heads, self.num_kv_heads = config.d_model, config.num_heads, config.num_kv_heads
        self.layer, self.attend, self.dropout = layer, attend, config.attention_dropout_rate
        self.qk_norm, self.norm_eps = config.qk_norm, config.norm_eps
        # Three matrices: laid side by side they gain nothing here (forward and backward of 768 positions on one core:
        # 3.6 ms for 3.7 at D 128, 48 for 49 at D 512; concatenating eats what it saves).
        self.q_proj = nn.Linear(D, D, bias=config.bias)
        self.k_proj, self.v_proj = (nn.Linear(D, config.kv_width, bias=config.bias) for _ in range(2))
        self.output_proj = nn.Linear(D, D, bias=config.bias)
        self._rotary = (rotary,)  # in a tuple: shared, and not a submodule of every layer
        self.value_embeddings: nn.Embedding | None = None
        if config.value_embeddings and (config.num_layers - 1 - layer) % 2 == 0:
            self.value_embeddings = nn.Embedding(config.padded_vocab_size, config.kv_width)
            self.value_gate = nn.Linear(min(GATE_WIDTH, D), config.num_kv_heads, bias=False)

    def forward(self, x_BxTxD: Tensor, this: Pass) -> Tensor:
        """Mix the positions, those in the cache included."""
        qkv = of_one(x_BxTxD, self.q_proj, self.k_proj, self.v_proj)
        return self.output_proj(self._mixed(x_BxTxD, qkv, this))  # type: ignore[no-any-return]

    def behind(self, norm: nn.Module, x_BxTxD: Tensor, this: Pass, to_BxTxD: Tensor | None) -> Tensor | None:
        """`self(norm(x))`, plus `to` where it is given, in few operations of the core; None: it does not take them."""
        maps = self.q_proj, self.k_proj, self.v_proj
        if not takes(x_BxTxD) or not are_plain(norm, *maps, self.output_proj):
            return None
        before = cast(Before, norm.before)
        if self.value_embeddings is not None:  # their gates read the rows, too
            x_BxTxD, before = norm(x_BxTxD), NOTHING
        mixed_BxTxD = self._mixed(x_BxTxD, linear(x_BxTxD, maps, before), this)
        return added(mixed_BxTxD, to_BxTxD, self.output_proj)

    def _mixed(self, x_BxTxD: Tensor, qkv: Sequence[Tensor], this: Pass) -> Tensor:
        """What the output projection is given, B×T×D; of x, which was mapped, only the gates read."""
        B, T, _ = x_BxTxD.shape
        q, k, v = qkv
        q = q.view(B, T, self.num_heads, -1).transpose(1, 2)
        k, v = (y.view(B, T, self.num_kv_heads, -1).transpose(1, 2) for y in (k, v))
        if self.value_embeddings is not None:  # modded-nanogpt's; the gates are nanochat's, and start at 1
            gate_BxGxTx1 = 2 * torch.sigmoid(self.value_gate(x_BxTxD[..., :GATE_WIDTH])).transpose(1, 2)[..., None]
            own = self.value_embeddings(this.ids_BxT).unflatten(-1, (self.num_kv_heads, -1)).transpose(1, 2)
            v = v + gate_BxGxTx1 * own.type_as(v)
        rotary = self._rotary[0]
        if rotary is not None:
            q, k = rotary(q, this.start), rotary(k, this.start)
        if self.qk_norm:
            # CUDA's autocast computes and returns norms in float32; attention wants one type.
            q, k = (rms_norm(x, None, self.norm_eps).type_as(v) for x in (q, k))
        if this.cache is not None:
            k, v = this.cache.extend(self.layer, k, v)
        out_BxHxTxK = self.attend(q, k, v, self.dropout if self.training else 0.0, this.sight)
        return out_BxHxTxK.transpose(1, 2).flatten(-2)


def _activation(kind: str, h: Tensor, gated: Tensor | None = None) -> Tensor:
    """The activation of h; for swiglu silu(h) · gated."""
    if kernels.activates(h):
        return kernels.activation(h, kind) if gated is None else kernels.swiglu(h, gated)
    if gated is not None:
        return F.silu(h) * gated
    if kind in ("gelu", "gelu_tanh"):
        return F.gelu(h, approximate="tanh" if kind == "gelu_tanh" else "none")
    return F.relu(h).square() if kind == "relu2" else F.silu(h)


class FeedForward(nn.Module):
    """w2(silu(w1 x) · w3 x) for swiglu (Shazeer 2020), w2(act(w1 x)) otherwise."""

    def __init__(self, config: ModelConfig, kind: str, width: int) -> None:
        """Two matrices, three for swiglu."""
        super().__init__()
        self.kind = kind
        self.w1 = nn.Linear(config.d_model, width, bias=config.bias)
        self.w2 = nn.Linear(width, config.d_model, bias=config.bias)
        if kind == "swiglu":
            self.w3 = nn.Linear(config.d_model, width, bias=config.bias)

    def forward(self, x_BxTxD: Tensor, this: Pass | None = None) -> Tensor:
        """The same function at every position; `this` is for experts only."""
        made = of_one(x_BxTxD, self.w1, self.w3) if self.kind == "swiglu" else (self.w1(x_BxTxD),)
        return self.w2(_activation(self.kind, *made))  # type: ignore[no-any-return]

    def behind(self, norm: nn.Module, x_BxTxD: Tensor, _: Pass, to_BxTxD: Tensor | None) -> Tensor | None:
        """As `Attention.behind`."""
        maps = (self.w1, self.w3) if self.kind == "swiglu" else (self.w1,)
        if not takes(x_BxTxD) or not are_plain(norm, *maps, self.w2):
            return None
        h_BxTxF, *gated = linear(x_BxTxD, maps, cast(Before, norm.before))
        return added(h_BxTxF, to_BxTxD, self.w2, Before(self.kind), *gated)


def looped_experts(
    x_MxD: Tensor, load_E: Tensor, kind: str, w1_ExFxD: Tensor, w2_ExDxF: Tensor, w3_ExFxD: Tensor | None
) -> Tensor:
    """Every expert's feed-forward on its own rows, one expert after the other: the readable reference.

    Args:
        x_MxD: rows sorted by expert.
        load_E: int64 number of rows of each; read by the host, which on CUDA waits for the device.
        kind: the activation, as `ffn`.
        w1_ExFxD: with `w2_ExDxF` and, for swiglu, `w3_ExFxD` the experts' matrices.

    Returns:
        Rows in the same order, x's shape.
    """
    out = []
    for i, rows in enumerate(torch.split(x_MxD, load_E.tolist())):
        gated = F.linear(rows, w3_ExFxD[i]) if w3_ExFxD is not None else None
        h = _activation(kind, F.linear(rows, w1_ExFxD[i]), gated)
        out.append(F.linear(h, w2_ExDxF[i]))
    return torch.cat(out)


def grouped_experts(
    x_MxD: Tensor, load_E: Tensor, kind: str, w1_ExFxD: Tensor, w2_ExDxF: Tensor, w3_ExFxD: Tensor | None
) -> Tensor:
    """`looped_experts` as grouped matrix products, which learn the rows' ends on the device: the host never waits.

    Rows of x and of the matrices must be multiples of 16 bytes long. autocast does not know the operator, so its
    type is applied here; the CUDA kernel (compute capability 9 on) takes bf16, other types run a slower one.
    """
    device = x_MxD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_MxD.dtype
    ends_E = load_E.cumsum(0).to(torch.int32)

    def product(rows: Tensor, w_ExOxI: Tensor) -> Tensor:
        return torch._grouped_mm(rows.to(dtype), w_ExOxI.to(dtype).transpose(-1, -2), offs=ends_E)

    gated_MxF = product(x_MxD, w3_ExFxD) if w3_ExFxD is not None else None
    h_MxF = _activation(kind, product(x_MxD, w1_ExFxD), gated_MxF)
    return product(h_MxF, w2_ExDxF)


class MixtureOfExperts(nn.Module):
    """Σ gate_e · expert_e(x) over the top k of E experts, plus the shared ones (Shazeer 2017, DeepSeekMoE 2024).

    p = softmax(router x), in float32, with normal noise on the logits while training. The k greatest p (of p + bias
    where the load is balanced by a bias) choose the experts; their gates are p divided by the sum of the chosen p.
    With k = 1 that would be 1 and teach the router nothing: there the gate is p itself, as in the Switch Transformer.
    There is no capacity: every token gets its k experts, however uneven the load.

    Every position counts in load and balance, the padding of `windows = padded` too: the model is not told which
    positions are padding, and a document's number does not say so. Stream and packed windows have (nearly) none.
    """

    router_bias: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        """A router, stacked experts, and a feed-forward of `num_shared_experts` × d_ff for the shared ones."""
        super().__init__()
        E, D, width = config.num_experts, config.d_model, config.d_ff
        self.kind, self.top_k, self.noise = config.expert_ffn, config.expert_top_k, config.router_noise
        self.balance_by_loss = config.load_balancing == "loss"
        self.aligned = D % 8 == 0 and width % 8 == 0  # rows of 16 bytes in bf16, which grouped products ask for
        self.router = nn.Linear(D, E, bias=False)
        self.experts_w1 = nn.Parameter(torch.empty(E, width, D))
        self.experts_w2 = nn.Parameter(torch.empty(E, D, width))
        self.experts_w3 = nn.Parameter(torch.empty(E, width, D)) if self.kind == "swiglu" else None
        shared = config.num_shared_experts * width
        self.shared = FeedForward(config, self.kind, shared) if shared else None
        self.register_buffer("router_bias", torch.zeros(E) if config.load_balancing == "bias" else None)

    def route(self, x_NxD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Experts of each token, their gates, and the probabilities of all experts (N×k, N×k, N×E)."""
        with torch.autocast(x_NxD.device.type, enabled=False):  # in bf16 near experts would tie
            dtype = torch.promote_types(x_NxD.dtype, torch.float32)
            logits_NxE = F.linear(x_NxD.to(dtype), self.router.weight.to(dtype))
            if self.training and self.noise:
                logits_NxE = logits_NxE + self.noise * torch.randn_like(logits_NxE)
            p_NxE = logits_NxE.softmax(dim=-1)
            score_NxE = p_NxE if self.router_bias is None else p_NxE + self.router_bias
            chosen_Nxk = score_NxE.topk(self.top_k, dim=-1).indices
            gate_Nxk = p_NxE.gather(1, chosen_Nxk)
            if self.top_k > 1:
                gate_Nxk = gate_Nxk / gate_Nxk.sum(dim=-1, keepdim=True)
        return chosen_Nxk, gate_Nxk, p_NxE

    def forward(self, x_BxTxD: Tensor, this: Pass) -> Tensor:
        """Sort the work by expert, do it, and bring it back; load and balance go to `this`."""
        x_NxD = x_BxTxD.flatten(0, 1)
        chosen_Nxk, gate_Nxk, p_NxE = self.route(x_NxD)
        expert_M = chosen_Nxk.flatten()
        E = p_NxE.shape[-1]
        load_E = (expert_M[:, None] == torch.arange(E, device=expert_M.device)).sum(dim=0)
        this.loads_E.append(load_E.float())
        if self.balance_by_loss:  # E Σ f_e p_e, 1 where even (Switch Transformer; GShard)
            this.balances.append(E * (load_E / len(expert_M) * p_NxE.mean(dim=0)).sum().float())
        # Sorting and counting keep the shapes independent of the choice: no wait for the device, no new graph. Work
        # is brought back through the inverse order, not added up by index, whose order of sums varies on CUDA.
        order_M = expert_M.argsort(stable=True)
        work_MxD = x_NxD.index_select(0, order_M // self.top_k)
        # On the CPU the loop costs the same (25 ms for 26, both ways: 768 tokens, D 128, F 512, two of 8 experts), and
        # reading the counts waits for nothing; every expert on every token, masked, costs 110. A compiled model takes
        # the grouped products everywhere, since counts on the host would break its graph.
        on_device = (x_BxTxD.is_cuda or torch.compiler.is_compiling()) and self.aligned
        experts = grouped_experts if on_device else looped_experts
        done_MxD = experts(work_MxD, load_E, self.kind, self.experts_w1, self.experts_w2, self.experts_w3)
        done_NxkxD = done_MxD.index_select(0, order_M.argsort()).view(-1, self.top_k, done_MxD.shape[-1])
        # Multiplied and added up, which for so few terms is six times faster than a batched product on the CPU.
        out_BxTxD = (gate_Nxk[..., None].type_as(done_NxkxD) * done_NxkxD).sum(dim=1).view_as(x_BxTxD)
        return out_BxTxD if self.shared is None else out_BxTxD + self.shared(x_BxTxD)


class Block(nn.Module):
    """Attention, then feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int, attend: Attend, rotary: RotaryEmbedding | None) -> None:
        """Parts of one layer."""
        super().__init__()
        self.pre = config.norm_position == "pre"
        self.ln1, self.ln2 = norm_of(config), norm_of(config)
        self.attn = Attention(config, layer, attend, rotary)
        self.ffn = MixtureOfExperts(config) if config.ffn == "moe" else FeedForward(config, config.ffn, config.d_ff)
        self.dropout = config.dropout

    def forward(self, x_BxTxD: Tensor, this: Pass) -> Tensor:
        """One layer."""
        if self.pre:
            if self._is_one_operation(x_BxTxD, this):
                return self._in_one(x_BxTxD, this)
            x_BxTxD = self._plus(self.attn, self.ln1, x_BxTxD, this)
            return self._plus(self.ffn, self.ln2, x_BxTxD, this)
        x_BxTxD = self.ln1(x_BxTxD + self._dropped(self.attn(x_BxTxD, this)))
        return self.ln2(x_BxTxD + self._dropped(self.ffn(x_BxTxD, this)))  # type: ignore[no-any-return]

    def _is_one_operation(self, x_BxTxD: Tensor, this: Pass) -> bool:
        """Whether the core does all of it at once (`block`). `block.is_one_operation` says it of a config."""
        attn, ffn = self.attn, self.ffn
        if not (self._is_own(attn) and type(ffn) is FeedForward and self._is_own(ffn)) or is_taken_apart():
            return False
        if attn.attend is not native_attention or (self.dropout and self.training):
            return False
        if attn.value_embeddings is not None or this.cache is not None or this.sight.documents_BxS is not None:
            return False
        rotary = attn._rotary[0]
        if x_BxTxD.shape[1] < 2 or not (rotary is None or is_untouched(rotary)):
            return False
        K = x_BxTxD.shape[-1] // attn.num_heads
        maps = (attn.q_proj, attn.k_proj, attn.v_proj, attn.output_proj, ffn.w1, ffn.w2)
        gate = (ffn.w3,) if ffn.kind == "swiglu" else ()
        if K % 8 or K > kernels.WIDEST_HEAD or not takes(x_BxTxD) or not are_plain(self.ln1, self.ln2, *maps, *gate):
            return False
        first, second = cast(Before, self.ln1.before), cast(Before, self.ln2.before)
        return (
            first.kind == second.kind
            and (first.eps == second.eps or first.kind == "none")
            and (not attn.qk_norm or first.kind == "none" or attn.norm_eps == first.eps)
        )

    @staticmethod
    def _is_own(part: nn.Module) -> bool:
        """Whether a part of a block may be gone around."""
        return type(part) in (Attention, FeedForward) and is_untouched(part)

    def _in_one(self, x_BxTxD: Tensor, this: Pass) -> Tensor:
        attn, ffn = self.attn, cast(FeedForward, self.ffn)
        before = [cast(Before, norm.before) for norm in (self.ln1, self.ln2)]
        parameters: list[Tensor | None] = [p for b in before for p in (b.weight, b.bias)]
        gate = ffn.w3 if ffn.kind == "swiglu" else None
        for m in (attn.q_proj, attn.k_proj, attn.v_proj, attn.output_proj, ffn.w1, gate, ffn.w2):
            parameters += (None, None) if m is None else parameters_of(m)
        rotary, T, sight = attn._rotary[0], x_BxTxD.shape[1], this.sight
        tables = None if rotary is None else (rotary.cos_PxK2[:T], rotary.sin_PxK2[:T])
        eps = attn.norm_eps if before[0].kind == "none" else before[0].eps
        kind = Kind(attn.num_heads, attn.num_kv_heads, sight.causal, sight.window, before[0].kind, eps, attn.qk_norm,
                    ffn.kind)  # fmt: skip
        return block(x_BxTxD, kind, parameters, tables)

    def _plus(self, part: nn.Module, norm: nn.Module, x_BxTxD: Tensor, this: Pass) -> Tensor:
        """x + part(norm(x))."""
        drops = self.dropout and self.training
        if self._is_own(part):
            made = cast(Attention | FeedForward, part).behind(norm, x_BxTxD, this, None if drops else x_BxTxD)
            if made is not None:
                return x_BxTxD + self._dropped(made) if drops else made
        return x_BxTxD + self._dropped(part(norm(x_BxTxD), this))

    def _dropped(self, x_BxTxD: Tensor) -> Tensor:
        # A call less where there is none: at 4 × 128 on one core such calls were 1 % of a step.
        return _dropout(x_BxTxD, self.dropout) if self.dropout and self.training else x_BxTxD


def _dropout(x_BxTxD: Tensor, rate: float) -> Tensor:
    return (kernels.dropout if kernels.activates(x_BxTxD) else kernels.torch_dropout)(x_BxTxD, rate)


class Features(NamedTuple):
    """What the model knows before the head."""

    x_BxTxD: Tensor
    """The residual stream behind the last norm."""
    balance: Tensor
    """0-D float32: load-balancing loss E Σ f_e p_e, summed over layers; 0 unless `load_balancing` is loss."""
    load_LxE: Tensor
    """Float32: tokens sent to each expert of each layer, each token counted k times; 0×0 without experts."""


class TransformerLM(nn.Module):
    """Token ids in, logits out.

    >>> model = TransformerLM(ModelConfig(vocab_size=300, d_model=32, num_layers=2, num_heads=2, context_length=8))
    >>> model(torch.zeros(1, 8, dtype=torch.int64)).shape
    torch.Size([1, 8, 300])
    """

    def __init__(self, config: ModelConfig, *, attend: Attend | None = None) -> None:
        """Build and initialise; the global torch seed decides the weights.

        Args:
            config: shape of the model; `vocab_size` must be set.
            attend: the attention arithmetic, one of `attention`'s kernels; None: `native_attention`.

        Raises:
            ConfigError: the vocabulary's size is unknown.
        """
        super().__init__()
        if not config.vocab_size:
            raise ConfigError("vocab_size: found 0; expected the size of the data's vocabulary")
        self.config = config
        self.attend = attend if attend is not None else native_attention
        D, V, L = config.d_model, config.padded_vocab_size, config.num_layers
        rotary = (
            RotaryEmbedding(config.head_width, config.max_seq_len, config.rope_theta)
            if config.position == "rope"
            else None
        )
        self.rotary = rotary
        self.token_embeddings = nn.Embedding(V, D)
        self.position_embeddings = nn.Embedding(config.max_seq_len, D) if config.position == "learned" else None
        self.shift_lambdas = nn.Parameter(torch.empty(config.token_shift, D)) if config.token_shift else None
        self.ln_embedding = norm_of(config) if config.embedding_norm else None
        self.residual_lambdas = nn.Parameter(torch.empty(L)) if config.residual_lambdas else None
        self.x0_lambdas = nn.Parameter(torch.empty(L)) if config.residual_lambdas else None
        self.layers = nn.ModuleList(Block(config, i, self.attend, rotary) for i in range(L))
        self.ln_final = norm_of(config)
        self.lm_head = None if config.tie_embeddings else nn.Linear(D, V, bias=False)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Draw every weight anew; the whole initialisation is here.

        course: Linear from a normal of variance 2/(in+out) cut at three deviations, embeddings from N(0, 1) cut
        at ±3 (CS336, assignment 1). gpt2: all from N(0, 0.02²), the projections that end on the residual stream
        from N(0, 0.02²/(2·layers)) (Radford et al. 2019, nanoGPT). Norm weights and residual lambdas are 1; biases,
        x0 and shift lambdas and the gates of value embeddings 0, where a gate opens by 1. `zero_init_projections` and
        `head_init` come before either.
        """
        c = self.config
        for name, weight in self.named_parameters():
            ends_on_residual = name.endswith(("output_proj.weight", "w2.weight", "experts_w2"))
            fans = sum(weight.shape[-2:])  # of one expert where they are stacked
            if weight.ndim < 2 or name == "shift_lambdas":
                weight.fill_(0.0 if name.endswith(("bias", "x0_lambdas", "shift_lambdas")) else 1.0)
            elif name.endswith("value_gate.weight") or (ends_on_residual and c.zero_init_projections):
                weight.zero_()
            elif name == "lm_head.weight" and c.head_init != "default":
                weight.normal_(0.0, 0.001 if c.head_init == "small" else 0.0)
            elif c.init == "gpt2":
                weight.normal_(0.0, 0.02 / math.sqrt(2 * c.num_layers if ends_on_residual else 1))
            elif "embeddings" in name:
                # A tied matrix is a Linear too: deviation 1 would start it with logits of size √D.
                std = math.sqrt(2 / fans) if c.tie_embeddings and name.startswith("token") else 1.0
                nn.init.trunc_normal_(weight, 0.0, std, -3 * std, 3 * std)
            else:
                std = math.sqrt(2 / fans)
                nn.init.trunc_normal_(weight, 0.0, std, -3 * std, 3 * std)

    @property
    def head_weight(self) -> Tensor:
        """The output head, V × D with the padded vocabulary: the token embedding where they are tied."""
        return self.token_embeddings.weight if self.lm_head is None else self.lm_head.weight

    def features(self, ids_BxT: Tensor, cache: KVCache | None = None, documents_BxT: Tensor | None = None) -> Features:
        """All but the head.

        Args:
            ids_BxT: int64 ids below the vocabulary's size.
            cache: the tokens before these; extended in place.
            documents_BxT: number of each position's document; attention never crosses where it differs.

        Raises:
            ConfigError: more positions than the model has; a cache for a model that looks both ways.
        """
        c, T = self.config, ids_BxT.shape[-1]
        start = 0 if cache is None else len(cache)
        if start + T > c.max_seq_len:
            raise ConfigError(f"model: found a sequence of {start + T} tokens; expected at most {c.max_seq_len}")
        if cache is not None:
            if c.bidirectional:
                raise ConfigError("cache: found one for a model with causal = false; expected none: what it has read "
                                  "would change with every further token")  # fmt: skip
            documents_BxT = cache.extend_documents(documents_BxT)
        sight = Sight(not c.bidirectional, c.sliding_window, documents_BxT)
        sight = look(self.attend, sight, T, start + T, ids_BxT.device)
        this = Pass(ids_BxT, sight, cache, start)
        x_BxTxD = self.token_embeddings(ids_BxT)
        if self.shift_lambdas is not None:
            x_BxSxD = x_BxTxD if cache is None else cache.extend_inputs(x_BxTxD, c.token_shift)
            x_BxTxD = add_previous(x_BxSxD, T, self.shift_lambdas, documents_BxT)
        if self.ln_embedding is not None:
            x_BxTxD = self.ln_embedding(x_BxTxD)
        if self.position_embeddings is not None:
            x_BxTxD = x_BxTxD + self.position_embeddings.weight[start : start + T]
        if c.residual_precision == "products" and torch.is_autocast_enabled(x_BxTxD.device.type):
            x_BxTxD = x_BxTxD.to(torch.get_autocast_dtype(x_BxTxD.device.type))
        if self.config.dropout and self.training:
            x_BxTxD = _dropout(x_BxTxD, self.config.dropout)
        x0_BxTxD = x_BxTxD
        for i, layer in enumerate(self.layers):
            if self.residual_lambdas is not None and self.x0_lambdas is not None:
                x_BxTxD = self.residual_lambdas[i] * x_BxTxD + self.x0_lambdas[i] * x0_BxTxD
            x_BxTxD = layer(x_BxTxD, this)
        none = torch.zeros((), dtype=torch.float32, device=x_BxTxD.device)
        balance = torch.stack(this.balances).sum() if this.balances else none
        load_LxE = torch.stack(this.loads_E) if this.loads_E else none.new_zeros(0, 0)
        return Features(self.ln_final(x_BxTxD), balance, load_LxE)

    def forward(self, ids_BxT: Tensor, cache: KVCache | None = None, documents_BxT: Tensor | None = None) -> Tensor:
        """Logits for the token after each position, soft-capped; arguments and errors as `features`.

        Returns:
            logits_BxTxV of the vocabulary itself, without the padding of `pad_vocab`.
        """
        x_BxTxD = self.features(ids_BxT, cache, documents_BxT).x_BxTxD
        logits_BxTxV = F.linear(x_BxTxD, self.head_weight)[..., : self.config.vocab_size]
        cap = self.config.logit_softcap
        return cap * torch.tanh(logits_BxTxV / cap) if cap else logits_BxTxV

    @torch.no_grad()
    def move_router_bias(self, load_LxE: Tensor) -> None:
        """Raise the bias of experts below the mean load and lower the others, by `load_balancing_weight`.

        b += weight · sign(mean load - load) (DeepSeek-V3). The loop calls it after a step, with the loads of all its
        micro-steps and ranks; without load_balancing = bias it does nothing.
        """
        if self.config.ffn == "moe" and self.config.load_balancing == "bias":
            experts = (m for m in self.modules() if isinstance(m, MixtureOfExperts))
            for ffn, load_E in zip(experts, load_LxE, strict=True):
                assert ffn.router_bias is not None
                ffn.router_bias += self.config.load_balancing_weight * (load_E.mean() - load_E).sign()
