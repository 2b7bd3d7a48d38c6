"""Weights from and for elsewhere: the same logits as the course's, Llama's and GPT-2's own code."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bytekiln import convert, hf_weights
from bytekiln.checkpoint import Checkpoint, save_checkpoint
from bytekiln.config import ModelConfig, RunConfig
from bytekiln.errors import BytekilnError, ConfigError, FileError, FormatError, MismatchError
from bytekiln.model import TransformerLM

V, D, T, LAYERS = 97, 32, 12, 2
IDS = torch.randint(V, (3, T), generator=torch.Generator().manual_seed(1))
LLAMA = {
    "vocab_size": V, "hidden_size": D, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": T, "rms_norm_eps": 1e-5, "initializer_range": 0.3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "tie_word_embeddings": False,
}  # fmt: skip
GPT2 = {
    "vocab_size": V, "n_embd": D, "n_layer": LAYERS, "n_head": 4, "n_positions": T, "activation_function": "gelu",
    "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


def llama(**changes: object):
    torch.manual_seed(7)
    return shaken(transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, **changes})))


def gpt2(**changes: object):
    torch.manual_seed(7)
    return shaken(transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**GPT2, **changes})))


@torch.no_grad()
def shaken(model):
    """Biases start at 0 and norms at 1 there: a mix-up of them would go unseen."""
    for weight in model.parameters():
        if weight.ndim == 1:
            weight.add_(torch.randn_like(weight) * 0.3)
    return model.eval()


def saved(model, folder: Path) -> str:
    model.save_pretrained(folder, safe_serialization=True)
    return str(folder)


def ours(folder: str, notice=pytest.fail, **changes: object) -> TransformerLM:
    """Our model with the folder's shape and weights."""
    config = ModelConfig(**{"context_length": T, **convert.config_of(folder, notice), **changes})
    model = TransformerLM(config)
    model.load_state_dict(convert.load_initial(folder, config, notice))
    return model.eval()


@torch.no_grad()
def logits(model) -> Tensor:
    out = model(IDS)
    return getattr(out, "logits", out)[..., :V].double()


def distance(a, b) -> float:
    """In float64: in float32 the two sides' own roundings add up to more than what is looked for."""
    return (logits(copy.deepcopy(a).double()) - logits(copy.deepcopy(b).double())).abs().max().item()


def exported(model: TransformerLM, folder: Path):
    """Written as `export` says, read by `transformers`."""
    folder.mkdir()
    tensors, config = convert.export(model.state_dict(), model.config, eot_id=0)
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    found, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return found.eval()


# --- the course --------------------------------------------------------------------------------------------


def test_the_courses_names_are_ours() -> None:
    """CS336, assignment 1: the state dicts of its tests load as they are."""
    names = {"token_embeddings.weight": (V, D), "ln_final.weight": (D,), "lm_head.weight": (V, D)}
    for i in range(LAYERS):
        names |= {f"layers.{i}.attn.{p}_proj.weight": (D, D) for p in ("q", "k", "v", "output")}
        names |= {f"layers.{i}.ln1.weight": (D,), f"layers.{i}.ln2.weight": (D,)}
        names |= {f"layers.{i}.ffn.w1.weight": (48, D), f"layers.{i}.ffn.w2.weight": (D, 48)}
        names |= {f"layers.{i}.ffn.w3.weight": (48, D)}
    config = ModelConfig(vocab_size=V, d_model=D, num_layers=LAYERS, num_heads=4, d_ff=48, context_length=T)
    assert {n: tuple(t.shape) for n, t in TransformerLM(config).state_dict().items()} == names


# --- from and to transformers ------------------------------------------------------------------------------

