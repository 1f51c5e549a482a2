"""Perplexity is what anyone computes with plain transformers, whatever the model and the size of the pieces."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import VOCAB, random_tokens, reload, save_tiny, skeleton_of
from torch import Tensor
from transformers import PreTrainedModel

from llmprune.errors import InputError
from llmprune.model.skeleton import Skeleton
from llmprune.streaming.perplexity import Perplexity, from_losses, perplexity

BLOCKS = 3
TYPES = {
    "llama": {},
    "gemma2": {"sliding_window": 8, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 1.0},
    "opt": {"init_std": 0.3, "dropout": 0.0},
}


@pytest.fixture(scope="module", params=TYPES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    """A tiny random model whose folder is its `name_or_path`."""
    options = {"num_hidden_layers": BLOCKS, "initializer_range": 0.3} | TYPES[request.param]
    return reload(save_tiny(request.param, tmp_path_factory.mktemp(request.param), tokenizer=False, **options))


def skeleton(model: PreTrainedModel) -> Skeleton:
    return skeleton_of(Path(model.name_or_path))


def windows(count: int, context: int) -> Tensor:
    return random_tokens(count, context, seed=count)


@torch.no_grad()
def plain(model: PreTrainedModel, tokens: Tensor) -> tuple[float, float]:
    """Perplexity and standard error as anyone would compute them: a window at a time, numpy, the delta method."""
    losses = np.array([float(model(input_ids=row[None], labels=row[None]).loss.double()) for row in tokens])
    value = math.exp(losses.mean())
    return value, value * losses.std(ddof=1) / math.sqrt(len(losses))


@pytest.mark.parametrize(("count", "context"), [(7, 40), (2, 64), (5, 2)])
def test_it_agrees_with_plain_transformers(model: PreTrainedModel, count: int, context: int) -> None:
    tokens = windows(count, context)
    found = perplexity(skeleton(model), tokens)
    value, error = plain(model, tokens)
    assert found.value == pytest.approx(value, rel=1e-5)
    assert found.error == pytest.approx(error, rel=1e-3)
    assert (found.windows, found.context) == (count, context)


@pytest.mark.parametrize("elements", [1, 7 * VOCAB, 11 * 7 * VOCAB + 1, 2**40])
def test_the_size_of_the_pieces_changes_nothing(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, elements: int
) -> None:
    tokens = windows(7, 40)
    whole = perplexity(skeleton(model), tokens)
    monkeypatch.setattr("llmprune.streaming.perplexity.CHUNK_ELEMENTS", elements)
    assert perplexity(skeleton(model), tokens).value == pytest.approx(whole.value, rel=1e-6)


def test_a_step_is_told_after_every_block_and_at_the_end(model: PreTrainedModel) -> None:
    steps: list[int] = []
    perplexity(skeleton(model), windows(2, 8), lambda: steps.append(1))
    assert len(steps) == BLOCKS + 1


def test_a_uniform_model_is_as_perplexed_as_its_vocabulary_is_large() -> None:
    found = from_losses(torch.full((9,), math.log(VOCAB), dtype=torch.float64), 8)
    assert found.value == pytest.approx(VOCAB)
    assert found.error == pytest.approx(0, abs=1e-9)


def test_one_window_has_no_error() -> None:
    assert from_losses(torch.tensor([1.0]), 4) == Perplexity(math.e, 0.0, 1, 4)


def test_the_error_shrinks_with_the_root_of_the_number_of_windows() -> None:
    losses = torch.rand(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    few, many = from_losses(losses, 8), from_losses(losses.repeat(100), 8)
    assert many.error == pytest.approx(few.error / 10, rel=0.01)


def test_a_hopeless_model_has_a_finite_perplexity() -> None:
    found = from_losses(torch.tensor([1e6, 2e6]), 8)
    assert math.isfinite(found.value)
    assert math.isfinite(found.error)


def test_logits_that_are_not_finite_are_refused(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmprune.streaming.perplexity.logits", lambda *_: torch.full((1, 7, VOCAB), torch.nan))
    with pytest.raises(InputError, match="NaN or Inf"):
        perplexity(skeleton(model), windows(1, 8))
