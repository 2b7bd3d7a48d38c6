"""A text's loss under a model, in windows of a stated length.

In: a scorer, token files and texts. Out: the loss, perplexity, bits per byte and accuracy of each, and the loss of its
parts, which a paired test compares. Everything is deterministic: what goes into a batch depends on the data and the
batch size alone. Called by `cli_score`.

Shapes are suffixes of names: B windows of a batch, T positions, S = T + 1 ids, N tokens or targets, U units.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from bytekiln.characters import AnyTokenizer
from bytekiln.errors import FileError, FormatError, MismatchError, TextError
from bytekiln.score.scorer import Scorer, token_scores
from bytekiln.score.tasks import unpacked
from bytekiln.tokenfile import TokenFile
from bytekiln.tokens.mapping import looks_like

LEAST_DOCUMENTS = 30
"""With fewer documents the units of a paired test are stretches of text."""
STRETCH = 1000
"""Bytes of such a stretch; tokens where nobody knows the bytes."""
IMPLAUSIBLE_BITS = 0.3
"""Bits a byte below which a loss is not believed.

The lowest published for text that a model had not seen: about 0.66 of Wikipedia, by Chinchilla's 70 billion parameters
(Delétang et al. 2023), and about 0.38 of program code, by Gopher's 280 billion (Rae et al. 2021). TinyStories, made to
be easy, ends at about 0.4 (1.15 nats a token of 4.1 bytes). Below 0.3 the targets were visible, or the text trained on.
"""


class Stream(NamedTuple):
    """Ids to score, and what they stand for."""

    name: str
    ids: NDArray[Any]
    bytes_N: NDArray[np.int64] | None
    """Bytes of text of every token, none for special tokens; None where there is no tokenizer."""
    bytes_per_token: float | None
    """On average, where there is no tokenizer and a manifest tells."""
    unit_N: NDArray[np.int64]
    """Number of the document, or of the stretch of text, that a token belongs to: what a paired test compares."""
    units: str
    """What a unit is, in the plural."""
    documents_N: NDArray[np.int32] | None
    """Number of each token's document, where the model was trained not to look across their ends."""
    sha256: str


class WindowScore(NamedTuple):
    """Sums over the targets that one window scores."""

    window: int
    tokens: int
    nll: float
    correct: int
    units: list[tuple[int, float, int]]
    """(unit, nll, tokens), rising."""


@dataclass(frozen=True)
class TextScore:
    """What a text costs the model."""

    loss: float
    """Mean of -ln p(target) in nats a token."""
    accuracy: float
    tokens: int
    """Targets: every token but the first."""
    bytes: float | None
    """Of text behind the targets."""
    nll_U: NDArray[np.float64]
    """Sum of each unit, in nats."""
    weight_U: NDArray[np.float64]
    """Bytes of each unit, or tokens where the bytes are unknown."""

    @property
    def perplexity(self) -> float | None:
        """e to the loss, where a float holds it."""
        return math.exp(self.loss) if self.loss < 700 else None

    @property
    def bits_per_byte(self) -> float | None:
        """Comparable between tokenizers."""
        return self.loss * self.tokens / math.log(2) / self.bytes if self.bytes else None


def open_stream(scorer: Scorer, path: str, dtype: str | None = None) -> Stream:
    """A token file, or a text encoded with the run's tokenizer.

    Text is UTF-8, plain or packed; special tokens in it count as such, and one that has end-of-text tokens gets one at
    its end, as `bpe-encode` does it. Of JSON lines (`.jsonl`, packed or not) every row's `text` is a document.

    Args:
        scorer: the model.
        path: a file.
        dtype: of a raw token file without manifest.

    Raises:
        FileError: missing, unreadable, empty; or text without a tokenizer.
        FormatError, TextError: malformed, or ids that the model does not know.
        MismatchError: the file was made with another tokenizer.
    """
    tokenizer = scorer.tokenizer
    if _is_token_file(Path(path), dtype):
        file = TokenFile.open(path, dtype=dtype)
        if scorer.tokenizer_hash and file.tokenizer_hash and file.tokenizer_hash != scorer.tokenizer_hash:
            raise MismatchError(
                f"{path}: found tokenizer hash {file.tokenizer_hash}; expected {scorer.tokenizer_hash}, "
                f"with which {scorer.name} was trained"
            )
        file.check(scorer.model.config.vocab_size)
        ids = file.array.view(np.ndarray)
        eot = tokenizer.eot_id if tokenizer is not None else file.eot_id
        share = file.text_bytes / len(ids) if file.text_bytes else None
        return _stream(scorer, path, ids, eot, hashlib.sha256(np.ascontiguousarray(ids).data).hexdigest(), share)
    data = unpacked(Path(path))
    if tokenizer is None:
        raise FileError(f"{scorer.name}: found no tokenizer.json in the run; expected --tokenizer FILE for {path}")
    ids = _encoded(tokenizer, *_text(data, path), path)
    return _stream(scorer, path, ids, tokenizer.eot_id, hashlib.sha256(data).hexdigest(), None)


