"""Training as data: where tokens come from, how weights move, how long and what is done in between.

In: values. Out: frozen, checked sections that `fields` joins with the model and the run folder. Imports no torch.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from bytekiln.errors import ConfigError
from bytekiln.section import Float, Int, Seconds, Section, setting


class DataConfig(Section):
    """Where the tokens come from, and how windows are cut from them."""

    train_data: str = setting(
        "",
        "token file to train on (from bpe-encode, or its shards; llm.c's, Megatron's, nanoGPT's); several: a.npy,b.npy",
        also=["train_path"],
        main=True,
        math=False,
    )
    data_weights: str = setting("", "shares of the windows from each of several files, as 0.7,0.3; unset: by size")
    val_data: str = setting(
        "", "token file to validate on; optional", also=["valid_path", "val_path", "valid_data"], main=True, math=False
    )
    tokenizer: str = setting(
        "", "tokenizer of the data: checked against it, copied into the run, used for samples", main=True, math=False
    )
    vocab_path: str = setting("", "tokenizer as a pair of files: the vocabulary", math=False)
    merges_path: str = setting("", "tokenizer as a pair of files: the merges", math=False)
    data_dtype: Literal["", "uint16", "uint32", "int32", "int64"] = setting(
        "", "type of the ids in a file without header and manifest", math=False
    )
    sampling: Literal["shuffled", "random", "sequential"] = setting(
        "shuffled",
        "order of the windows: shuffled without replacement, from random starts (the course's and nanoGPT's), "
        "or as they stand in the file",
    )
    windows: Literal["stream", "packed", "padded"] = setting(
        "stream",
        "what a window is: context_length tokens anywhere in the file, whole documents packed by best fit, or one "
        "document padded to the longest of its batch",
    )
    document_mask: bool = setting(False, "attention does not cross from one document into the next")
    max_tokens: Int = setting(0, "train on the first so many tokens of the data only; 0: all", ge=0)
    num_documents: Int = setting(0, "train on the first so many documents of the data only; 0: all", ge=0)
    token_corruption: Float = setting(
        0.0, "share of the input tokens that a mask token replaces while training (next_token only)", ge=0, lt=1
    )
    prefetch: Int = setting(2, "batches made ready ahead in a thread; 0: none", math=False, ge=0)

    @field_validator("data_weights")
    @classmethod
    def _one_spelling(cls, value: str) -> str:
        return ",".join(part.strip() for part in value.split(","))


class OptimizerConfig(Section):
    """The optimizer, its learning-rate schedule, clipping, averaging."""

    optimizer: Literal["adamw", "muon", "lion", "sgd"] = setting(
        "adamw", "update rule; muon: orthogonalised momentum for the blocks' matrices, AdamW for the rest", main=True
    )
    lr: Float = setting(3e-4, "peak learning rate", also=["max_lr", "learning_rate"], main=True, gt=0)
    min_lr: Float | None = setting(
        None, "learning rate at the end of the decay; unset: min_lr_ratio times lr", main=True, ge=0
    )
    min_lr_ratio: Float = setting(0.1, "min_lr over lr where min_lr is unset", ge=0, le=1)
    schedule: Literal["constant", "linear", "cosine", "trapezoid", "inverse_sqrt"] = setting(
        "cosine", "shape of the decay; trapezoid (WSD): constant, then linear over the last decay_fraction", main=True
    )
    warmup_steps: Int = setting(0, "steps of linear warm-up", also=["warmup_iters"], main=True, ge=0)
    warmup_rule: Literal["course", "nanogpt", "fraction"] = setting(
        "course",
        "warm-up of step t (from 0) over T: t/T (course), (t+1)/(T+1) (nanogpt), or progress over warmup_fraction",
    )
    warmup_fraction: Float = setting(0.0, "share of the run that warms up, for warmup_rule fraction", ge=0, le=1)
    decay_lr: bool = setting(True, "decay after the warm-up; false: constant", main=True)
    decay_steps: Int = setting(
        0, "step at which the decay ends, warm-up included; 0: max_steps", also=["cosine_iters", "lr_decay_iters"], ge=0
    )
    decay_fraction: Float = setting(0.2, "share of the run over which a trapezoid falls", gt=0, le=1)
    progress: Literal["auto", "steps", "tokens", "seconds"] = setting(
        "auto", "what the schedule counts; auto: whichever of max_steps, max_time, token_budget ends the run first"
    )
    weight_decay: Float = setting(0.01, "decoupled weight decay, on matrices only", main=True, ge=0)
    decay_embeddings: bool = setting(True, "weight decay pulls on embeddings and head too, not on the blocks alone")
    cautious_weight_decay: bool = setting(False, "decay a weight only where the update pulls it towards zero as well")
    beta1: Float = setting(0.9, "AdamW, Lion: decay of the mean of gradients", ge=0, lt=1)
    beta2: Float = setting(
        0.999, "AdamW, Lion: decay of the mean of squared gradients (Lion: of gradients)", ge=0, lt=1
    )
    eps: Float = setting(1e-8, "AdamW: added to the denominator", gt=0)
    momentum: Float = setting(0.95, "Muon, SGD: decay of the momentum", ge=0, lt=1)
    nesterov: bool = setting(True, "Muon, SGD: look ahead by one step of momentum")
    ns_steps: Int = setting(5, "Muon: Newton-Schulz iterations", ge=1, le=10)
    ns_coefficients: Literal["polar_express", "jordan"] = setting(
        "polar_express", "Muon: polynomials of the iterations (Amsel et al. 2025, Jordan 2024)"
    )
    muon_scale: Literal["shape", "rms"] = setting(
        "shape", "Muon: update times √max(1, rows/cols), or 0.2·√max(rows, cols), which is as large as AdamW's"
    )
    normuon: bool = setting(False, "Muon: divide each row of the update by its running root mean square (NorMuon)")
    normuon_beta2: Float = setting(0.95, "NorMuon: decay of the mean square", ge=0, lt=1)
    embedding_lr_scale: Float = setting(1.0, "learning rate of the embeddings over lr", gt=0)
    head_lr_scale: Float = setting(1.0, "learning rate of the output head over lr", gt=0)
    scalar_lr_scale: Float = setting(
        1.0, "learning rate of norms, biases, other vectors, routers and gates over lr", gt=0
    )
    grad_clip: Float = setting(
        1.0, "largest norm of the gradient; 0: no clipping", also=["max_grad_norm"], main=True, ge=0
    )
    averaging: Literal["none", "ema", "tail"] = setting(
        "none", "weights that are evaluated and sampled: the last, an exponential average, or the mean of the tail"
    )
    ema_decay: Float = setting(0.999, "decay a step of the exponential average", gt=0, lt=1)
    tail_fraction: Float = setting(0.2, "share of the run, at its end, that the tail average covers", gt=0, le=1)

    @property
    def floor_lr(self) -> float:
        """Learning rate at the end of the decay."""
        return self.min_lr if self.min_lr is not None else self.lr * self.min_lr_ratio

    @field_validator("schedule", mode="before")
    @classmethod
    def _other_name(cls, value: object) -> object:
        return "trapezoid" if value == "wsd" else value

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_lr is not None and self.min_lr > self.lr:
            raise ConfigError(f"min_lr: found {self.min_lr:g}; expected at most lr, {self.lr:g}")
        if self.warmup_fraction and self.warmup_rule != "fraction":
            raise ConfigError(
                f"warmup_fraction: found {self.warmup_fraction:g} with warmup_rule {self.warmup_rule}; "
                "expected warmup_rule = fraction"
            )
        if self.warmup_steps and self.warmup_rule == "fraction":
            raise ConfigError(
                f"warmup_steps: found {self.warmup_steps} with warmup_rule fraction; expected warmup_fraction"
            )
        return self


class TrainingConfig(Section):
    """The loop: how long, on what, and what is done in between."""

    objective: Literal["next_token", "mlm"] = setting(
        "next_token", "predict the next token, or masked ones from both sides (BERT's masked language model)"
    )
    mlm_share: Float = setting(
        0.15, "mlm: share of the tokens to predict; 80 % of them masked, 10 % random, 10 % left (BERT)", gt=0, lt=1
    )
    batch_size: Int = setting(32, "windows in a micro-step", main=True, ge=1)
    grad_accum_steps: Int = setting(
        1, "micro-steps in an optimizer step", also=["gradient_accumulation_steps"], main=True, ge=1
    )
    batch_stages: str = setting(
        "", "grow the batch: '0.3:2 0.6:4' takes 2 and 4 times the micro-steps from these shares of the run on"
    )
    max_steps: Int = setting(
        100_000,
        "optimizer steps in all, those before a resume included",
        also=["max_iters"],
        main=True,
        math=False,
        ge=1,
    )
    max_time: Seconds = setting(
        0.0, "wall-clock budget, as 90m or 5400; the decay ends inside it; 0: none", main=True, math=False, ge=0
    )
    max_time_counts: Literal["all", "steps"] = setting(
        "all", "what max_time counts: everything from the start on, or the steps alone (no compile, no evaluation)"
    )
    token_budget: Int = setting(0, "training targets after which the run ends; 0: no limit", math=False, ge=0)
    z_loss: Float = setting(0.0, "weight of the mean square of ln Σ exp(logits) in the loss (PaLM)", ge=0)
    loss_chunk: Annotated[Int, Field(ge=0)] | Literal["auto"] = setting(
        "auto",
        "positions whose logits exist at once; 0: all; auto: all below 131,072 logits, else as many as fill 32 MB",
    )
    eval_interval: Int = setting(
        1000, "steps between evaluations; 0: only at the start and the end", main=True, math=False, ge=0
    )
    num_eval_batches: Int = setting(
        100,
        "batches in an evaluation, of validation and of training data each; 0: the whole validation set",
        also=["eval_iters"],
        main=True,
        math=False,
        ge=0,
    )
    eval_context_length: Int = setting(
        0, "tokens in a window of evaluations, on which their loss depends; 0: context_length", math=False, ge=0
    )
    final_eval: Literal["same", "whole"] = setting(
        "same", "the last evaluation: as the others, or on the whole validation set", math=False
    )
    eval_train_data: bool = setting(
        True, "evaluate as much of the training data beside the validation data", math=False
    )
    early_stopping_patience: Int = setting(
        0,
        "end after so many evaluations without a better validation loss; 0: never",
        also=["patience"],
        math=False,
        ge=0,
    )
    early_stopping_min_delta: Float = setting(
        0.0, "how much lower a validation loss must be to count as better", also=["min_delta"], math=False, ge=0
    )
    skip_spikes: bool = setting(False, "leave out the update of a step whose loss lies spike_sigma above the usual")
    spike_sigma: Float = setting(6.0, "skip_spikes: standard deviations of the recent losses", gt=0)
    log_interval: Int = setting(
        100, "steps between lines on the console (metrics.csv has every step)", math=False, ge=1
    )
    stats_interval: Int = setting(
        0, "steps between rows of layers.csv: gradients and activations a layer; 0: none", math=False, ge=0
    )
    show_gradients: bool = setting(False, "print the gradients of every layer as bars at each log_interval", math=False)
    checkpoint_interval: Int = setting(
        5000,
        "steps between checkpoints; 0: only the best and the final one",
        also=["save_interval"],
        main=True,
        math=False,
        ge=0,
    )
    keep_checkpoints: Int = setting(0, "numbered checkpoints kept, newest first; 0: all", math=False, ge=0)
    sample_interval: Int = setting(0, "steps between samples into samples/; 0: only at the end", math=False, ge=0)
    sample_prompts: str = setting(
        "", "texts to continue in samples/, one a line; unset: the start of a text", math=False
    )
    sample_tokens: Int = setting(100, "tokens of each sample in samples/; 0: no samples", math=False, ge=0)
    seed: Int = setting(42, "seed of initialisation, data order and dropout", main=True, ge=0, le=2**63 - 1)
    init_from: str = setting(
        "", "start from the weights of a run, a checkpoint, or a folder of Hugging Face's GPT-2 or Llama"
    )
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps", main=True, math=False)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting(
        "auto",
        "type of the matrix products; weights stay fp32; auto: bf16 where the hardware has instructions for it",
        also=["dtype"],
        main=True,
    )
    attention: Literal["auto", "native", "sdpa", "flex", "reference"] = setting(
        "auto",
        "attention kernel: our own (CPU, fp32), torch's, FlexAttention (CUDA), plain tensors; auto: by device and mask",
    )
    flash: Literal["torch", "auto", "FA3", "FA4"] = setting(
        "torch", "FlashAttention on CUDA: torch's own, the newest that is installed (auto), or this one", math=False
    )
    compile: bool | Literal["auto"] = setting(
        "auto", "torch.compile: true, false, or auto (only where it pays for itself)", main=True, math=False
    )
    target_gpu: str = setting("", "GPU that the run is meant for, as H100: lm-plan plans for it", math=False)
    yardstick: str = setting(
        "", "published losses that lm-plan and record.json compare with: owt-32k, or a TOML file", math=False
    )
    parallel: Literal["auto", "ddp", "fsdp"] = setting(
        "auto", "several processes (torchrun): a copy of the model in each (ddp), or shards of it (fsdp); auto: ddp",
        math=False,
    )  # fmt: skip

    @field_validator("precision", mode="before")
    @classmethod
    def _torchs_names(cls, value: object) -> object:
        return {"bfloat16": "bf16", "float32": "fp32", "float16": "fp16", "half": "fp16"}.get(str(value), value)

    @field_validator("batch_stages")
    @classmethod
    def _readable(cls, value: str) -> str:
        stages_of(value)
        return value


def stages_of(text: str) -> list[tuple[float, int]]:
    """`batch_stages` as (share of the run from which it holds, multiple of grad_accum_steps), the first at 0.

    >>> stages_of("0.3:2 0.6:4")
    [(0.0, 1), (0.3, 2), (0.6, 4)]

    Raises:
        ConfigError: it does not read like that, or does not rise.
    """
    stages = [(0.0, 1)]
    for part in text.split():
        share, colon, multiple = part.partition(":")
        try:
            stage = float(share), int(multiple)
        except ValueError:
            colon = ""
            stage = 0.0, 0
        if not colon or not 0 <= stage[0] < 1 or stage[1] < 1 or stage[0] <= stages[-1][0]:
            raise ConfigError(
                f"batch_stages: found {part!r} in {text!r}; expected rising SHARE:MULTIPLE, as '0.3:2 0.6:4'"
            )
        stages.append(stage)
    return stages
