"""What the evaluation scripts say is what plain transformers says, slowly."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import edit_tensor, random_tokens, reload, save_tiny, skeleton_of, whole_logits, word_tokenizer

from eval import perplexity, sweep, write_text, zero_shot
from llmprune.errors import InputError

Json = dict[str, Any]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models that agree a little."""
    folder = tmp_path_factory.mktemp("pair")
    one, other = save_tiny("llama", folder / "one"), save_tiny("llama", folder / "other")
    edit_tensor(other, "model.layers.1.mlp.down_proj.weight", lambda weight: weight.mul_(0.5))
    return one, other


# eval.perplexity


@pytest.mark.parametrize("bos_tokens", [0, 1, 2])
def test_the_distance_is_what_whole_models_in_double_precision_give(models: tuple[Path, Path], bos_tokens: int) -> None:
    tokens, first = random_tokens(4, 24), max(bos_tokens, 1)
    found = perplexity.distance(*(skeleton_of(folder) for folder in models), tokens, bos_tokens)
    p, q = (whole_logits(reload(folder), tokens)[:, first - 1 : -1].double().log_softmax(-1) for folder in models)
    kl = (q.exp() * (q - p)).sum(-1).mean(1)
    same = (p.argmax(-1) == q.argmax(-1)).double().mean(1)
    assert found["kl"] == pytest.approx(float(kl.mean()), rel=1e-4)
    assert found["kl_error"] == pytest.approx(float(kl.std()) / 2, rel=1e-3)
    assert found["kl"] > 0
    assert found["top1"] == pytest.approx(float(same.mean()))
    assert found["top1_error"] == pytest.approx(float(same.std()) / 2)
    for key, logs in (("value", p), ("dense", q)):
        loss = -logs.gather(2, tokens[:, first:, None]).mean()
        assert found[key] == pytest.approx(math.exp(float(loss)), rel=1e-5)


def test_a_model_is_at_no_distance_from_itself(models: tuple[Path, Path]) -> None:
    found = perplexity.distance(*(skeleton_of(models[0]) for _ in range(2)), random_tokens(3, 16))
    assert (found["kl"], found["kl_error"], found["top1"], found["top1_error"]) == (0, 0, 1, 0)
    assert found["value"] == found["dense"]


def test_small_pieces_of_logits_add_up(models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = random_tokens(3, 16)
    whole = perplexity.distance(*(skeleton_of(folder) for folder in models), tokens)
    monkeypatch.setattr("llmprune.streaming.perplexity.CHUNK_ELEMENTS", 1)
    pieces = perplexity.distance(*(skeleton_of(folder) for folder in models), tokens)
    assert pieces == pytest.approx(whole, rel=1e-5)


# eval.write_text


def test_a_model_writes_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_tiny("llama", tmp_path / "m")
    flags = ["--windows", "3", "--length", "16", "--out", str(tmp_path / "text.txt")]
    assert write_text.main([str(folder), *flags]) == 2
    assert "no token that begins a text" in capsys.readouterr().err
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"bos_token": "w1"}))
    assert write_text.main([str(folder), *flags]) == 0
    texts = (tmp_path / "text.txt").read_text(encoding="utf-8").split("\n\n")
    assert len(texts) == 3
    assert all(len(text.split()) > 10 for text in texts)


def test_another_vocabulary_is_refused(models: tuple[Path, Path], tmp_path: Path) -> None:
    other = save_tiny("llama", tmp_path / "m", vocab_size=95)
    with pytest.raises(InputError, match="96 tokens, the dense one 95"):
        perplexity.distance(skeleton_of(models[0]), skeleton_of(other), random_tokens())


