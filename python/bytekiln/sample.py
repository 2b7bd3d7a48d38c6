"""Text from a model: one token after the other, streamed as it comes.

In: a model, a tokenizer, a prompt. Out: an iterator of token ids, or of pieces of text. Called by `cli_lm`
and by users.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bytekiln.characters import AnyTokenizer, from_json_any, load_any
from bytekiln.checkpoint import weights_of
from bytekiln.config import ModelConfig
from bytekiln.errors import ConfigError, FileError, MismatchError
from bytekiln.model import KVCache, TransformerLM


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits."""

    temperature: float = 0.8
    """Logits are divided by it; 0 takes the most likely token."""
    top_p: float = 1.0
    """Only the most likely tokens whose probabilities sum to this; the one that crosses it stays in."""
    top_k: int = 0
    """Only this many of the most likely tokens; 0: all."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: a value is outside its range.
        """
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature: found {self.temperature}; expected 0 or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p: found {self.top_p}; expected more than 0 and at most 1")
        if self.top_k < 0:
            raise ConfigError(f"top_k: found {self.top_k}; expected 0 or more")


def next_token_probabilities(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """The distribution that is drawn from, float64 on the CPU; zero outside top-k and top-p.

    Top-p is nucleus sampling (Holtzman et al. 2020): the smallest set of most likely tokens whose sum is at least
    p. Top-k comes first, then top-p on what it leaves. Of equally likely tokens the smallest ids are kept.
    """
    logits_V = logits_V.detach().to("cpu", torch.float64)
    if sampling.temperature == 0:
        return torch.zeros_like(logits_V).index_fill_(0, logits_V.argmax(), 1.0)
    p_V = torch.softmax((logits_V - logits_V.max()) / sampling.temperature, dim=-1)  # however small the divisor
    order = torch.argsort(p_V, descending=True, stable=True)
    sorted_p = p_V[order]
    if 0 < sampling.top_k < len(sorted_p):
        sorted_p[sampling.top_k :] = 0
        sorted_p /= sorted_p.sum()
    if sampling.top_p < 1:
        before = sorted_p.cumsum(0) - sorted_p
        sorted_p[before >= sampling.top_p] = 0
    return torch.zeros_like(p_V).index_copy_(0, order, sorted_p / sorted_p.sum())


@torch.no_grad()
def generate(
    model: TransformerLM,
    prompt: Sequence[int],
    *,
    max_new_tokens: int = 256,
    sampling: Sampling | None = None,
    seed: int = 0,
    eot_id: int | None = None,
    vocab_size: int | None = None,
) -> Iterator[int]:
    """Draw tokens after a prompt, one at a time, until `max_new_tokens` or the end-of-text token (not given out).

    Inside the context the keys and values of what was read are kept, so each token is read once. Behind it the
    window slides: every further token is drawn from the last `context_length` tokens, read anew.

    Args:
        model: in evaluation mode.
        prompt: ids to continue; at least one.
        max_new_tokens: the most that is drawn.
        sampling: temperature, top-p, top-k.
        seed: the same seed, model and prompt give the same tokens.
        eot_id: the token that ends a text.
        vocab_size: only ids below it are drawn: the tokenizer's size, where the model's is larger.

    Raises:
        ConfigError: the model sees both sides; the prompt is empty, or has an id that the model does not know; the
            seed is out of range.
    """
    check_continues(model.config, "model")
    ids = [int(i) for i in prompt]
    if not ids:
        raise ConfigError("prompt: found no tokens; expected at least one (the end-of-text token starts a new text)")
    if outside := next((i for i in ids if not 0 <= i < model.config.vocab_size), None):
        raise ConfigError(f"prompt: found id {outside}; expected 0 … {model.config.vocab_size - 1}, the model's tokens")
    if not 0 <= seed < 2**63:
        raise ConfigError(f"seed: found {seed}; expected 0 … 2^63 - 1")
    sampling = sampling or Sampling()
    device = next(model.parameters()).device
    window = model.config.context_length
    generator = torch.Generator().manual_seed(seed)
    cache: KVCache | None = None
    for _ in range(max_new_tokens):
        if len(ids) > window:
            logits_TxV = model(torch.tensor([ids[-window:]], device=device))[0]
        else:
            unread = ids if cache is None else ids[-1:]
            cache = cache or KVCache(model.config.num_layers)
            logits_TxV = model(torch.tensor([unread], device=device), cache)[0]
        p_V = next_token_probabilities(logits_TxV[-1, :vocab_size], sampling)
        token = int(torch.multinomial(p_V, 1, generator=generator))
        if token == eot_id:
            return
        yield token
        ids.append(token)


def check_continues(config: ModelConfig, where: str | Path) -> None:
    """See that a model can continue texts.

    Raises:
        ConfigError: it sees both sides (objective mlm); the message begins with `where`.
    """
    if config.bidirectional:
        raise ConfigError(
            f"{where}: found a model that fills in masked tokens (objective mlm) and does not continue texts; "
            "expected one that was trained with objective next_token"
        )


def decode_stream(tokenizer: AnyTokenizer, ids: Iterator[int]) -> Iterator[str]:
    """Text of the tokens as soon as it is whole characters; broken UTF-8 becomes U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in ids:
        if piece := decoder.decode(tokenizer.decode_bytes([token])):
            yield piece
    if rest := decoder.decode(b"", final=True):
        yield rest


def load_model(run: str | Path, *, device: str = "cpu") -> tuple[TransformerLM, str | None]:
    """The model of a run folder (its best checkpoint, else its newest) or of a checkpoint folder, ready to sample.

    Returns:
        The model in evaluation mode, and its tokenizer as the text of `tokenizer.json`, where the run knew one.

    Raises:
        FileError, FormatError, MismatchError: no whole checkpoint is there.
    """
    checkpoint = weights_of(run)
    model = TransformerLM(checkpoint.config.model)
    model.load_state_dict(checkpoint.model)
    return model.to(device).eval(), checkpoint.tokenizer_json


def tokenizer_for(
    model: TransformerLM, given: str | None, stored: str | None, run: str | Path, *, trained_with: str | None = None
) -> AnyTokenizer:
    """The tokenizer to speak with: the given one, else the run's own.

    Raises:
        FileError: neither is there.
        MismatchError: it is another than the run's, or larger than the model's vocabulary.
    """
    own = from_json_any(stored) if stored else None
    tokenizer = load_any(given) if given else own
    if tokenizer is None:
        raise FileError(f"{run}: found no tokenizer.json in the run; expected --tokenizer FILE")
    expected = own.hash if own is not None else trained_with
    if expected and tokenizer.hash != expected:
        raise MismatchError(
            f"{given}: found tokenizer hash {tokenizer.hash}; expected {expected}, with which {run} was trained"
        )
    if tokenizer.n_vocab > model.config.vocab_size:
        raise MismatchError(
            f"{given or run}: found {tokenizer.n_vocab} tokens; "
            f"expected at most {model.config.vocab_size}, the model's vocabulary"
        )
    return tokenizer


def prompt_ids(tokenizer: AnyTokenizer, start: str) -> list[int]:
    """Ids of a prompt; special tokens in it count as such. An empty one starts a text: the end-of-text token.

    Args:
        tokenizer: the model's.
        start: the text itself, or FILE:path for the contents of a file.

    Raises:
        FileError: the file cannot be read.
        ConfigError: the prompt is empty and the tokenizer has no end-of-text token.
    """
    if start.startswith("FILE:"):
        path = Path(start.removeprefix("FILE:"))
        try:
            start = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as exc:
            reason = exc.strerror.lower() if isinstance(exc, OSError) and exc.strerror else "invalid UTF-8"
            raise FileError(f"{path}: {reason}; expected a text file for the prompt") from None
    ids = tokenizer.encode(start, allowed_special="all")
    if ids:
        return ids
    if tokenizer.eot_id is None:
        raise ConfigError("prompt: found nothing, and the tokenizer has no end-of-text token; expected some text")
    return [tokenizer.eot_id]