MODELS = {
    "llama": (llama, {}),
    "llama-gqa": (llama, {"num_key_value_heads": 2}),
    "llama-mqa-tied": (llama, {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama-biased": (llama, {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2}),
    "llama-attention-bias": (llama, {"attention_bias": True}),
    "llama-mlp-bias": (llama, {"mlp_bias": True}),
    "gpt2": (gpt2, {}),
    "gpt2-untied": (gpt2, {"tie_word_embeddings": False}),
    "gpt2-narrow": (gpt2, {"n_inner": 40}),
    "gpt2-silu": (gpt2, {"activation_function": "silu"}),
    "gpt2-relu2": (gpt2, {"activation_function": "relu2"}),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_agree_there_and_back(name: str, tmp_path: Path) -> None:
    make, changes = MODELS[name]
    theirs = make(**changes)
    model = ours(saved(theirs, tmp_path / "theirs"))
    assert logits(theirs).std() > 0.5  # what agrees is not all zero
    assert distance(model, theirs) < 1e-5
    back = exported(model, tmp_path / "back")
    assert type(back) is type(theirs) and distance(model, back) < 1e-5
    state, found = theirs.state_dict(), back.state_dict()
    added = {n for n in found if n not in state}  # Llama with one kind of bias comes back with both, the new ones 0
    assert not any(found[n].any() for n in added) and (bool(added) == (name.endswith("-bias")))
    assert all(torch.equal(found[n], t) for n, t in state.items())


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_without_the_permutation_llama_differs(kv_heads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A check of the check above."""
    theirs = llama(num_key_value_heads=kv_heads)
    folder = saved(theirs, tmp_path / "theirs")
    monkeypatch.setattr(hf_weights, "interleaved", lambda rows, heads: rows)
    assert distance(ours(folder), theirs) > 0.01


@pytest.mark.parametrize("swap", [("attn.k_proj", "attn.v_proj"), ("ffn.w1", "ffn.w3"), ("ln1", "ln2")])
def test_a_wrong_mapping_is_seen(swap: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = llama()
    folder = saved(theirs, tmp_path / "theirs")
    a, b = swap
    table = dict(hf_weights.LLAMA_LAYER)
    monkeypatch.setattr(hf_weights, "LLAMA_LAYER", {**table, a: table[b], b: table[a]})
    assert distance(ours(folder), theirs) > 0.01


@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from([(), (5,)]))
def test_rows_of_rotary_pairs(heads: int, pairs: int, rest: tuple[int, ...]) -> None:
    """Row i of a head goes to 2i in the first half, and to 2(i - K/2) + 1 in the second."""
    width = 2 * pairs
    rows = torch.randn(heads * width, *rest)
    found = hf_weights.interleaved(rows, heads)
    for head in range(heads):
        for i in range(width):
            to = 2 * i if i < pairs else 2 * (i - pairs) + 1
            assert torch.equal(found[head * width + to], rows[head * width + i])
    assert torch.equal(hf_weights.half_split(found, heads), rows)


OURS = {
    "llama": {"num_kv_heads": 2, "d_ff": 48, "rope_theta": 300.0},
    "llama-tied-padded": {"tie_embeddings": True, "pad_vocab": True, "bias": True},
    "gpt2": {"norm": "layer", "position": "learned", "ffn": "gelu", "bias": True, "tie_embeddings": True},
    "nanogpt": {"norm": "layer", "position": "learned", "ffn": "gelu", "tie_embeddings": True, "pad_vocab": True},
    "gpt2-untied": {"norm": "layer", "position": "learned", "ffn": "relu2", "d_ff": 40},
}


@pytest.mark.parametrize("name", OURS)
def test_export_of_our_own_models(name: str, tmp_path: Path) -> None:
    config = ModelConfig(vocab_size=V, d_model=D, num_layers=LAYERS, num_heads=4, context_length=T, **OURS[name])
    torch.manual_seed(3)
    model = shaken(TransformerLM(config))
    back = exported(model, tmp_path / "back")
    assert back.get_input_embeddings().weight.shape == (V, D)
    assert distance(model, back) < 1e-5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"qk_norm": True}, ["qk_norm: found true; expected false", "Llama"]),
        ({"norm_position": "post"}, ["norm_position: found post; expected pre"]),
        ({"ffn": "relu2"}, ["ffn: found relu2; expected swiglu", "Llama"]),
        ({"logit_softcap": 15.0}, ["logit_softcap: found 15"]),
        ({"sliding_window": 4}, ["sliding_window"]),
        ({"position": "none"}, ["position: found none; expected rope"]),
        ({"position": "learned"}, ["norm: found rms; expected layer", "GPT-2"]),
        (
            {"position": "learned", "norm": "layer"},
            ["ffn: found swiglu; expected gelu_tanh or gelu or silu", "GPT-2"],
        ),
        ({"position": "learned", "norm": "layer", "ffn": "gelu", "num_kv_heads": 2}, ["num_kv_heads: found 2"]),
        ({"value_embeddings": True}, ["value_embeddings"]),
        ({"causal": False}, ["causal: found false"]),
    ],
)
def test_export_refuses_what_they_lack(changes: dict, words: list[str]) -> None:
    config = ModelConfig(vocab_size=V, d_model=D, num_layers=LAYERS, num_heads=4, context_length=T, **changes)
    with pytest.raises(ConfigError) as raised:
        convert.export({}, config)
    assert all(w in str(raised.value) for w in words), raised.value


# --- what differs between the models ------------------------------------------------------------------------


def test_gelu_new_is_the_tanh_approximation(tmp_path: Path) -> None:
    theirs = gpt2(activation_function="gelu_new")
    model = ours(saved(theirs, tmp_path / "theirs"), lambda _: None)
    assert model.config.ffn == "gelu_tanh"
    assert distance(model, theirs) < 1e-5
    exact = ModelConfig(**{**model.config.model_dump(), "ffn": "gelu"})
    with pytest.raises(MismatchError, match="ffn: found gelu; expected gelu_tanh"):
        convert.load_initial(str(tmp_path / "theirs"), exact)


def test_another_eps_comes_along(tmp_path: Path) -> None:
    theirs = llama(rms_norm_eps=1e-3)
    model = ours(saved(theirs, tmp_path / "theirs"), lambda _: None)
    assert model.config.norm_eps == 1e-3
    assert distance(model, theirs) < 1e-5
    usual = ModelConfig(**{**model.config.model_dump(), "norm_eps": 1e-5})
    with pytest.raises(MismatchError, match=r"norm_eps: found 1e-05; expected 0\.001"):
        convert.load_initial(str(tmp_path / "theirs"), usual)


def test_an_eps_that_is_not_said_is_theirs(tmp_path: Path) -> None:
    for make, name, theirs in ((llama, "rms_norm_eps", 1e-6), (gpt2, "layer_norm_epsilon", 1e-5)):
        folder = tmp_path / name
        saved(make(), folder)
        said = json.loads((folder / "config.json").read_text())
        del said[name]
        (folder / "config.json").write_text(json.dumps(said))
        assert getattr(transformers.AutoConfig.from_pretrained(folder), name) == theirs
        assert convert.config_of(folder)["norm_eps"] == theirs


@pytest.mark.parametrize(
    ("flags", "has", "has_none"),
    [
        ({"attention_bias": True}, ["q_proj", "k_proj", "v_proj", "o_proj"], ["mlp.gate_proj", "mlp.down_proj"]),
        ({"mlp_bias": True}, ["gate_proj", "up_proj", "down_proj"], ["self_attn.q_proj", "self_attn.o_proj"]),
        ({"attention_bias": True, "mlp_bias": True}, ["v_proj", "down_proj"], []),
        ({}, [], ["self_attn.q_proj", "mlp.up_proj"]),
    ],
    ids=["attention", "mlp", "both", "none"],
)
def test_each_part_has_biases_by_its_own_flag(flags: dict, has: list[str], has_none: list[str], tmp_path: Path) -> None:
    """What a flag promises must be there, and what it denies must not: a bias of 0 is no stand-in."""
    folder = saved(llama(**flags), tmp_path / "theirs")
    file = tmp_path / "theirs" / "model.safetensors"
    good = safetensors.torch.load_file(file)
    ours(folder)
    for part in has:
        name = next(n for n in good if n.endswith(f".{part}.bias"))
        safetensors.torch.save_file({n: t for n, t in good.items() if n != name}, file)
        with pytest.raises(FormatError, match=f"found no {name}; expected it in this model"):
            ours(folder)
    for part in has_none:
        name = f"model.layers.1.{part}.bias"
        safetensors.torch.save_file({**good, name: torch.ones(len(good[name.replace("bias", "weight")]))}, file)
        with pytest.raises(FormatError, match=f"found {name}; expected no such weight"):
            ours(folder)


def test_padding_leaves_the_logits_and_hardly_moves_the_softmax(tmp_path: Path) -> None:
    theirs = gpt2()
    with torch.no_grad():
        theirs.transformer.ln_f.bias.sub_(5 * theirs.transformer.wte.weight.mean(dim=0))
    folder = saved(theirs, tmp_path / "theirs")
    model = ours(folder, pad_vocab=True)
    assert model.state_dict()["token_embeddings.weight"].shape == (128, D)
    assert distance(model, theirs) < 1e-5
    with torch.no_grad():
        all_BxTxV = model.features(IDS).x_BxTxD @ model.head_weight.T
    more = all_BxTxV.logsumexp(-1) - all_BxTxV[..., :V].logsumexp(-1)
    assert more.min() >= 0 and more.max() <= torch.tensor(128 / V).log() + 1e-6  # Jensen


def test_positions_may_be_fewer(tmp_path: Path) -> None:
    theirs = gpt2(n_positions=4 * T)
    folder = saved(theirs, tmp_path / "theirs")
    said: list[str] = []
    assert distance(ours(folder, said.append, max_seq_len=T), theirs) < 1e-5
    assert any(f"max_seq_len: found {T}; the first" in line for line in said)
    config = ModelConfig(**{"context_length": T, **convert.config_of(folder), "max_seq_len": 4 * T + 1})
    with pytest.raises(MismatchError, match=f"max_seq_len: found {4 * T + 1}; expected at most {4 * T}"):
        convert.load_initial(folder, config)
    said.clear()
    rotary = saved(llama(), tmp_path / "rotary")
    ours(rotary, said.append, max_seq_len=2 * T)
    assert len(said) == 1 and f"trained on {T} positions" in said[0]


# --- folders ------------------------------------------------------------------------------------------------


def test_config_of_a_folder(tmp_path: Path) -> None:
    found = convert.config_of(saved(llama(num_key_value_heads=2), tmp_path / "llama"))
    wanted = {"vocab_size": V, "d_model": D, "num_layers": LAYERS, "num_heads": 4, "num_kv_heads": 2, "d_ff": 48,
              "rope_theta": 500.0, "norm": "rms", "position": "rope", "ffn": "swiglu", "bias": False,
              "tie_embeddings": False, "max_seq_len": T, "norm_position": "pre", "qk_norm": False}  # fmt: skip
    assert {k: found[k] for k in wanted} == wanted
    assert not {"context_length", "dropout", "init", "pad_vocab", "causal"} & set(found)
    found = convert.config_of(saved(gpt2(), tmp_path / "gpt2"))
    wanted = {"d_ff": 4 * D, "norm": "layer", "position": "learned", "ffn": "gelu", "bias": True,
              "tie_embeddings": True, "max_seq_len": T, "num_kv_heads": 4}  # fmt: skip
    assert {k: found[k] for k in wanted} == wanted


def test_the_published_gpt2_layout(tmp_path: Path) -> None:
    """The hub's gpt2: no prefix, masks among the weights, no word on tying; defaults left out of config.json."""
    theirs = gpt2(activation_function="gelu_new")
    tensors = {n.removeprefix("transformer."): t for n, t in theirs.state_dict().items() if n != "lm_head.weight"}
    tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, T, T, dtype=torch.uint8).tril() for i in range(LAYERS)}
    tensors |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(LAYERS)}
    safetensors.torch.save_file({n: t.clone() for n, t in tensors.items()}, tmp_path / "model.safetensors")
    said = {"model_type": "gpt2", "n_ctx": T, "n_embd": D, "n_head": 4, "n_layer": LAYERS, "n_positions": T,
            "vocab_size": V, "layer_norm_epsilon": 1e-05, "activation_function": "gelu_new"}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(said))
    assert distance(ours(str(tmp_path), lambda _: None), theirs) < 1e-5