def _is_token_file(path: Path, dtype: str | None) -> bool:
    try:
        with path.open("rb") as file:
            if looks_like(file.read(16)):
                return True
    except OSError as exc:
        raise FileError(f"{path}: {(exc.strerror or 'unreadable').lower()}; expected a token file or a text") from None
    return bool(dtype) or path.suffix == ".bin" or path.with_name(path.name + ".json").is_file()


def _text(data: bytes, path: str) -> tuple[list[str], bool]:
    """The documents of JSON lines and true, or the whole text and false."""
    name = path.lower()
    for suffix in (".gz", ".xz", ".bz2"):
        name = name.removesuffix(suffix)
    try:
        if not name.endswith(".jsonl"):
            return [data.decode()], False
    except UnicodeDecodeError as exc:
        raise TextError(f"{path}: byte offset {exc.start}: invalid UTF-8; expected UTF-8 text") from None
    texts = []
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            try:
                texts.append(json.loads(line)["text"])
                texts[-1].encode()
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                found = line[:40].decode("utf-8", "replace")
                raise FormatError(
                    f"{path}: line {number}: found {found!r}; expected a JSON object with a text"
                ) from None
    return texts, True


def _encoded(tokenizer: AnyTokenizer, texts: list[str], rows: bool, path: str) -> NDArray[Any]:
    """`rows`: each text is a document of its own, in which nothing is a special token, however many there are."""
    eot, parts = tokenizer.eot_id, []
    for text in texts:
        try:
            ids = tokenizer.encode_to_numpy(text, allowed_special=() if rows else "all")
        except TextError as exc:
            raise TextError(f"{path}: {exc}") from None
        if eot is not None and (rows or (ids == eot).any()) and (not len(ids) or ids[-1] != eot):
            ids = np.append(ids, np.array([eot], ids.dtype))
        parts.append(ids)
    return np.concatenate(parts) if len(parts) > 1 else parts[0]


def _stream(
    scorer: Scorer, path: str, ids: NDArray[Any], eot: int | None, sha256: str, bytes_per_token: float | None
) -> Stream:
    """`bytes_per_token` is what a manifest says, for want of a tokenizer."""
    if len(ids) < 2:
        raise FormatError(f"{path}: found {len(ids)} token; expected at least two, one to predict the other from")
    lengths = None
    if scorer.tokenizer is not None:
        special = set(scorer.tokenizer.special_tokens.values())
        of_id = np.zeros(scorer.model.config.vocab_size, np.int64)
        for id, token in scorer.tokenizer.vocab.items():
            of_id[id] = 0 if id in special else len(token)
        lengths = of_id[ids]
    ends = ids == eot if eot is not None else np.zeros(len(ids), np.bool_)
    document_N = np.cumsum(ends) - ends
    unit_N, units = document_N, "documents"
    if document_N[-1] + 1 < LEAST_DOCUMENTS:
        begin_N = np.cumsum(lengths) - lengths if lengths is not None else np.arange(len(ids))
        # A special token has no bytes: it belongs to what is before it, also where the next stretch begins there.
        begin_N = np.maximum(begin_N - (lengths == 0), 0) if lengths is not None else begin_N
        unit_N, units = begin_N // STRETCH, f"stretches of {STRETCH} {'bytes' if lengths is not None else 'tokens'}"
    masked = scorer.config is not None and scorer.config.data.document_mask and eot is not None
    documents_N = document_N.astype(np.int32) if masked else None
    return Stream(path, ids, lengths, bytes_per_token, unit_N, units, documents_N, sha256)


def windows(tokens: int, context: int, stride: int) -> list[tuple[int, int, int]]:
    """(start, end, first): inputs are start … end-1, their targets one later, of which those from `first` on count.

    Every target 1 … tokens-1 counts once. A window begins every `stride` tokens; from the second on each target that
    counts has at least context - stride + 1 inputs before it. stride = context is the disjoint windows of an
    evaluation while training; the last window ends at the last token and overlaps with the one before it.

    >>> windows(10, 4, 4), windows(8, 4, 2)
    ([(0, 4, 1), (4, 8, 5), (5, 9, 9)], [(0, 4, 1), (2, 6, 5), (3, 7, 7)])
    """
    out, counted, start = [], 0, 0
    while counted < tokens - 1:
        end = min(start + context, tokens - 1)
        start = max(0, end - context)
        out.append((start, end, counted + 1))
        counted = end
        start = end - context + stride
    return out


