"""`llmprune distill` from a pruned folder to a distilled one: what is held, what is kept, how it resumes."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import execute, listing
from helpers import edit_tensor, job, on_disk, random_tokens, reload, save_tiny, text_file, word_tokenizer
from safetensors.torch import load_file

from llmprune import DistillJob, distill, prune
from llmprune.cli.main import main
from llmprune.errors import InputError, PruneError
from llmprune.export.verify import verify_folder
from llmprune.pipeline.distill import run as story
from llmprune.pipeline.distill.prepare import open_folder
from llmprune.progress import Progress
from llmprune.reporting.report import FILE, PruneReport
from llmprune.training.trainer import Watch

SMALL: dict[str, Any] = {
    "tokens": 512,
    "seq_len": 16,
    "held_out": 4,
    "batch_size": 8,
    "learning_rate": 3e-3,
    "evaluations": 4,
    "evaluate": False,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def pruned(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model pruned to 2:4."""
    out = tmp_path_factory.mktemp("pruned") / "sparse"
    prune(job(tiny, out, text, effort="fast", samples=4, seq_len=32))
    return out


def asked(pruned: Path, tiny: Path, text: Path, out: Path, **options: Any) -> DistillJob:
    return DistillJob(**{"folder": pruned, "teacher": str(tiny), "calib": str(text), "out": out, **SMALL, **options})


def raw_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def divergence(student: Path, teacher: Path, tokens: torch.Tensor) -> float:
    """The mean divergence of two models, with plain transformers."""
    with torch.no_grad():
        q, p = (reload(folder)(input_ids=tokens).logits.log_softmax(-1) for folder in (student, teacher))
    return float((p.exp() * (p - q)).sum(-1).mean())


class Recording(Progress):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)

    def warn(self, text: str) -> None:
        self.said.append(f"warning: {text}")


def test_the_model_gets_nearer_and_zeros_stay(pruned: Path, tiny: Path, text: Path, tmp_path: Path) -> None:
    before, out = listing(pruned), tmp_path / "out"
    report = distill(
        asked(pruned, tiny, text, out, evaluate=True, eval_text=str(text), eval_windows=3, eval_context=32)
    )
    facts = report.distillation
    assert facts["divergence_after"] < facts["divergence_before"]
    assert facts["divergence_after"] == min(one["divergence"] for one in facts["divergences"])
    assert facts["evaluation"]["after"]["value"] < facts["evaluation"]["before"]["value"]
    assert (facts["tokens"], facts["steps"], facts["held_out"], facts["top_k"]) == (512, 4, 4, 0)
    assert not verify_folder(out).violations
    old, new = on_disk(pruned), on_disk(out)
    assert {name: (value.shape, value.dtype) for name, value in old.items()} == {
        name: (value.shape, value.dtype) for name, value in new.items()
    }
    for layer in report.layers:
        name = f"{layer.name}.weight"
        assert torch.equal(old[name] == 0, new[name] == 0)
        assert not torch.equal(old[name], new[name])
    tokens = random_tokens(8, 16, 5)
    assert divergence(out, tiny, tokens) < divergence(pruned, tiny, tokens)
    assert replace(PruneReport.read(out), out=str(out)) == report
    assert (out / "tokenizer.json").read_bytes() == (pruned / "tokenizer.json").read_bytes()
    assert "distilled" in (out / "README.md").read_text()
    assert "Distillation" in (out / "prune_report.html").read_text()
    assert "distilled: divergence" in report._repr_html_()
    assert listing(pruned) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_distilled_folder_that_is_quantised_says_both(pruned: Path, tiny: Path, text: Path, tmp_path: Path) -> None:
    learnt = distill(asked(pruned, tiny, text, tmp_path / "learnt"))
    found = prune(job(tmp_path / "learnt", tmp_path / "out", text, "none", quantize="int8", samples=4, seq_len=32))
    assert PruneReport.read(tmp_path / "out").distillation == found.distillation == learnt.distillation
    assert found.quantization["grid"] == "int8"


def test_a_report_with_half_a_distillation_is_refused(pruned: Path, tmp_path: Path) -> None:
    shutil.copytree(pruned, tmp_path / "half")
    report = json.loads((pruned / FILE).read_text())
    (tmp_path / "half" / FILE).write_text(json.dumps(report | {"distillation": {"teacher": "x"}}))
    with pytest.raises(InputError, match="distillation has no 'command'"):
        PruneReport.read(tmp_path / "half")