def test_a_sweep_measures_texts_with_and_without_bos(tmp_path: Path, text: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    word_tokenizer(96, ["w90"]).save_pretrained(folder)
    also: Json = {"texts": [str(text)], "windows": 2, "context": 16}
    found = sweep.measured(str(folder), {**also, "bos": ["yes", "no"]})
    assert list(found) == ["words.txt, begun with BOS", "words.txt, begun without BOS"]
    for bos, result in zip(("yes", "no"), found.values(), strict=True):
        assert result == perplexity.measure(str(folder), bos=bos, **also)["words.txt"]
    assert sweep.measured(str(folder), also) == {"words.txt": found["words.txt, begun with BOS"]}
    assert found["words.txt, begun with BOS"]["sha256"] != found["words.txt, begun without BOS"]["sha256"]


def test_every_text_is_measured_in_every_context(
    models: tuple[Path, Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "b.txt").write_text(text.read_text().replace("w99", "w1").replace("w98", "w2"))
    one, other = map(str, models)
    flags = [one, "--text", str(text), str(tmp_path / "b.txt"), "--windows", "2", "--context", "16", "32"]
    assert perplexity.main([*flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = [(row["text"], row["context"], row["windows"]) for row in found["results"]]
    assert rows == [("words.txt", 16, 2), ("b.txt", 16, 2), ("words.txt", 32, 2), ("b.txt", 32, 2)]
    assert "kl" not in found["results"][0]
    assert perplexity.main([*flags, "--dense", other]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    for word in ("b.txt (2 x 32, begun without BOS): perplexity ", "dense ", "KL, nats ", "same top token "):
        assert word in line


# eval.zero_shot


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of each kind, in the tiny tokenizer's words."""
    folder = tmp_path_factory.mktemp("tasks")
    choices = [
        {"query": f"w{n} w{n + 1}\n", "choices": [f"w{n + 2}", f"w{n + 3} w{n + 4}", "w9"], "gold": n % 3}
        for n in range(1, 14)
    ]
    cloze = [{"context": f"w{n} w{n + 5} w{n}", "continuation": f"w{n + 1}"} for n in range(1, 20)]
    for name, questions in (("pick", choices), ("fill", cloze)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, questions)) + "\n")
    return folder


def slow_loglikelihood(model: Any, ids: list[int], scored: int) -> float:
    """Token by token."""
    total = 0.0
    for end in range(len(ids) - scored, len(ids)):
        logits = whole_logits(model, torch.tensor([ids[:end]]))[0, -1].double()
        total += float(logits.log_softmax(-1)[ids[end]])
    return total


def test_scores_are_those_of_a_slow_loop_whatever_the_batch(models: tuple[Path, Path], tasks: Path) -> None:
    model, tokenizer = reload(models[0]), word_tokenizer(96)
    questions = zero_shot.read_task(tasks / "pick.jsonl", None)
    wanted = [one for question in questions for one in zero_shot.requests_of(question, tokenizer, 64)]
    for size in (1, 4, 100):
        for one, score in zip(wanted, zero_shot.scores(model, wanted, size), strict=True):
            assert score.loglikelihood == pytest.approx(slow_loglikelihood(model, one.ids, one.scored), abs=1e-4)


def test_the_continuation_and_nothing_else_is_scored() -> None:
    tokenizer = word_tokenizer(96)
    assert zero_shot.request("w1 w2 ", "w3 w4", tokenizer, 64) == zero_shot.Request([1, 2, 3, 4], 2)
    # What is too long is cut on the left; something must be left to predict from.
    assert zero_shot.request("w1 w2", " w3 w4", tokenizer, 3) == zero_shot.Request([2, 3, 4], 2)
    assert zero_shot.request("w1 w2", " w3 w4", tokenizer, 2) == zero_shot.Request([3, 4], 1)


def test_grades_are_shares_with_their_standard_errors() -> None:
    def told(*values: float) -> list[zero_shot.Score]:
        return [zero_shot.Score(value, value > -1) for value in values]

    questions = [{"query": "", "choices": ["a", "abcd"], "gold": gold} for gold in (0, 1, 1, 1)]
    found = zero_shot.grade(questions, [told(-1, -2), told(-1, -2), told(-2, -1), told(-1, -8)])
    assert found["questions"] == 4
    assert found["acc"] == 0.5  # right: the first and the third
    assert found["acc_stderr"] == pytest.approx(math.sqrt(0.25 / 3))
    assert found["acc_norm"] == 0.5  # right: the second and the third
    cloze = [{"context": "", "continuation": "a"}] * 2
    found = zero_shot.grade(cloze, [told(-0.5), told(-1.5)])
    assert (found["acc"], found["perplexity"]) == (0.5, pytest.approx(math.exp(1)))


def test_files_are_scored_and_shown(models: tuple[Path, Path], tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [str(models[0]), "--tasks", f"{tasks / 'pick.jsonl'},{tasks / 'fill.jsonl'}", "--limit", "5"]
    assert zero_shot.main([*flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["results"]["one"]
    assert [found[name]["questions"] for name in ("pick", "fill")] == [5, 5]
    assert zero_shot.main([str(models[1]), *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| task | figure | other | one |"
    assert lines[2].endswith(f" | {found['pick']['acc']:.4g} ± {found['pick']['acc_stderr']:.2g} |")
    assert len(lines) == 6


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"query": "a", "choices": ["b"], "gold": 1}',
        '{"query": "a", "choices": ["b", ""], "gold": 0}',
        '{"context": "a"}',
        '{"context": "a", "continuation": "b"}\n{"query": "a", "choices": ["b"], "gold": 0}',
    ],
)
def test_what_is_no_task_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "t.jsonl").write_text(content)
    with pytest.raises(InputError, match=r"t\.jsonl"):
        zero_shot.read_task(tmp_path / "t.jsonl", None)


@pytest.mark.filterwarnings("ignore")
def test_the_harness_itself_finds_the_same_in_files(
    models: tuple[Path, Path], tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    model = shutil.copytree(models[0], tmp_path / "model")
    tokenizer = word_tokenizer(96)
    tokenizer.eos_token = "w95"  # the harness cannot do without
    tokenizer.save_pretrained(model)
    flags = [str(model), "--tasks", f"{tasks / 'pick.jsonl'},{tasks / 'fill.jsonl'}", "--json"]
    results = []
    for more in ([], ["--harness"]):
        assert zero_shot.main([*flags, *more]) == 0
        said = capsys.readouterr().out
        results.append(json.loads(said[said.index("{\n") :])["results"]["model"])
    for task, key in (("pick", "acc"), ("pick", "acc_norm"), ("pick", "acc_stderr"), ("fill", "acc")):
        assert results[1][task][key] == pytest.approx(results[0][task][key], rel=1e-4), key
    assert results[1]["fill"]["perplexity"] == pytest.approx(results[0]["fill"]["perplexity"], rel=1e-3)


def test_other_tasks_go_to_the_harness(
    models: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Json] = []

    def simple_evaluate(**options: Any) -> Json:
        asked.append(options)
        return {"results": {"piqa": {"alias": "piqa", "acc,none": 0.5, "acc_stderr,none": 0.1}}}

    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace(simple_evaluate=simple_evaluate))
    assert zero_shot.main([str(models[0]), "--tasks", "piqa", "--limit", "3", "--num_fewshot", "1"]) == 0
    assert "| piqa | acc | 0.5 ± 0.1 |" in capsys.readouterr().out
    assert (asked[0]["tasks"], asked[0]["limit"], asked[0]["num_fewshot"]) == (["piqa"], 3, 1)
    monkeypatch.setattr(sys.modules["lm_eval"], "simple_evaluate", lambda **_: {}["no such task"])
    assert zero_shot.main([str(models[0]), "--tasks", "nonsense"]) == 2
    assert "cannot do nonsense: 'no such task'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert zero_shot.main([str(models[0]), "--tasks", "piqa"]) == 2
    assert 'pip install -e ".[harness]"' in capsys.readouterr().err
