"""Windows begin as the model's tokenizer begins a text, unless the user says otherwise."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import job, reload, save_tiny, skeleton_of, text_file, token_file, word_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llmprune import InputError, prune
from llmprune.cli.terminal import summary
from llmprune.progress import Progress
from llmprune.reporting.html_report import report_page
from llmprune.sources.bos import added_tokens, window_beginning
from llmprune.sources.generated import sample_prompts
from llmprune.sources.texts import Reader
from llmprune.sources.tokens import begun, calibration_tokens, evaluation_tokens, load_tokens, save_tokens, token_batch
from llmprune.streaming.perplexity import perplexity

SAMPLE = "The cat sat on the mat, and the dog saw it. " * 20
BOS = 90


def trained(special: list[str], normalizer: Any = None, pre: Any = None) -> Tokenizer:
    """A BPE tokenizer of a few hundred tokens."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre
    alphabet = pre_tokenizers.ByteLevel.alphabet() if not normalizer else []
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([SAMPLE], trainer)
    return tokenizer


def llama3_like() -> PreTrainedTokenizerFast:
    """Byte-level BPE whose post-processor is a sequence of ByteLevel and a template that adds BOS."""
    bos = "<|begin_of_text|>"
    tokenizer = trained([bos, "<|end_of_text|>"], pre=pre_tokenizers.ByteLevel(add_prefix_space=False))
    template = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 0)])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token="<|end_of_text|>")


