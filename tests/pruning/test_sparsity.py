"""What is to be removed and pruned is read from one line, and described without doubt."""

from __future__ import annotations

from fractions import Fraction

import pytest

from llmprune import InputError
from llmprune.pruning.sparsity import parse_sparsity


@pytest.mark.parametrize(
    ("text", "name", "meaning"),
    [
        ("channels:25%", "channels:25%", "25 % of the MLP channels removed"),
        ("heads:0.5 + channels : 1%", "channels:1%+heads:50%", "1 % of the MLP channels removed and 50 % of the"),
        ("channels:20%+2:4", "channels:20%+2:4", "20 % of the MLP channels removed, then 2:4, prunes 2 of every 4"),
        ("2:4", "2:4", "2:4, prunes 2 of every 4 weights, 50 %"),
        ("size:0.75 + 2:4", "size:75%+2:4", "75 % of the block parameters left, then 2:4"),
        ("heads:33%+50%", "heads:33%+50%", "33 % of the attention heads removed, then 50 % unstructured"),
    ],
)
def test_what_goes_is_read_and_said(text: str, name: str, meaning: str) -> None:
    goal = parse_sparsity(text)
    assert goal.name == name
    assert goal.describe().startswith(meaning)
    assert parse_sparsity(goal.name) == goal


def test_what_the_model_allows_is_said_before_what_was_asked_for() -> None:
    asked = parse_sparsity("channels:25%+heads:25%+2:4")
    done = {"channels": Fraction(44, 172), "heads": Fraction(1, 4)}
    assert asked.describe(done=done).startswith(
        "25.6 % of the MLP channels removed (25 % asked for) and 25 % of the attention heads removed, then 2:4"
    )


@pytest.mark.parametrize(
    "text", ["size", "size:0%", "size:100%", "size:75", "size:50%+size:50%", "size:75%+blocks:1", "experts:1%+size:9%"]
)
def test_a_size_is_a_ratio_and_names_nothing_else(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_sparsity(text)
    assert caught.value.hint


@pytest.mark.parametrize("text", ["channels", "channels:x", "channels:-5%", "heads:2:4", "channels:25%+", ""])
def test_what_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_sparsity(text)
    assert caught.value.hint
