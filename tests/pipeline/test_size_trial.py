"""What a trial measures is what the folder of a run has, read by plain transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import job, random_tokens, reload, save_tiny, token_file
from torch.nn import functional

from llmprune import prune
from llmprune.pipeline import steps
from llmprune.pipeline.prepare import prepare
from llmprune.pipeline.size_errors import size_errors
from llmprune.pipeline.size_options import options_of
from llmprune.pipeline.size_trial import Trial
from llmprune.progress import Progress
from llmprune.pruning.sparsity import parse_sparsity

WINDOWS, LENGTH = 8, 32


@pytest.mark.parametrize("sparsity", ["channels:25%", "heads:50%", "blocks:1", "blocks:1+channels:20%"])
@torch.no_grad()
def test_it_is_the_divergence_of_the_folder(sparsity: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "BATCH_TOKENS", 2 * LENGTH)
    save_tiny("llama", tmp_path / "dense", num_hidden_layers=4)
    tokens, fitted = random_tokens(WINDOWS, LENGTH), WINDOWS - 2
    both = [token_file(tmp_path / f"{len(part)}.safetensors", part) for part in (tokens, tokens[:fitted])]
    whole, asked = (job(tmp_path / "dense", tmp_path / "out", text, sparsity, effort="balanced") for text in both)
    run = prepare(replace(whole, sparsity="50%"), Progress())
    choices = options_of(run)
    goal = parse_sparsity(sparsity)
    errors, adders = size_errors(run, choices, parse_sparsity("size:75%").size or 0, Progress())
    blocks = errors.depths[1].removed if goal.blocks else ()
    found = Trial(run, whole, choices.plan, adders)(goal.removals, blocks, Progress())

    prune(asked)
    dense, pruned = (reload(tmp_path / name)(tokens[fitted:]).logits for name in ("dense", "out"))
    p, q = dense.double().log_softmax(-1), pruned.double().log_softmax(-1)
    wanted = functional.kl_div(q, p, reduction="none", log_target=True).sum(-1).mean()
    assert found == pytest.approx(float(wanted), rel=1e-3)
    assert torch.isfinite(wanted)
    assert found > 0
