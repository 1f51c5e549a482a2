"""A config cannot ask for more than what is stored deserves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from commands import edit_config
from helpers import save_tiny

from llmprune import InputError, load
from llmprune.model.bounded import Bounded, Stored
from llmprune.sources.models import read_config

SMALL = Stored(tensors=1, weights=100)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(2**40),
        lambda: torch.ones(2**20, 2**20),
        lambda: torch.arange(2**40),
        lambda: torch.full((2**33,), 1, dtype=torch.bool),
        lambda: torch.outer(torch.arange(2**16), torch.arange(2**16)),
        lambda: torch.ones(2**16).expand(2**20, 2**16).clone(),
        lambda: torch.empty(2**30).normal_(),
        lambda: [torch.zeros(1) for _ in range(10_100)],
    ],
)
def test_what_is_too_large_or_too_many_is_refused_unmade(make: Any) -> None:
    with pytest.raises(ValueError, match="its config asks for"), Bounded(SMALL):
        make()


def test_what_is_only_reserved_or_on_the_meta_device_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmprune.model.bounded.MOST_BYTES", 1000)
    with Bounded(SMALL):
        torch.zeros(2**40, device="meta").add_(1)
        torch.empty(2**29)
        assert torch.zeros(250).sum() == 0
        assert torch.ones(10, 10).expand(1000, 10, 10)[:2].sum() == 200
    with pytest.raises(ValueError, match=r"a tensor of 1,004 bytes, the most are 1,000"), Bounded(SMALL):
        torch.zeros(251)
    with Bounded(Stored(1, 126)):  # of eight bytes
        torch.zeros(251)


HUGE = [
    *({"model_type": kind, "num_hidden_layers": 10**9} for kind in ("llama", "qwen3", "gemma3_text", "gpt_oss")),
    {"model_type": "mixtral", "num_local_experts": 10**5},
    {"model_type": "mixtral", "num_local_experts": 10**4, "intermediate_size": 1},
    {"model_type": "deepseek_v3", "n_routed_experts": 10**4},
    {"model_type": "gptj", "n_positions": 2**30},
    {"num_labels": 10**6},
    {"id2label": {str(number): "x" * 20 for number in range(40_000)}},
    {"text_config": {"num_hidden_layers": 10**9}},
]


@pytest.mark.parametrize("changes", HUGE, ids=str)
def test_a_config_that_asks_for_far_too_much_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, tokenizer=False)
    edit_config(tmp_path, **changes)
    with pytest.raises(InputError):
        load(tmp_path)


def test_a_config_of_ordinary_size_is_not(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, tokenizer=False)
    edit_config(tmp_path, max_position_embeddings=2**31, num_labels=1000, total_parameters=10**12)
    assert read_config(tmp_path, False).num_labels == 1000
    load(tmp_path)


def test_a_folder_that_lacks_a_tensor_is_not_filled_with_random_values(tmp_path: Path) -> None:
    from helpers import rewrite

    save_tiny("llama", tmp_path, tokenizer=False)
    rewrite(tmp_path, lambda tensors: {name: value for name, value in tensors.items() if "q_proj" not in name})
    with pytest.raises(InputError, match="lacks 2 of 21 tensors"):
        load(tmp_path)
