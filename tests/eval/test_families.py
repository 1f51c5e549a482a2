"""The matrix of model types reads the files, tells what is wrong, and outlives the types that fail."""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import save_tiny, tiny_config, tiny_model

import llmprune
from eval import families, models, record
from llmprune.errors import InputError

CAUSAL, WRAPPER = families.KINDS


@pytest.mark.parametrize(
    ("model_type", "weight", "turned"),
    [
        ("llama", "model.layers.1.mlp.down_proj.weight", False),
        ("gpt2", "transformer.h.0.mlp.c_fc.weight", True),
        ("mixtral", "model.layers.0.mlp.experts.down_proj", False),
        ("gpt_oss", "model.layers.0.mlp.experts.gate_up_proj", True),
    ],
)
def test_what_holds_the_pattern_is_counted_along_the_inputs(model_type: str, weight: str, turned: bool) -> None:
    model = tiny_model(model_type)
    assert sum(held for held, _ in families.held_weights(model).values()) == 0
    whole = model.get_parameter(weight).data
    stacked = whole if whole.dim() == 3 else whole[None]
    for matrix in stacked[1:] if len(stacked) > 1 else stacked:
        zeros_of(matrix.T if turned else matrix)
    held = families.held_weights(model)
    assert held.pop(weight) == ((len(stacked) - (len(stacked) > 1)) * stacked[0].numel(), whole.numel())
    assert not any(count for count, _ in held.values())
    for matrix in stacked:
        matrix.copy_(torch.ones_like(matrix))
        zeros_of(matrix if turned else matrix.T)
    assert families.held_weights(model)[weight][0] == 0


def zeros_of(matrix: torch.Tensor) -> None:
    """Set two of every four consecutive inputs of a matrix `(out, in)`, a view, to zero, by row."""
    for row, values in enumerate(matrix):
        values[row % 3 :: 4] = 0
        values[(row % 3) + 1 :: 4] = 0


@pytest.mark.parametrize(("model_type", "vision"), [("qwen2_vl", True), ("gemma3n_text", False)])
def test_blocks_are_those_of_the_language_model(model_type: str, vision: bool) -> None:
    model = tiny_model(model_type)
    names = [name for name, _, _ in families.block_weights(model)]
    assert names
    assert all(".layers." in name and "visual" not in name for name in names)
    assert vision == any("visual" in name for name, _ in model.named_parameters())


def test_a_type_is_pruned_and_its_figures_are_those_of_the_files(tmp_path: Path) -> None:
    found = families.run_type("qwen2_moe", CAUSAL, tmp_path)
    assert (found["outcome"], found["reason"]) == (families.PRUNED, "")
    assert found["covered"] + sum(found["dense"].values()) == found["weights"]
    config = tiny_config("qwen2_moe")
    router = config.num_hidden_layers * config.num_experts * config.hidden_size
    gate = config.num_hidden_layers * config.hidden_size
    assert found["weights"] - found["covered"] == router + gate
    assert found["covered"] / found["weights"] < found["at_default_sizes"] < 1


@pytest.mark.parametrize(
    ("model_type", "loader", "outcome", "says"),
    [
        ("reformer", CAUSAL, families.REFUSED, "return ReformerOutput, not hidden states"),
        ("musicgen", CAUSAL, families.REFUSED, "holds several language models"),
        ("pi0", WRAPPER, families.REFUSED, "names no vocabulary"),
        ("diffusion_gemma", WRAPPER, families.REFUSED, "no layer left to prune in .*shared between blocks"),
        ("gemma4_assistant", CAUSAL, families.UNBUILT, "producing a cache"),
    ],
)
def test_what_is_not_pruned_has_its_reason(
    model_type: str, loader: str, outcome: str, says: str, tmp_path: Path
) -> None:
    found = families.run_type(model_type, loader, tmp_path)
    assert found["outcome"] == outcome
    assert re.search(says, found["reason"])


@pytest.mark.parametrize(
    ("error", "outcome"), [(InputError("no", "yes"), families.REFUSED), (KeyError("x"), families.FAILED)]
)
def test_an_error_is_a_refusal_or_a_fault(
    error: Exception, outcome: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(llmprune, "prune", fail)
    assert families.run_type("llama", CAUSAL, tmp_path)["outcome"] == outcome


def test_a_type_that_takes_too_long_is_stopped() -> None:
    row = families.run_limited("llama", CAUSAL, Namespace(seconds=0, memory=2**33))
    assert (row["type"], row["loader"], row["outcome"]) == ("llama", CAUSAL, families.STOPPED)


def test_a_type_that_has_a_row_is_not_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    record.append(out, record.Stamp("python -m eval.families", "0" * 12), {"type": "llama", "loader": CAUSAL})
    before = out.read_bytes()
    assert families.main(["llama", "--out", str(out)]) == 0
    assert (out.read_bytes(), capsys.readouterr().err) == (before, "")


@pytest.mark.parametrize(
    ("model_type", "name"), [("llama", "LlamaForCausalLM"), ("qwen2_vl", "Qwen2VLForConditionalGeneration")]
)
def test_a_stock_model_is_of_the_class_that_holds_all(model_type: str, name: str, tmp_path: Path) -> None:
    model = models.load_stock(save_tiny(model_type, tmp_path / "m", tokenizer=False), dtype=torch.float32)
    assert type(model).__name__ == name
    assert not model.training