def batched(plan: list[tuple[int, int, int]], chosen: list[int], size: int) -> list[list[int]]:
    """The chosen windows, `size` in a batch, of one length each."""
    out: list[list[int]] = []
    for i in chosen:
        width = plan[i][1] - plan[i][0]
        if not out or len(out[-1]) >= size or width != plan[out[-1][0]][1] - plan[out[-1][0]][0]:
            out.append([])
        out[-1].append(i)
    return out


@torch.no_grad()
def score_windows(
    scorer: Scorer, stream: Stream, plan: list[tuple[int, int, int]], batch: list[int]
) -> list[WindowScore]:
    """Score the windows with the numbers in `batch`, all of one length."""
    device = scorer.device
    ids_BxS = torch.from_numpy(np.stack([stream.ids[plan[i][0] : plan[i][1] + 1] for i in batch]).astype(np.int64))
    ids_BxS = ids_BxS.to(device)
    documents_BxT = None
    if stream.documents_N is not None:
        documents = np.stack([stream.documents_N[plan[i][0] : plan[i][1]] for i in batch])
        documents_BxT = torch.from_numpy(documents - documents[:, :1]).to(device)
    with scorer.autocast():
        x_BxTxD = scorer.model.features(ids_BxS[:, :-1], None, documents_BxT).x_BxTxD
        first_B = torch.tensor([plan[i][2] - plan[i][0] - 1 for i in batch], device=device)
        counts_BxT = torch.arange(x_BxTxD.shape[1], device=device) >= first_B[:, None]
        nll_N, hit_N = token_scores(scorer, x_BxTxD[counts_BxT], ids_BxS[:, 1:][counts_BxT])
    nll, hit = nll_N.double().cpu().numpy(), hit_N.cpu().numpy()
    out, at = [], 0
    for i in batch:
        _, end, first = plan[i]
        count = end - first + 1
        unit_N = stream.unit_N[first : end + 1]
        cuts = np.flatnonzero(np.diff(unit_N, prepend=unit_N[0] - 1))
        sums = np.add.reduceat(nll[at : at + count], cuts).tolist()
        sizes = np.diff(cuts, append=count).tolist()
        units = list(zip(unit_N[cuts].tolist(), sums, sizes, strict=True))
        out.append(WindowScore(i, count, math.fsum(sums), int(hit[at : at + count].sum()), units))
        at += count
    return out


def total(stream: Stream, plan: list[tuple[int, int, int]], scores: dict[int, WindowScore]) -> TextScore:
    """What the windows say together, however they came.

    Raises:
        FormatError: there was nothing to predict.
    """
    if not scores:
        raise FormatError(f"{stream.name}: found fewer than two tokens; expected at least one to predict")
    ordered = [scores[i] for i in sorted(scores)]
    tokens = sum(s.tokens for s in ordered)
    U = int(stream.unit_N[-1]) + 1
    nll_U, weight_U = np.zeros(U), np.zeros(U)
    for s in ordered:
        for unit, nll, count in s.units:
            nll_U[unit] += nll
            weight_U[unit] += count if stream.bytes_N is None else 0
        if stream.bytes_N is not None:
            part = slice(plan[s.window][2], plan[s.window][1] + 1)
            np.add.at(weight_U, stream.unit_N[part], stream.bytes_N[part])
    return TextScore(
        loss=math.fsum(s.nll for s in ordered) / tokens,
        accuracy=sum(s.correct for s in ordered) / tokens,
        tokens=tokens,
        bytes=_bytes(stream, tokens, weight_U),
        nll_U=nll_U,
        weight_U=weight_U,
    )


def _bytes(stream: Stream, tokens: int, weight_U: NDArray[np.float64]) -> float | None:
    if stream.bytes_N is not None:
        return float(weight_U.sum())
    return stream.bytes_per_token * tokens if stream.bytes_per_token else None


def implausible(score: TextScore) -> str | None:
    """A sentence about a loss that is too good to be true, else None.

    Where the bytes are unknown a token counts as one, so that only what is certain is said.
    """
    bits = score.bits_per_byte
    known = bits is not None
    bits = bits if bits is not None else score.loss / math.log(2)
    if bits >= IMPLAUSIBLE_BITS:
        return None
    return (
        f"implausible loss: {bits:.3f} bits a {'byte' if known else 'token'} is below {IMPLAUSIBLE_BITS}, which no "
        "model is known to reach on text that it had not seen; is it part of the training data?"
    )
