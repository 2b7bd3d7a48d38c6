"""Scores of text: every token once with its context, the same figures as while training, bits a byte that compare."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bytekiln.characters import CharTokenizer
from bytekiln.config import RunConfig
from bytekiln.data import open_data
from bytekiln.errors import BytekilnError, ConfigError, FileError, FormatError, MismatchError, TextError
from bytekiln.evaluate import evaluate
from bytekiln.model import TransformerLM
from bytekiln.objective import Objective
from bytekiln.score.records import Records
from bytekiln.score.runs import compared, score_data
from bytekiln.score.scorer import Scorer, open_scorer, token_scores
from bytekiln.score.text import IMPLAUSIBLE_BITS, TextScore, implausible, open_stream, windows
from bytekiln.tokenizer import encode_files
from lm_runs import tiny, tokens
from score_models import WORDS, model, saved, scorer, tokenizer

TEXT = "".join(f"the {WORDS[i % 16]} of {WORDS[i % 7]} {i}.<|endoftext|>" for i in range(40))


def text_file(folder: Path, text: str = TEXT, name: str = "v.txt") -> str:
    path = folder / name
    path.write_text(text, "utf-8")
    return str(path)


@given(count=st.integers(2, 60), context=st.integers(1, 12), stride=st.integers(1, 12))
def test_every_target_counts_once_with_its_context(count: int, context: int, stride: int) -> None:
    stride = min(stride, context)
    seen: list[int] = []
    for number, (start, end, first) in enumerate(windows(count, context, stride)):
        assert 0 <= start < end <= count - 1 and end - start <= context
        for target in range(first, end + 1):
            seen.append(target)
            if number:
                assert target - start >= context - stride + 1
    assert seen == list(range(1, count))


def by_hand(judge: Scorer, ids: list[int], context: int, stride: int) -> list[float]:
    """-ln p of every target but the first, a forward pass each."""
    out = []
    plan = windows(len(ids), context, stride)
    for start, end, first in plan:
        log_p = judge.model(torch.tensor([ids[start:end]]))[0].log_softmax(-1)
        out += [-float(log_p[t - 1 - start, ids[t]]) for t in range(first, end + 1)]
    return out


@pytest.mark.parametrize("stride", [0, 3, 1])
@torch.no_grad()
def test_windows_slide(stride: int, tmp_path: Path) -> None:
    judge = scorer(context_length=10)
    found = score_data(judge, text_file(tmp_path, TEXT[:400]), stride=stride).result
    ids = tokenizer().encode(TEXT[:400], allowed_special="all")
    ids += [] if ids[-1] == tokenizer().eot_id else [tokenizer().eot_id]
    expected = by_hand(judge, ids, 10, stride or 10)
    assert found["loss"] == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert found["tokens"] == len(ids) - 1 and found["stride"] == (stride or 10)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    first = len(tokenizer().decode_bytes(ids[:1]))
    size = len(TEXT[:400].replace("<|endoftext|>", "").encode()) - first
    assert found["bytes"] == size
    assert found["bits_per_byte"] == pytest.approx(sum(expected) / math.log(2) / size, rel=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_the_same_figures_as_while_training(masked: bool, tmp_path: Path) -> None:
    """Disjoint windows, the rest that fills none, documents that attention does not cross."""
    path = tokens(tmp_path / "v.npy", 157, seed=4)
    about = json.loads((tmp_path / "v.npy.json").read_text("utf-8"))
    (tmp_path / "v.npy.json").write_text(json.dumps({**about, "eot_id": 5}), "utf-8")
    train = tokens(tmp_path / "train.npy")
    (tmp_path / "train.npy.json").write_text(
        json.dumps({**json.loads((tmp_path / "train.npy.json").read_text("utf-8")), "eot_id": 5}), "utf-8"
    )
    config = tiny(tmp_path, train_data=str(train), val_data=str(path), document_mask=masked)
    torch.manual_seed(1)
    lm = TransformerLM(config.model).eval()
    source = open_data(config, None).val
    assert source is not None
    expected = evaluate(Objective(lm, config), source.batches(4, 0), torch.device("cpu"))
    judge = Scorer(lm, None, "x", config)
    found = score_data(judge, str(path)).result
    assert found["loss"] == pytest.approx(expected.loss, rel=1e-6)
    assert found["accuracy"] == expected.accuracy and found["tokens"] == expected.tokens
    assert found["bits_per_byte"] == pytest.approx(expected.loss / math.log(2) / 3)


@pytest.mark.parametrize("changes", [{}, {"logit_softcap": 5.0}, {"pad_vocab": True}, {"tie_embeddings": True}])
def test_token_scores_are_the_definition(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bytekiln.score.scorer.LOGIT_BYTES", 4 * 300 * 3)  # three rows at a time
    judge = scorer(**changes)
    ids = torch.randint(0, 280, (1, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x = judge.model.features(ids).x_BxTxD[0]
        log_p = judge.model(ids)[0].log_softmax(-1)
    row = torch.tensor([3, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 3])
    targets = torch.randint(0, 280, (13,), generator=torch.Generator().manual_seed(1))
    targets[4] = log_p[3].argmax()
    nll, hit = token_scores(judge, x, targets, row)
    torch.testing.assert_close(nll, -log_p[row, targets], atol=1e-5, rtol=1e-5)
    assert hit.tolist() == (log_p[row].argmax(-1) == targets).tolist() and hit[4]
    plain, _ = token_scores(judge, x, targets[:11])
    torch.testing.assert_close(plain, -log_p[torch.arange(11), targets[:11]], atol=1e-5, rtol=1e-5)


def test_of_equal_logits_the_first_is_the_answer() -> None:
    judge = scorer()
    with torch.no_grad():
        judge.model.head_weight.zero_()
    x = torch.ones(3, 16)
    nll, hit = token_scores(judge, x, torch.tensor([0, 1, 0]))
    assert hit.tolist() == [True, False, True] and nll.tolist() == pytest.approx([math.log(280)] * 3)


def test_weights_that_are_not_finite_are_named() -> None:
    judge = scorer()
    with torch.no_grad():
        judge.model.head_weight[3] = math.nan
    with pytest.raises(FormatError, match="model0: found a loss that is not finite"):
        token_scores(judge, torch.ones(1, 16), torch.tensor([0]))


def test_text_and_its_token_file_score_alike(tmp_path: Path) -> None:
    judge = scorer()
    text = text_file(tmp_path)
    encode_files(tokenizer(), [text], tmp_path / "v.npy")
    (tmp_path / "v.gz").write_bytes(gzip.compress(TEXT.encode()))
    lines = [json.dumps({"text": part}) for part in TEXT.split("<|endoftext|>")[:-1]]
    (tmp_path / "v.jsonl").write_text("\n".join(lines), "utf-8")
    found = [score_data(judge, str(tmp_path / n)).result for n in ("v.txt", "v.npy", "v.gz", "v.jsonl")]
    for other in found[1:]:
        assert {k: v for k, v in other.items() if "data" not in k and k != "warnings"} == {
            k: v for k, v in found[0].items() if "data" not in k and k != "warnings"
        }


def test_units_are_documents_or_stretches(tmp_path: Path) -> None:
    judge = scorer()
    many = open_stream(judge, text_file(tmp_path))
    assert many.units == "documents" and many.unit_N[-1] == 39 and many.bytes_N is not None
    assert many.bytes_N[many.ids == tokenizer().eot_id].sum() == 0
    one = open_stream(judge, text_file(tmp_path, "clay and fire " * 300, "one.txt"))
    assert one.units == "stretches of 1000 bytes" and one.unit_N[-1] == 4
    score = score_data(judge, str(tmp_path / "one.txt")).text
    assert score is not None and score.nll_U.sum() == pytest.approx(score.loss * score.tokens)
    assert score.weight_U.sum() == score.bytes


def test_two_tokenizers_compare_in_bits_per_byte(tmp_path: Path) -> None:
    text = text_file(tmp_path)
    own = tokenizer(300)
    a = scorer(1)
    b = Scorer(model(2, vocab_size=own.n_vocab), own, "b", batch_size=8)
    one, other = score_data(a, text), score_data(b, text)
    found = compared(one, other)["bits_per_byte"]
    assert found["units"] == "documents" and found["n"] == 40
    assert found["difference"] == pytest.approx(one.result["bits_per_byte"] - other.result["bits_per_byte"], rel=0.01)
    same = compared(one, score_data(a, text))["bits_per_byte"]
    assert same["difference"] == 0 and same["p_value"] == 1
    shorter = score_data(b, text_file(tmp_path, TEXT[:600], "s.txt"))
    with pytest.raises(MismatchError, match="expected the same text"):
        compared(one, shorter)
    part, whole = score_data(a, text, limit=3), score_data(b, text, limit=3)
    with pytest.raises(MismatchError, match="expected the whole text"):
        compared(part, whole)


def test_a_sample_of_windows(tmp_path: Path) -> None:
    judge, text = scorer(context_length=16), text_file(tmp_path)
    some, again, other = (score_data(judge, text, limit=5, seed=s) for s in (1, 1, 2))
    assert some.result == again.result and some.rows != other.rows and len(some.rows) == 5
    assert some.result["tokens"] <= 80


def test_implausible_losses_are_named(tmp_path: Path) -> None:
    def score(loss: float, size: float | None) -> TextScore:
        return TextScore(loss, 0.5, 100, size, np.zeros(1), np.zeros(1))

    just = IMPLAUSIBLE_BITS * math.log(2) * 4
    assert implausible(score(just * 1.01, 400)) is None
    assert "implausible loss" in (implausible(score(just * 0.99, 400)) or "")
    assert implausible(score(0.22, None)) is None and "a token" in (implausible(score(0.2, None)) or "")


def trained_on(folder: Path, *training: str) -> RunConfig:
    return tiny(folder, train_data=",".join(training), vocab_size=280)


def test_overlap_with_the_training_data_is_named(tmp_path: Path) -> None:
    text = text_file(tmp_path)
    encode_files(tokenizer(), [text], tmp_path / "train.npy")
    other = text_file(tmp_path, "".join(f"{WORDS[i % 5]} {i * i} {WORDS[i % 3]}\n" for i in range(300)), "o.txt")
    part = text_file(tmp_path, TEXT[200:1000] + "something else", "part.txt")

    def warned(path: str, *training: str) -> str:
        judge = Scorer(model(), tokenizer(), "m", trained_on(tmp_path, *training))
        return " ".join(score_data(judge, path, limit=1).result["warnings"])

    train = str(tmp_path / "train.npy")
    assert warned(other, train) == ""
    assert "went into the training data" in warned(text, train)
    assert "is the training data" in warned(train, train)
    assert "sampled windows occur in the training data" in warned(part, train)
    assert "the training data is not there" in warned(other, str(tmp_path / "gone.npy"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"context_length": 49}, "context_length: found 49; expected 1 to 48, the positions of model0"),
        ({"context_length": -1}, "context_length: found -1"),
        ({"batch_size": 0}, "batch_size: found 0"),
    ],
)
def test_ranges(values: dict[str, int], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        scorer(**values)
    with pytest.raises(ConfigError, match="precision: found 'fp8'"):
        Scorer(model(), None, "x", precision="fp8")
    text = text_file(tmp_path)
    for stride in (-1, 49):
        with pytest.raises(ConfigError, match=f"stride: found {stride}; expected 1 to 48"):
            score_data(scorer(), text, stride=stride)


def test_a_model_that_sees_both_sides_is_refused() -> None:
    with pytest.raises(ConfigError, match="objective mlm"):
        Scorer(model(causal=False), tokenizer(), "both")


@pytest.mark.parametrize("count", [1, 2])
def test_a_row_has_no_special_tokens_in_it_however_many_rows_there_are(tmp_path: Path, count: int) -> None:
    judge, text = scorer(), "the kiln <|endoftext|> and the clay"
    (tmp_path / "v.jsonl").write_text(f"{json.dumps({'text': text})}\n" * count, "utf-8")
    row = [*tokenizer().encode(text), tokenizer().eot_id]
    assert tokenizer().eot_id not in row[:-1]
    assert open_stream(judge, str(tmp_path / "v.jsonl")).ids.tolist() == row * count


def test_files_that_cannot_be_scored(tmp_path: Path) -> None:
    judge = scorer()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 noir")
    (tmp_path / "rows.jsonl").write_text('{"text": "a kiln"}\n{"body": 1}\n', "utf-8")
    np.save(tmp_path / "large.npy", np.array([1, 2, 999], np.uint16))
    tokens(tmp_path / "foreign.npy", vocab=61)
    np.save(tmp_path / "one.npy", np.array([1], np.uint16))
    for name, kind, message in (
        ("missing.txt", FileError, "no such file"),
        ("empty.txt", FileError, "empty file"),
        ("latin.txt", TextError, "byte offset 3: invalid UTF-8"),
        ("rows.jsonl", FormatError, "line 2: found .*expected a JSON object with a text"),
        ("large.npy", FormatError, "token 2 is id 999"),
        ("foreign.npy", MismatchError, "found tokenizer hash sha256:abab.*with which model0 was trained"),
        ("one.npy", FormatError, "found 1 token; expected at least two"),
    ):
        given_hash = Scorer(judge.model, tokenizer(), "model0", tokenizer_hash=tokenizer().hash)
        with pytest.raises(kind, match=message) as found:
            score_data(given_hash, str(tmp_path / name))
        assert name in str(found.value)
    with pytest.raises(FileError, match=r"found no tokenizer\.json in the run; expected --tokenizer FILE"):
        score_data(Scorer(judge.model, None, "bare"), text_file(tmp_path))
    with pytest.raises(TextError, match=r"v.txt: byte offset"):
        score_data(Scorer(judge.model, CharTokenizer("klin"), "chars"), text_file(tmp_path))


def test_a_run_is_opened_with_its_tokenizer_and_checksum(tmp_path: Path) -> None:
    run = saved(tmp_path / "run", 1)
    judge = open_scorer(str(run))
    assert judge.name == "run" and judge.step == 3 and judge.tokenizer_hash == tokenizer().hash
    assert judge.checksum.startswith("sha256:") and judge.context_length == 48
    assert open_scorer(str(run / "checkpoints" / "checkpoint_best")).name == "run/checkpoint_best"
    assert open_scorer(str(saved(tmp_path / "other", 2))).checksum != judge.checksum
    tokenizer(270).save(tmp_path / "t.json")
    with pytest.raises(MismatchError, match=r"t\.json: found tokenizer hash"):
        open_scorer(str(run), tokenizer=str(tmp_path / "t.json"))
    with pytest.raises(BytekilnError, match="nowhere"):
        open_scorer(str(tmp_path / "nowhere"))


def test_bf16_is_near(tmp_path: Path) -> None:
    text = text_file(tmp_path, TEXT[:300])
    low = score_data(Scorer(model(), tokenizer(), "m", precision="bf16"), text).result["loss"]
    assert low == pytest.approx(score_data(scorer(), text).result["loss"], rel=0.02)


def test_records_are_taken_up_where_they_are_whole(tmp_path: Path) -> None:
    path, about = tmp_path / "r.jsonl", {"model": "a", "seed": 1}
    with Records(path, about, "question") as kept:
        kept.add([{"question": 4, "x": 0.1}, {"question": 2, "x": 1 / 3}])
    with path.open("ab") as file:
        file.write(b'{"question": 9, "x"')
    with Records(path, about, "question", resume=True) as kept:
        assert kept.found == {4: {"question": 4, "x": 0.1}, 2: {"question": 2, "x": 1 / 3}}
        kept.add([{"question": 5}])
        with pytest.raises(FileError, match="another process is writing it"):
            Records(path, about, "question", resume=True)
    assert b'"x"\n' not in path.read_bytes() and len(path.read_bytes().splitlines()) == 4
    with pytest.raises(MismatchError, match=r"r\.jsonl: model: found a; expected b: it is of another evaluation"):
        Records(path, {**about, "model": "b"}, "question", resume=True)
    with pytest.raises(FileExistsError, match="expected --resume"):
        Records(path, about, "question")
    with Records(path, about, "question", overwrite=True) as kept:
        assert kept.found == {}
    path.write_text("nonsense\n", "utf-8")
    with pytest.raises(FormatError, match="line 1: found b'nonsense'"):
        Records(path, about, "question", resume=True)
    with pytest.raises(FileError, match="gone"):
        Records(tmp_path / "gone" / "r.jsonl", about, "question")
    with Records(None, about, "question") as kept:
        kept.add([{"question": 1}])