def gemma_like() -> PreTrainedTokenizerFast:
    """BPE over text with `▁` for spaces, a template that adds BOS, which is not the first token of the vocabulary."""
    tokenizer = trained(
        ["<pad>", "<eos>", "<bos>"], normalizers.Replace(" ", "▁"), pre_tokenizers.Split("▁", "merged_with_next")
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


def by_setting() -> PreTrainedTokenizerFast:
    """One without a post-processor, told to add BOS."""
    tokenizer = trained(["<s>", "</s>"], pre=pre_tokenizers.ByteLevel(add_prefix_space=False))
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    made.add_bos_token = True
    return made


def both_ends() -> PreTrainedTokenizerFast:
    """One that puts BOS before and EOS behind a text."""
    made = llama3_like()
    template = "<|begin_of_text|> $A <|end_of_text|>"
    ids = [("<|begin_of_text|>", 0), ("<|end_of_text|>", 1)]
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return made


def silent() -> PreTrainedTokenizerFast:
    """One that has BOS and does not add it, as the demo model's."""
    tokenizer = trained(["<s>", "</s>"], pre=pre_tokenizers.ByteLevel(add_prefix_space=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


KINDS: dict[str, tuple[Callable[[], PreTrainedTokenizerFast], tuple[int, ...], tuple[int, ...] | None]] = {
    "Llama 3": (llama3_like, (0,), (0,)),
    "Gemma": (gemma_like, (2,), (2,)),
    "add_bos_token": (by_setting, (0,), (0,)),
    "BOS and EOS": (both_ends, (0,), (0,)),
    "GLM, two tokens": (lambda: word_tokenizer(9, ["w7", "w8"]), (7, 8), (7, 8)),
    "not added": (silent, (), (0,)),
    "none": (lambda: word_tokenizer(9), (), None),
}
"""Name -> tokenizer, what it adds, and what `--bos yes` adds (None: refused)."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("saved", [False, True])
def test_what_is_added_is_what_the_tokenizer_does(kind: str, saved: bool, tmp_path: Path) -> None:
    made, auto, yes = KINDS[kind]
    tokenizer: Any = made()
    if saved:
        tokenizer.save_pretrained(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert added_tokens(tokenizer) == window_beginning(tokenizer, "auto") == auto
    assert window_beginning(tokenizer, "no") == ()
    if yes is not None:
        assert window_beginning(tokenizer, "yes") == yes
    else:
        with pytest.raises(InputError, match="has no BOS token") as refusal:
            window_beginning(tokenizer, "yes")
        assert "--bos auto" in refusal.value.hint


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bos", ["auto", "yes", "no"])
def test_every_window_is_the_beginning_and_consecutive_text(kind: str, bos: str, tmp_path: Path) -> None:
    made, auto, yes = KINDS[kind]
    begin = {"auto": auto, "yes": yes, "no": ()}[bos]
    if begin is None:
        pytest.skip("refused")
    tokenizer: Any = made()
    path = tmp_path / "text.txt"
    path.write_text(SAMPLE)
    ids = tokenizer(SAMPLE, add_special_tokens=False)["input_ids"]
    reader, length = Reader(tokenizer, tmp_path, Progress(), bos), 12
    inner = length - len(begin)
    expected = [[*begin, *ids[start : start + inner]] for start in range(0, len(ids) - inner + 1, inner)]
    batch = evaluation_tokens(str(path), reader, windows=5, context=length)
    assert batch.tokens.tolist() == expected[:5]
    assert batch.text.tolist() == [window[len(begin) :] for window in expected[:5]]
    assert batch.bos_tokens == len(begin)
    drawn = calibration_tokens(str(path), reader, samples=len(expected), seq_len=length, seed=0)
    assert sorted(drawn.tokens.tolist()) == sorted(expected)
    assert drawn.bos_tokens == len(begin)
    with pytest.raises(InputError, match=f"gives {len(expected)} windows of {length} tokens"):
        calibration_tokens(str(path), reader, samples=len(expected) + 1, seq_len=length, seed=0)


def test_the_same_text_is_drawn_with_and_without_a_token_that_windows_make_room_for(tmp_path: Path) -> None:
    """Windows of 9 tokens behind BOS hold the text of windows of 8."""
    path, tokenizer = text_file(tmp_path / "text.txt"), word_tokenizer(96, ["w90"])
    with_bos, without = (
        calibration_tokens(str(path), Reader(tokenizer, tmp_path, Progress(), bos), samples=5, seq_len=length, seed=3)
        for bos, length in (("auto", 9), ("no", 8))
    )
    assert torch.equal(with_bos.text, without.tokens)
    assert with_bos.tokens[:, 0].tolist() == [BOS] * 5
    assert with_bos.provenance.sha256 != without.provenance.sha256


def test_a_window_without_text_is_refused(tmp_path: Path) -> None:
    path, reader = text_file(tmp_path / "text.txt"), Reader(word_tokenizer(9, ["w7", "w8"]), tmp_path, Progress())
    assert evaluation_tokens(str(path), reader, windows=1, context=3).text.shape == (1, 1)
    with pytest.raises(InputError, match="a window of 2 tokens holds no text"):
        evaluation_tokens(str(path), reader, windows=1, context=2)


# Generated text


@pytest.mark.parametrize("count", [0, 1, 2])
def test_prompts_begin_as_windows_do(count: int) -> None:
    begin, text = [90, 91][:count], torch.arange(3 * 40).view(3, 40) % 89
    prompts = sample_prompts(begun(text, begin), 7, 5, count)
    plain = sample_prompts(text, 7, 5)
    assert prompts.tolist() == [[*begin, *row] for row in plain.tolist()]


# Perplexity


@torch.no_grad()
@pytest.mark.parametrize("count", [0, 1, 2])
def test_behind_bos_every_token_of_the_text_is_predicted_and_bos_is_not(count: int, tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path, tokenizer=False, initializer_range=0.3)
    model = reload(folder)
    tokens = begun(torch.randint(3, 90, (4, 20), generator=torch.Generator().manual_seed(0)), [90, 91][:count])
    losses = []
    for row in tokens:
        chances = model(row[None]).logits[0].double().log_softmax(-1)
        targets = range(max(count, 1), len(row))
        losses.append(-sum(float(chances[at - 1, row[at]]) for at in targets) / len(targets))
    found = perplexity(skeleton_of(folder), tokens, bos_tokens=count)
    assert found.value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)


# Token files


def test_a_token_file_remembers_how_its_windows_begin(tmp_path: Path) -> None:
    path, tokens = tmp_path / "t.safetensors", torch.arange(24).view(3, 8)
    save_tokens(token_batch(tokens, "words", 3, 1, 500), path)
    kept = load_tokens(path, 2, 5, 24)
    assert (kept.bos_tokens, kept.provenance.characters, kept.tokens.tolist()) == (1, 500, tokens[:2, :5].tolist())
    save_tokens(token_batch(tokens, "words", 3, 5), path)
    with pytest.raises(InputError, match=r"of 5 tokens in each window of .*, 5 are BOS"):
        load_tokens(path, None, 5, 24)


@pytest.mark.parametrize("field", [{"bos_tokens": "1"}, {"bos_tokens": None}, {"characters": "many"}])
def test_a_token_file_with_odd_facts_is_refused(field: dict[str, Any], tmp_path: Path) -> None:
    path, batch = tmp_path / "t.safetensors", token_batch(torch.arange(24).view(3, 8), "words", 3)
    save_tokens(replace(batch, provenance=replace(batch.provenance, **field)), path)
    with pytest.raises(InputError, match="is no token file"):
        load_tokens(path, None, None, 24)


# A run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose tokenizer begins texts with `w90`."""
    folder = save_tiny("llama", tmp_path_factory.mktemp("bos") / "model")
    word_tokenizer(96, [f"w{BOS}"]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_file(tmp_path_factory.mktemp("texts") / "words.txt", 2000)


SIZES: dict[str, Any] = {"samples": 8, "seq_len": 16, "eval_windows": 4, "eval_context": 16, "evaluate": True}


def layer_inputs(model: Path, tokens: Tensor) -> Tensor:
    """The inputs of the first block's q, k and v."""
    found: list[Tensor] = []
    plain = reload(model)
    plain.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda _, given: found.append(given[0]))
    plain(tokens)
    return found[0].flatten(0, 1)


@torch.no_grad()
@pytest.mark.parametrize("bos", ["auto", "no"])
def test_a_run_calibrates_measures_and_says_how_windows_begin(
    model: Path, words: Path, tmp_path: Path, bos: str
) -> None:
    report = prune(job(model, tmp_path / "out", words, method="wanda", bos=bos, eval_text=str(words), **SIZES))
    begin = int(bos == "auto")
    says = f", begun {'with' if begin else 'without'} BOS"
    assert report.calibration["bos_tokens"] == report.evaluation["bos_tokens"] == begin
    assert report.fingerprint["--bos"] == ("yes" if begin else "no")
    kept = json.loads((tmp_path / "out" / "prune_report.json").read_text())
    assert (kept["calibration"]["bos_tokens"], kept["evaluation"]["bos_tokens"]) == (begin, begin)
    card = (tmp_path / "out" / "README.md").read_text()
    for shown in (summary(report), report_page(report), card):
        assert shown.count(says) >= 2
    # The weights that Wanda keeps are those of these very windows.
    reader = Reader(word_tokenizer(96, [f"w{BOS}"]), tmp_path, Progress(), bos)
    tokens = calibration_tokens(str(words), reader, samples=8, seq_len=16, seed=0).tokens
    norms = layer_inputs(model, tokens).norm(dim=0)
    weight = reload(model).model.layers[0].self_attn.q_proj.weight
    score = (weight.abs() * norms).view(len(weight), -1, 4)
    expected = torch.zeros_like(score).scatter(-1, score.topk(2, dim=-1).indices, 1).bool().view_as(weight)
    assert torch.equal(reload(tmp_path / "out").model.layers[0].self_attn.q_proj.weight != 0, expected)
    # Plain transformers measures the same on the evaluation windows, BOS given and not predicted.
    windows = evaluation_tokens(str(words), reader, windows=4, context=16).tokens
    losses = functional.cross_entropy(reload(model)(windows).logits[:, :-1].transpose(1, 2), windows[:, 1:])
    assert report.evaluation["dense"]["value"] == pytest.approx(math.exp(float(losses)), rel=1e-4)


def test_another_bos_is_another_run(model: Path, words: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": "magnitude", "samples": 8, "seq_len": 16}
    first = prune(job(model, tmp_path / "out", words, **options))
    assert first.fingerprint["--bos"] == "yes"
    again = prune(job(model, tmp_path / "out", words, bos="yes", **options))
    assert again.fingerprint == first.fingerprint
    with pytest.raises(InputError, match="--bos was yes, now no"):
        prune(job(model, tmp_path / "out", words, bos="no", **options))


def test_a_token_file_is_taken_as_it_is_and_a_difference_is_told(model: Path, words: Path, tmp_path: Path) -> None:
    tokens = token_file(tmp_path / "t.safetensors")
    settings = {"method": "magnitude", "eval_text": str(words), "eval_windows": 2, "eval_context": 16, "evaluate": True}
    report = prune(job(model, tmp_path / "out", tokens, **settings))
    assert (report.calibration["bos_tokens"], report.evaluation["bos_tokens"]) == (0, 1)
    assert report.warnings[0].startswith(
        "windows of words.txt begin with BOS, those of t.safetensors (random ids) do not"
    )
    report = prune(job(model, tmp_path / "other", tokens, bos="no", **settings))
    assert not [warning for warning in report.warnings if "BOS" in warning]


def test_bos_is_refused_where_the_tokenizer_has_none(tiny: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--bos yes, but the model's tokenizer has no BOS token"):
        prune(job(tiny, tmp_path / "out", text, bos="yes", samples=4, seq_len=16))


def test_self_calibration_text_begins_as_the_text_does(
    model: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    monkeypatch.setattr(
        "llmprune.run.calibration_windows",
        lambda run, generated: seen.append(generated.tokens) or generated.tokens,
    )
    options: dict[str, Any] = {"method": "magnitude", "samples": 4, "seq_len": 16, "self_calibration": 2.0}
    report = prune(job(model, tmp_path / "out", words, **options))
    assert report.calibration["self_generated"] == 8
    (windows,) = seen
    assert windows.shape == (8, 16)
    assert windows[:, 0].tolist() == [BOS] * 8