def test_removed_channels_stay_removed_and_types_stay(tiny: Path, text: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    prune(job(tiny, small, text, "channels:50%", effort="fast", samples=4, seq_len=32, round_to=8, dtype="bfloat16"))
    out = tmp_path / "out"
    report = distill(asked(small, tiny, text, out))
    assert report.distillation["kept_step"]
    old, new = on_disk(small), on_disk(out)
    assert new["model.layers.0.mlp.up_proj.weight"].shape == (24, 32)
    assert all(new[name].dtype == value.dtype and new[name].shape == value.shape for name, value in old.items())
    assert not verify_folder(out).violations


@pytest.mark.parametrize(("sparsity", "grid", "rate"), [("2:4", "int4:g32", 1e-2), ("none", "fp8", 3e-4)])
def test_weights_on_a_grid_stay_on_it(
    sparsity: str, grid: str, rate: float, tiny: Path, text: Path, tmp_path: Path
) -> None:
    coded, out = tmp_path / "coded", tmp_path / "out"
    prune(job(tiny, coded, text, sparsity, quantize=grid, skip=("down_proj",), effort="fast", samples=4, seq_len=32))
    measured = {"evaluate": True, "eval_text": str(text), "eval_windows": 3, "eval_context": 32}
    report = distill(asked(coded, tiny, text, out, learning_rate=rate, **measured))
    assert report.distillation["divergence_after"] < report.distillation["divergence_before"]
    assert report.distillation["evaluation"]["after"]["value"] < report.distillation["evaluation"]["before"]["value"]
    found = verify_folder(out)
    assert (found.violations, found.on_grid) == (0, 12)
    old, new = raw_tensors(coded), raw_tensors(out)
    kinds = {name: (value.shape, value.dtype) for name, value in old.items()}
    assert kinds == {name: (value.shape, value.dtype) for name, value in new.items()}
    changed = {name.rpartition("_")[2] for name in old if not torch.equal(old[name], new[name])}
    assert {"scale", "packed" if grid.startswith("int") else "proj.weight"} <= changed
    before, after = (open_folder(folder, report, torch.device("cpu"), False).checkpoint for folder in (coded, out))
    for layer in report.layers:
        if sparsity == "2:4":
            name = f"{layer.name}.weight"
            assert bool((after[name][before[name] == 0] == 0).all())


@pytest.mark.parametrize("family", ["mixtral", "gemma3"])
def test_zeros_of_experts_and_parts_beside_the_language_model_stay(family: str, tmp_path: Path) -> None:
    """In mixtral one parameter holds the experts; gemma3 has tied embeddings, and a part that sees."""
    dense, words = save_tiny(family, tmp_path / "dense"), text_file(tmp_path / "words.txt", 800)
    sparse, out = tmp_path / "sparse", tmp_path / "out"
    prune(job(dense, sparse, words, effort="fast", samples=4, seq_len=32))
    report = distill(asked(sparse, dense, words, out, batch_size=4, evaluations=2))
    assert report.distillation["kept_step"]
    assert not verify_folder(out).violations
    old, new = raw_tensors(sparse), raw_tensors(out)
    unchanged = {name for name in old if torch.equal(old[name], new[name])}
    assert unchanged == {name for name in old if "vision" in name or "projector" in name}
    assert reload(out).get_output_embeddings().weight.isfinite().all()


class StopAfter(Progress):
    """Interrupts like Ctrl-C in the middle of a step."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def start(self, label: str, total: float, unit: str = "") -> None:
        self.label = label

    def step(self, amount: float = 1, text: str = "") -> None:
        if self.label == "distilling":
            self.left -= 1
            if not self.left:
                signal.raise_signal(signal.SIGINT)


def test_a_resumed_run_equals_an_unbroken_one(pruned: Path, tiny: Path, text: Path, tmp_path: Path) -> None:
    options = {"tokens": 256, "epochs": 2, "generated": 0.5, "mix": 0.2, "temperature": 2.0}
    whole, broken = (asked(pruned, tiny, text, tmp_path / name, **options) for name in ("whole", "broken"))
    wanted = distill(whole).distillation
    with pytest.raises(KeyboardInterrupt):
        distill(broken, StopAfter(3))
    assert not (tmp_path / "broken").exists()
    progress = Recording()
    found = distill(broken, progress).distillation
    assert any("steps were done before" in text for text in progress.said)
    assert weights(tmp_path / "broken") == weights(tmp_path / "whole")
    for key in ("divergences", "kept_step", "sha256", "generated_sha256"):
        assert found[key] == wanted[key]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "whole"]
    progress = Recording()
    distill(broken, progress)
    assert any("done already" in text for text in progress.said)


def test_a_crash_between_checkpoints_goes_on_from_the_last(
    pruned: Path, tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = listing(pruned)
    wanted = asked(pruned, tiny, text, tmp_path / "out", evaluations=2)
    step_end = Watch.on_step_end

    def crash(self: Watch, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise MemoryError
        step_end(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Watch, "on_step_end", crash)
        with pytest.raises(MemoryError):
            distill(wanted)
    assert listing(pruned) == before
    with pytest.raises(InputError, match=r"--learning-rate was 0.003, now 0.001"):
        distill(replace(wanted, learning_rate=1e-3))
    # A checkpoint that was not written to its end is of no use.
    (tmp_path / ".out.partial" / "trainer" / "checkpoint-3").mkdir()
    distill(wanted)
    distill(replace(wanted, out=tmp_path / "again"))
    assert weights(tmp_path / "out") == weights(tmp_path / "again")


def test_a_run_stopped_behind_its_last_step_has_nothing_to_train(
    pruned: Path, tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = asked(pruned, tiny, text, tmp_path / "out", tokens=256)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(story, "write_weights", full)
        with pytest.raises(PruneError, match="No space left") as caught:
            distill(wanted)
    assert "same command" in caught.value.hint
    assert not (tmp_path / "out").exists()
    found = distill(wanted).distillation
    assert distill(replace(wanted, out=tmp_path / "again")).distillation["divergences"] == found["divergences"]
    assert weights(tmp_path / "out") == weights(tmp_path / "again")


def test_two_processes_find_what_one_finds(pruned: Path, tiny: Path, text: Path, tmp_path: Path) -> None:
    flags = ["--teacher", str(tiny), "--calib", str(text), "--tokens", "128", "--seq-len", "16", "--held-out", "4"]
    flags += ["--no-eval", "--device", "cpu", "--learning-rate", "3e-3", "--evaluations", "1", "--quiet"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "llmprune", "distill"]
    done = execute([*command, str(pruned), *flags, "--out", "two"], tmp_path, limit=600, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert main(["distill", str(pruned), *flags, "--out", str(tmp_path / "one")]) == 0
    one, two = (on_disk(tmp_path / name) for name in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], rtol=1e-3, atol=1e-5) for name in one)
    assert PruneReport.read(tmp_path / "two").distillation["processes"] == 2


def test_where_no_step_is_better_the_start_is_kept(pruned: Path, tiny: Path, text: Path, tmp_path: Path) -> None:
    progress = Recording()
    report = distill(asked(pruned, tiny, text, tmp_path / "out", learning_rate=3.0), progress)
    assert report.distillation["kept_step"] == 0
    assert report.distillation["divergence_after"] == report.distillation["divergence_before"]
    assert any("no step lowered" in text for text in progress.said)
    old, new = on_disk(pruned), on_disk(tmp_path / "out")
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_frozen_parameters_stay(pruned: Path, tiny: Path, text: Path, tmp_path: Path) -> None:
    distill(asked(pruned, tiny, text, tmp_path / "out", freeze=("*embed*", "*norm*")))
    old, new = on_disk(pruned), on_disk(tmp_path / "out")
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {name for name in old if "embed" not in name and "norm" not in name}


@pytest.mark.parametrize("glob", ["*embed*", "lm_head*"])
def test_tied_parameters_are_counted_once_and_frozen_together(glob: str, text: Path, tmp_path: Path) -> None:
    dense = save_tiny("llama", tmp_path / "dense", vocab_size=100, tie_word_embeddings=True)
    prune(job(dense, tmp_path / "pruned", text, effort="fast", samples=4, seq_len=32))
    facts = [
        distill(asked(tmp_path / "pruned", dense, text, tmp_path / f"out-{len(freeze)}", freeze=freeze)).distillation
        for freeze in ((), (glob,))
    ]
    model = reload(dense)
    head = model.get_output_embeddings().weight
    assert head is model.get_input_embeddings().weight
    every = sum(parameter.numel() for parameter in model.parameters())
    assert [one["trained_parameters"] for one in facts] == [every, every - head.numel()]
    name = "model.embed_tokens.weight"
    assert torch.equal(on_disk(tmp_path / "out-1")[name], on_disk(dense)[name])
    assert not torch.equal(on_disk(tmp_path / "out-0")[name], on_disk(dense)[name])


def test_recomputed_activations_and_mixed_precision(pruned: Path, tiny: Path, text: Path, tmp_path: Path) -> None:
    options = {"precision": "bfloat16", "tokens": 256}
    plain = distill(asked(pruned, tiny, text, tmp_path / "plain", **options)).distillation
    again = distill(asked(pruned, tiny, text, tmp_path / "again", gradient_checkpointing=True, **options)).distillation
    assert plain["divergence_after"] == pytest.approx(again["divergence_after"], rel=1e-3)
    assert plain["divergence_after"] < plain["divergence_before"]


# Bad input


def refused(wanted: DistillJob, message: str, out: Path) -> str:
    with pytest.raises(InputError, match=message) as caught:
        distill(wanted)
    assert not out.exists()
    assert not out.with_name(f".{out.name}.partial").exists()
    return caught.value.hint


def test_a_teacher_with_another_vocabulary_or_tokenizer(pruned: Path, tiny: Path, text: Path, tmp_path: Path) -> None:
    other, out = save_tiny("llama", tmp_path / "other", max_position_embeddings=128), tmp_path / "out"
    refused(asked(pruned, other, text, out), "gives probabilities of", out)
    shutil.copytree(tiny, tmp_path / "renamed")
    tokenizer = json.loads((tiny / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["w1"], words["w2"] = words["w2"], words["w1"]
    (tmp_path / "renamed" / "tokenizer.json").write_text(json.dumps(tokenizer))
    hint = refused(asked(pruned, tmp_path / "renamed", text, out), "differ in 2 tokens", out)
    assert "--teacher" in hint
    shutil.copytree(tiny, tmp_path / "begun")
    word_tokenizer(100, ["w5"]).save_pretrained(tmp_path / "begun")
    refused(asked(pruned, tmp_path / "begun", text, out), "in two ways", out)


def test_a_folder_whose_zeros_are_gone(pruned: Path, tiny: Path, text: Path, tmp_path: Path) -> None:
    filled, out = tmp_path / "filled", tmp_path / "out"
    shutil.copytree(pruned, filled)
    edit_tensor(filled, "model.layers.1.mlp.up_proj.weight", lambda tensor: tensor.add_(1))
    refused(asked(filled, tiny, text, out), "up_proj' misses", out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 64}, "fewer than the 8 of one optimiser step"),
        ({"tokens": 10**6}, r"\(--tokens\)"),
        ({"seq_len": 129}, "128 positions"),
        ({"freeze": ("*",)}, "leaves no parameter"),
        ({"teacher": "no-such-folder"}, "no folder"),
        ({"mix": 1.5}, "more than 1"),
        ({"temperature": 0}, "not above 0"),
    ],
)
def test_jobs_that_cannot_be_done(
    options: dict[str, Any], message: str, pruned: Path, tiny: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        distill(asked(pruned, tiny, text, tmp_path / "out", **options))
    assert not list(tmp_path.iterdir())


def test_folders_that_cannot_be_distilled(pruned: Path, tiny: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(asked(tmp_path / "none", tiny, text, out), "there is no folder", out)
    refused(asked(tiny, tiny, text, out), "is no report", out)
    refused(asked(pruned, pruned, text, out), "is the pruned folder itself", out)
    with pytest.raises(InputError, match="lies inside"):
        distill(asked(pruned, tiny, text, pruned / "inner"))
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(InputError, match="exists already"):
        distill(asked(pruned, tiny, text, out))
    assert (out / "mine").exists()
