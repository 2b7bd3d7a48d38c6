"""Evaluation: the mean over its targets, the same every time, without dropout, and without waiting in between."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bytekiln.data import Batch, EvalSource, open_data
from bytekiln.errors import FormatError
from bytekiln.evaluate import Scores, bits_per_byte, evaluate, evaluation_mode
from bytekiln.loss import IGNORED
from bytekiln.model import TransformerLM
from bytekiln.objective import Objective
from lm_runs import VOCAB, tiny, tokens

CPU = torch.device("cpu")


def build(folder: Path, **values: object) -> Objective:
    run = tiny(folder, **values)
    torch.manual_seed(3)
    return Objective(TransformerLM(run.model), run)


def validation(folder: Path, count: int = 100, **values: object) -> EvalSource:
    path = tokens(folder / "v.npy", count, seed=2)
    source = open_data(tiny(folder, val_data=str(path), **values), None).val
    assert source is not None
    return source


def batches(*target_rows: Sequence[Sequence[int]], documents: Tensor | None = None) -> list[Batch]:
    """Batches with given targets and random inputs."""
    draw, out = torch.Generator().manual_seed(0), []
    for rows in target_rows:
        targets = torch.tensor(rows)
        inputs = torch.randint(0, VOCAB, targets.shape, generator=draw)
        out.append(Batch(inputs, targets, documents, int((targets != IGNORED).sum())))
    return out


def by_hand(objective: Objective, given: list[Batch]) -> tuple[float, float, int]:
    """Mean loss, share of hits and number of targets, one target at a time, a window at a time."""
    losses, hits = [], 0
    model = objective.model.eval()
    for inputs, targets, documents, _ in given:
        for row in range(len(inputs)):
            seen = None if documents is None else documents[row : row + 1]
            with torch.no_grad():
                logits = model(inputs[row : row + 1], None, seen)[0].double()
            for t, target in enumerate(targets[row].tolist()):
                if target != IGNORED:
                    losses.append(-float(logits[t].log_softmax(-1)[target]))
                    hits += int(logits[t].argmax()) == target
    return math.fsum(losses) / len(losses), hits / len(losses), len(losses)


def learnt(objective: Objective, given: list[Batch]) -> None:
    """Train a little, so that accuracy is neither 0 nor 1."""
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-2)
    for _ in range(8):
        for inputs, targets, documents, count in given:
            (objective(inputs, targets, documents).total / max(count, 1)).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_dropout_is_off_and_comes_back(tmp_path: Path) -> None:
    source = validation(tmp_path)
    objective = build(tmp_path, dropout=0.5).train()
    first = evaluate(objective, source.batches(3, 4), CPU)
    again = evaluate(objective, source.batches(3, 4), CPU)
    assert again == first == evaluate(build(tmp_path), source.batches(3, 4), CPU)
    assert all(part.training for part in objective.modules())
    evaluate(objective.eval(), source.batches(3, 4), CPU)
    assert not any(part.training for part in objective.modules())


def test_every_part_gets_its_own_mode_back(tmp_path: Path) -> None:
    objective = build(tmp_path, dropout=0.5).train()
    objective.model.layers[0].eval()
    before = [part.training for part in objective.modules()]
    with evaluation_mode(objective):
        assert not any(part.training for part in objective.modules())
    assert [part.training for part in objective.modules()] == before and len(set(before)) == 2


@pytest.mark.parametrize("where", ["batches", "scores"])
def test_mode_comes_back_after_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    objective = build(tmp_path, dropout=0.5).train()

    def interrupted(*_: object) -> Any:
        raise KeyboardInterrupt

    def broken() -> Iterator[Batch]:
        yield from batches([[1, 2]])
        assert not objective.training
        raise KeyboardInterrupt

    if where == "scores":
        monkeypatch.setattr(objective, "scores", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(objective, broken() if where == "batches" else batches([[1, 2]]), CPU)
    assert all(part.training for part in objective.modules())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("choices", [{}, {"loss_chunk": 3, "logit_softcap": 15.0}, {"tie_embeddings": True}])
def test_mean_over_every_target_with_a_smaller_last_batch(tmp_path: Path, choices: dict[str, object]) -> None:
    """Batches of 3, 3 and 1 windows: a mean of their means would weigh the last one three times."""
    objective = build(tmp_path, **choices)
    given = list(validation(tmp_path, 57).batches(3, 0))
    assert [len(b.inputs_BxT) for b in given] == [3, 3, 1]
    learnt(objective, given)
    loss, accuracy, count = by_hand(objective, given)
    found = evaluate(objective, iter(given), CPU)
    assert found.loss == pytest.approx(loss, rel=1e-6)
    assert found.accuracy == accuracy and 0 < accuracy < 1
    assert found.tokens == count == 56
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-5)


def test_the_whole_validation_set_counts_each_target_once(tmp_path: Path) -> None:
    """Whatever the size of a batch, and with a rest that fills no window: 99 targets in windows of 8."""
    objective = build(tmp_path)
    source = validation(tmp_path, 100)
    found = [evaluate(objective, source.batches(size, 0), CPU) for size in (1, 4, 13, 50)]
    assert [f.tokens for f in found] == [99] * 4
    for other in found[1:]:
        assert other.loss == pytest.approx(found[0].loss, rel=1e-6)
        assert other.accuracy == found[0].accuracy
    # By position: the last window overlaps with the one before it, which is where its context comes from.
    ids = np.load(tmp_path / "v.npy").astype(np.int64)
    starts = [*range(0, 91, 8), 91]
    windows = torch.from_numpy(np.stack([ids[s : s + 9] for s in starts]))
    targets = windows[:, 1:].clone()
    targets[-1, : 8 - 99 % 8] = IGNORED
    by_position = by_hand(objective, [Batch(windows[:, :-1], targets, None, 99)])
    assert by_position == (pytest.approx(found[0].loss, rel=1e-6), found[0].accuracy, 99)


def test_ignored_targets_and_a_batch_without_any(tmp_path: Path) -> None:
    I = IGNORED  # noqa: E741 - to keep the rows readable
    given = batches([[1, I, 3, I], [I, I, I, 7]], [[I, I, I, I]], [[5, 6, 7, 8], [9, 10, 11, 12]])
    objective = build(tmp_path)
    loss, accuracy, count = by_hand(objective, given)
    found = evaluate(objective, given, CPU)
    assert (found.tokens, count) == (11, 11)
    assert found.loss == pytest.approx(loss, rel=1e-6) and found.accuracy == accuracy


def test_documents_reach_the_attention(tmp_path: Path) -> None:
    objective = build(tmp_path)
    documents = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 2]], dtype=torch.int32)
    rows = [[1, 2, 3, 4], [5, 6, 7, 8]]
    masked, open_ = batches(rows, documents=documents), batches(rows)
    found = evaluate(objective, masked, CPU)
    assert found.loss == pytest.approx(by_hand(objective, masked)[0], rel=1e-6)
    assert abs(found.loss - evaluate(objective, open_, CPU).loss) > 1e-4


def test_the_host_waits_once(tmp_path: Path) -> None:
    """Many batches, one read of their sums."""

    class Watch(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.calls = Counter[str]()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls[func.overloadpacket.__name__] += 1
            return func(*args, **(kwargs or {}))

    read: list[tuple[int, ...]] = []
    objective, given = build(tmp_path), batches(*([[[1, 2, 3]]] * 20))
    tolist = Tensor.tolist
    with pytest.MonkeyPatch.context() as patch, Watch() as watch:
        patch.setattr(Tensor, "tolist", lambda t: read.append(tuple(t.shape)) or tolist(t))
        evaluate(objective, given, CPU)
    assert read == [(2, 20)]
    # tolist reads a CPU tensor's memory itself; everything else that waits would show here.
    assert not {"_local_scalar_dense", "nonzero", "equal", "is_nonzero"} & set(watch.calls)


def test_no_gradient_is_left_and_no_random_number_drawn(tmp_path: Path) -> None:
    objective = build(tmp_path, dropout=0.5, ffn="moe", num_experts=4, router_noise=0.5).train()
    state = torch.get_rng_state()
    evaluate(objective, batches([[1, 2, 3]]), CPU)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in objective.parameters())


def test_nothing_to_predict_is_refused(tmp_path: Path) -> None:
    for given in ([], batches([[IGNORED, IGNORED]])):
        with pytest.raises(FormatError, match="no target"):
            evaluate(build(tmp_path), given, CPU)


def test_perplexity_beyond_a_float() -> None:
    assert Scores(800.0, 0.0, 1).perplexity == math.inf
    assert math.isnan(Scores(math.nan, 0.0, 1).perplexity)


def test_bits_of_an_even_guess_over_bytes() -> None:
    assert bits_per_byte(5.545177444479562, 1.0) == pytest.approx(8)
    assert bits_per_byte(5.545177444479562, 4.0) == pytest.approx(2)
    assert bits_per_byte(1.0, None) is None