def test_old_llama_layout(tmp_path: Path) -> None:
    """rope_theta at the top, inverse frequencies among the weights, a half-precision file."""
    theirs = llama()
    tensors = {n: t.to(torch.bfloat16) for n, t in theirs.state_dict().items()}
    tensors |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(LAYERS)}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    said = {k: v for k, v in LLAMA.items() if k != "rope_parameters"}
    said |= {"model_type": "llama", "rope_theta": 500.0, "rope_scaling": None, "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(said))
    model = ours(str(tmp_path))
    assert all(t.dtype == torch.float32 for t in model.state_dict().values())
    theirs.load_state_dict({n: t.to(torch.bfloat16).float() for n, t in theirs.state_dict().items()})
    assert distance(model, theirs) < 1e-5


def test_shards(tmp_path: Path) -> None:
    theirs = llama()
    theirs.save_pretrained(tmp_path, safe_serialization=True, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2 and not (tmp_path / "model.safetensors").exists()
    assert distance(ours(str(tmp_path)), theirs) < 1e-5
    index = tmp_path / "model.safetensors.index.json"
    good = index.read_text()
    for bad in ("{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": "../x.safetensors"}}', '{"weight_map": 3}'):
        index.write_text(bad)
        with pytest.raises(FormatError, match=r"index\.json: found no weight_map"):
            ours(str(tmp_path))
    index.write_text(good.replace("lm_head.weight", "other.weight"))
    with pytest.raises(FormatError, match=r"found no other\.weight"):
        ours(str(tmp_path))
    index.write_text(good)
    shards[1].unlink()
    with pytest.raises(FileError, match=shards[1].name):
        ours(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"d_model": 64}, "d_model: found 64; expected 32"),
        ({"num_layers": 3}, "num_layers: found 3; expected 2"),
        ({"num_heads": 2, "num_kv_heads": 2}, "num_heads: found 2; expected 4"),
        ({"num_kv_heads": 4}, "num_kv_heads: found 4; expected 2"),
        ({"vocab_size": V + 1}, f"vocab_size: found {V + 1}; expected {V}"),
        ({"d_ff": 64}, "d_ff: found 64; expected 48"),
        ({"rope_theta": 1e4}, "rope_theta: found 10000.0; expected 500.0"),
        ({"norm": "layer"}, "norm: found layer; expected rms"),
        ({"norm_position": "post"}, "norm_position: found post; expected pre"),
        ({"position": "learned", "rope_theta": 1e4}, "position: found learned; expected rope"),
        ({"ffn": "silu"}, "ffn: found silu; expected swiglu"),
        ({"qk_norm": True}, "qk_norm: found true; expected false"),
        ({"tie_embeddings": True}, "tie_embeddings: found true; expected false"),
        ({"bias": True}, "bias: found true; expected false"),
        ({"residual_lambdas": True}, "residual_lambdas: found true; expected false"),
    ],
)
def test_the_field_that_disagrees_is_named(changes: dict, expected: str, tmp_path: Path) -> None:
    folder = saved(llama(num_key_value_heads=2), tmp_path / "theirs")
    config = ModelConfig(**{"context_length": T, **convert.config_of(folder), **changes})
    with pytest.raises(MismatchError) as raised:
        convert.load_initial(folder, config)
    assert str(raised.value) == f"{expected}, that of {folder}"


