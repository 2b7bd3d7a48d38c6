"""What a run writes when it is asked the same things again: `samples/step_{step}.json` (docs/formats.md).

In: the model and the prompts of the config. Out: a file. Called by `record` at the end and every `sample_interval`.
The same weights give the same file: every prompt has its own generator, and the global one is not touched.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from bytekiln.characters import AnyTokenizer
from bytekiln.config import RunConfig
from bytekiln.errors import BytekilnError, ConfigError, FileError
from bytekiln.metrics import write_atomically
from bytekiln.model import TransformerLM
from bytekiln.sample import Sampling, generate

SAMPLING = Sampling()
"""As `lm-sample` draws without flags."""
SEEDS = 2**63
_NAME = re.compile(r"step_(\d+)\.json")


def check_prompts(config: RunConfig, tokenizer: AnyTokenizer | None) -> str | None:
    """What to say before a run about its samples: why there will be none, if not by choice.

    Raises:
        ConfigError: a prompt has something that the tokenizer does not know.
    """
    if not config.training.sample_tokens:
        return None
    if tokenizer is None:
        return "samples: found no tokenizer; the run writes none"
    if config.model.bidirectional:
        return "samples: a model that sees both sides does not continue texts; the run writes none"
    _prompts(config, tokenizer)
    return None


def write_samples_file(
    folder: Path,
    model: TransformerLM,
    tokenizer: AnyTokenizer | None,
    config: RunConfig,
    step: int,
    stop: Callable[[], bool] = lambda: False,
) -> Path | None:
    """Continue the fixed prompts and write what came.

    Args:
        folder: the run folder.
        model: in any mode, which it keeps.
        tokenizer: the run's.
        config: `sample_prompts`, `sample_tokens` and `seed` count.
        step: optimizer steps done.
        stop: asked before each token; True ends it, and nothing is written: a signal has come, or the time is over.
            What was written before stays. It has no part in what is drawn.

    Returns:
        The file; None where it was stopped, where `check_prompts` says why there is none, or with `sample_tokens` 0.

    Raises:
        FileError: it cannot be written.
    """
    count = config.training.sample_tokens
    if tokenizer is None or not count or config.model.bidirectional:
        return None
    samples, was = [], model.training
    model.eval()
    try:
        for i, (prompt, prompt_ids) in enumerate(_prompts(config, tokenizer)):
            seed = (config.training.seed + i) % SEEDS
            drawn = generate(
                model,
                prompt_ids,
                max_new_tokens=count,
                sampling=SAMPLING,
                seed=seed,
                eot_id=tokenizer.eot_id,
                vocab_size=tokenizer.n_vocab,
            )
            ids = _until(stop, drawn)
            if ids is None:
                return None
            text = tokenizer.decode(ids)
            samples.append({"prompt": prompt, "prompt_ids": prompt_ids, "seed": seed, "ids": ids, "text": text})
    finally:
        model.train(was)
    about = {
        "format": "bytekiln-samples",
        "version": 1,
        "step": step,
        "seed": config.training.seed,
        "temperature": SAMPLING.temperature,
        "top_p": SAMPLING.top_p,
        "top_k": SAMPLING.top_k,
        "max_new_tokens": count,
        "tokenizer_hash": tokenizer.hash,
        "samples": samples,
    }
    path = folder / "samples" / f"step_{step}.json"
    try:
        path.parent.mkdir(exist_ok=True)
    except OSError as exc:
        raise FileError(
            f"{path.parent}: cannot be made: {(exc.strerror or str(exc)).lower()}; expected a writable folder"
        ) from None
    write_atomically(path, json.dumps(about, ensure_ascii=False, indent=1).encode() + b"\n")
    return path


def _until(stop: Callable[[], bool], drawn: Iterable[int]) -> list[int] | None:
    """All that is drawn; None where `stop` said so before the next one."""
    ids: list[int] = []
    tokens = iter(drawn)
    while not stop():
        token = next(tokens, None)
        if token is None:
            return ids
        ids.append(token)
    return None


def remove_samples(folder: Path, behind: int = -1) -> None:
    """Remove a run's samples of steps behind `behind`: they come again on a resume, or belong to an overwritten run."""
    for path in (folder / "samples").glob("step_*.json"):
        named = _NAME.fullmatch(path.name)
        if named and int(named[1]) > behind:
            path.unlink()


def _prompts(config: RunConfig, tokenizer: AnyTokenizer) -> list[tuple[str, list[int]]]:
    """Prompts and their ids; special tokens in them count as such."""
    texts = [line for line in config.training.sample_prompts.split("\n") if line.strip()]
    out = []
    for text in texts:
        try:
            out.append((text, list(tokenizer.encode(text, allowed_special="all"))))
        except BytekilnError as exc:
            raise ConfigError(f"sample_prompts: {exc}") from None
    return out or [_beginning(tokenizer)]


def _beginning(tokenizer: AnyTokenizer) -> tuple[str, list[int]]:
    """The start of a text: the end-of-text token, else a line break, else the first token there is."""
    if tokenizer.eot_id is not None:
        return "", [tokenizer.eot_id]
    try:
        return "\n", list(tokenizer.encode("\n"))
    except BytekilnError:
        return tokenizer.decode([0]), [0]