@pytest.mark.parametrize(
    ("make", "changes", "words"),
    [
        (llama, {"model_type": "mistral"}, ["model_type: found mistral", "gpt2 or llama"]),
        (llama, {"model_type": None}, ["model_type"]),
        (llama, {"hidden_size": "wide"}, ["hidden_size: found 'wide'"]),
        (llama, {"hidden_size": None}, ["hidden_size: found None"]),
        (llama, {"num_hidden_layers": 0}, ["num_hidden_layers: found 0"]),
        (llama, {"num_attention_heads": 5, "head_dim": None}, ["config.json", "num_heads: found 5"]),
        (llama, {"head_dim": 16}, ["head_dim: found 16; expected 8"]),
        (llama, {"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
        (llama, {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, ["rope_type: found llama3"]),
        (llama, {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None}, ["rope_type", "linear"]),
        (llama, {"rope_parameters": "default"}, ["rope_type: found default"]),
        (llama, {"rope_parameters": {"rope_theta": None}}, ["rope_theta: found None"]),
        (llama, {"rms_norm_eps": "tiny"}, ["rms_norm_eps", "tiny"]),
        (llama, {"quantization_config": {"bits": 4}}, ["quantization_config"]),
        (gpt2, {"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx: found true"]),
        (gpt2, {"activation_function": "tanh"}, ["activation_function", "tanh"]),
        (gpt2, {"add_cross_attention": True}, ["add_cross_attention"]),
    ],
)
def test_other_models_are_refused(make, changes: dict, words: list[str], tmp_path: Path) -> None:
    folder = saved(make(), tmp_path / "theirs")
    path = tmp_path / "theirs" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    for call in (convert.config_of, lambda f: convert.load_initial(f, ModelConfig(vocab_size=V))):
        with pytest.raises(FormatError) as raised:
            call(folder)
        assert "config.json" in str(raised.value) and all(w in str(raised.value) for w in words), raised.value


def test_weights_that_do_not_fit_their_config(tmp_path: Path) -> None:
    folder = saved(llama(), tmp_path / "theirs")
    file = tmp_path / "theirs" / "model.safetensors"
    good = safetensors.torch.load_file(file)
    name = "model.layers.1.self_attn.q_proj.weight"

    def refused(tensors: dict[str, Tensor], *words: str) -> None:
        safetensors.torch.save_file({n: t.contiguous().clone() for n, t in tensors.items()}, file)
        with pytest.raises(FormatError) as raised:
            ours(folder)
        assert all(w in str(raised.value) for w in words), raised.value

    refused({n: t for n, t in good.items() if n != name}, folder, f"found no {name}")
    refused({n: t for n, t in good.items() if n != "lm_head.weight"}, "found no lm_head.weight")
    refused({**good, "score.weight": good[name]}, "score.weight", "no such weight")
    refused({**good, name: good[name][:16]}, name, "16 outputs; expected 32")
    refused({**good, name: good[name][:, :16]}, "layers.1.attn.q_proj.weight", "32 x 16", "32 x 32")
    refused({**good, "model.norm.weight": torch.ones(D + 1)}, "ln_final.weight", "33", "32")
    refused({**good, name: good[name].to(torch.int8)}, name, "int8")
    safetensors.torch.save_file(good, file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(FormatError, match=r"model\.safetensors"):
        ours(folder)


def test_pickles_are_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    saved(llama(), folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileError, match=r"model\.safetensors: no such file"):
        ours(str(folder))
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04K*.")
    with pytest.raises(FormatError, match=r"pytorch_model\.bin: found a pickle, which is never opened"):
        ours(str(folder))
    for path in (folder / "pytorch_model.bin", folder / "config.json"):
        with pytest.raises(FormatError, match="expected a run, a checkpoint, or a folder"):
            convert.config_of(path)
    (folder / "config.json").unlink()
    with pytest.raises(BytekilnError, match="theirs"):
        convert.config_of(folder)
    with pytest.raises(FileError, match="nothing is downloaded"):
        convert.config_of("gpt2")


# --- runs of ours -------------------------------------------------------------------------------------------

SHAPE = {"vocab_size": V, "d_model": D, "num_layers": LAYERS, "num_heads": 4, "context_length": T}


def own_run(folder: Path, **changes: object) -> dict[str, TransformerLM]:
    """A run folder with two numbered checkpoints and the best one; the models in them."""
    config = RunConfig(model=ModelConfig(**SHAPE, **changes))
    models: dict[str, TransformerLM] = {}
    for step, name in ((10, "checkpoint_10"), (20, "checkpoint_20"), (10, "checkpoint_best")):
        torch.manual_seed(len(models))
        models[name] = TransformerLM(config.model)
        state = {n: t.clone() for n, t in models[name].state_dict().items()}
        moments = {"exp_avg/ln_final.weight": torch.zeros(D)}
        save_checkpoint(folder / "checkpoints" / name, Checkpoint(step, config, state, moments))
    (folder / "config.toml").write_text(config.to_toml())
    return models


def same(state: dict[str, Tensor], model: TransformerLM) -> bool:
    wanted = model.state_dict()
    return state.keys() == wanted.keys() and all(torch.equal(state[n], t) for n, t in wanted.items())


def test_from_a_run_and_from_its_checkpoints(tmp_path: Path) -> None:
    models = own_run(tmp_path / "run")
    config, checkpoints = models["checkpoint_10"].config, tmp_path / "run" / "checkpoints"
    assert same(convert.load_initial(str(tmp_path / "run"), config), models["checkpoint_best"])
    for name, model in models.items():
        assert same(convert.load_initial(str(checkpoints / name), config), model)
        assert same(convert.load_initial(str(checkpoints / f"{name}.pt"), config), model)
    found = convert.config_of(tmp_path / "run")
    assert ModelConfig(**{"context_length": T, **found}) == config
    # The best one is damaged: the newest whole one, and a word about it.
    (checkpoints / "checkpoint_best" / "model.safetensors").write_bytes(b"no")
    said: list[str] = []
    assert same(convert.load_initial(str(tmp_path / "run"), config, said.append), models["checkpoint_20"])
    assert len(said) == 1 and "checkpoint_best" in said[0]
    with pytest.raises(BytekilnError, match="empty"):
        (tmp_path / "empty").mkdir()
        convert.load_initial(str(tmp_path / "empty"), config)


def test_a_run_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    own_run(tmp_path / "run", rope_theta=500.0)
    folder = str(tmp_path / "run")
    for changes, expected in [
        ({"num_layers": 3, "rope_theta": 500.0}, "num_layers: found 3; expected 2"),
        ({}, "rope_theta: found 10000.0; expected 500.0"),
    ]:
        with pytest.raises(MismatchError) as raised:
            convert.load_initial(folder, ModelConfig(**{**SHAPE, **changes}))
        assert str(raised.value) == f"{expected}, that of {folder}"


def test_what_may_differ_in_a_run(tmp_path: Path) -> None:
    models = own_run(tmp_path / "run")
    said: list[str] = []
    changed = {"context_length": 8, "max_seq_len": 2 * T, "dropout": 0.5, "attention_dropout": False, "init": "gpt2",
               "zero_init_projections": True, "logit_softcap": 15.0, "sliding_window": 4}  # fmt: skip
    config = ModelConfig(**{**SHAPE, **changed})
    assert same(convert.load_initial(str(tmp_path / "run"), config, said.append), models["checkpoint_best"])
    assert [line.partition(":")[0] for line in said] == ["logit_softcap", "sliding_window", "max_seq_len"]


def test_padding_comes_and_goes(tmp_path: Path) -> None:
    plain = own_run(tmp_path / "plain")["checkpoint_best"]
    padded = own_run(tmp_path / "padded", pad_vocab=True)["checkpoint_best"]
    assert same(convert.load_initial(str(tmp_path / "padded"), padded.config), padded)  # its own rows, to the bit
    for source, target in ((plain, padded), (padded, plain)):
        model = TransformerLM(target.config)
        where = tmp_path / ("padded" if source is padded else "plain")
        model.load_state_dict(convert.load_initial(str(where), target.config))
        assert distance(model, source) < 1e-6


def test_experts(tmp_path: Path) -> None:
    """The bias of the router comes and goes with the way of balancing; top_k is said."""
    moe = {"ffn": "moe", "num_experts": 4, "d_ff": 16}
    own_run(tmp_path / "loss", **moe)
    models = own_run(tmp_path / "bias", **moe, load_balancing="bias")
    said: list[str] = []
    state = convert.load_initial(
        str(tmp_path / "loss"), ModelConfig(**SHAPE, **moe, load_balancing="bias", expert_top_k=1), said.append
    )
    assert state.keys() == models["checkpoint_best"].state_dict().keys()
    assert not any(t.any() for n, t in state.items() if n.endswith("router_bias"))
    assert [line.partition(":")[0] for line in said] == ["expert_top_k"]
    assert same(
        convert.load_initial(str(tmp_path / "bias"), models["checkpoint_best"].config), models["checkpoint_best"]
    )
    back = TransformerLM(ModelConfig(**SHAPE, **moe))
    back.load_state_dict(convert.load_initial(str(tmp_path / "bias"), back.config))
    with pytest.raises(MismatchError, match="num_experts: found 8; expected 4"):
        convert.load_initial(str(tmp_path / "bias"), ModelConfig(**SHAPE, ffn="moe", d_ff=16))
