"""Layers are selected by what recipes elsewhere write, too."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import skeleton_of

from llmprune.errors import InputError
from llmprune.model.selection import make_plan, matches

DOWN, UP = "model.layers.1.mlp.down_proj", "model.layers.1.mlp.gate_up_proj"


@pytest.mark.parametrize(
    ("pattern", "down", "up"),
    [
        ("*.down_proj", True, False),
        ("*_proj", True, True),
        ("down_proj", True, False),
        ("mlp.down_proj", True, False),
        (DOWN, True, False),
        ("up_proj", False, False),
        ("proj", False, False),
        ("mlp", False, False),
        ("re:.*down_proj", True, False),
        ("re:.*proj$", True, True),
        ("re:mlp", False, False),
        (r"re:model\.layers\.[01]\.", True, True),
        ("[m]odel*", True, True),
        ("*.l?yers.1.*", True, True),
        ("", False, False),
    ],
)
def test_a_glob_a_plain_name_and_a_regular_expression(pattern: str, down: bool, up: bool) -> None:
    assert (matches(DOWN, pattern), matches(UP, pattern)) == (down, up)


def test_what_is_no_regular_expression_is_refused() -> None:
    with pytest.raises(InputError, match=r"'re:\*' is no regular expression: nothing to repeat"):
        matches(DOWN, "re:*")


@pytest.mark.parametrize("skip", ["lm_head", "re:.*lm_head", "embed_tokens", "*norm"])
def test_skipping_what_stays_dense_anyway_is_noted(skip: str, tiny: Path) -> None:
    skeleton = skeleton_of(tiny)
    plan = make_plan(skeleton, None, skip=[skip, "down_proj"])
    (note,) = plan.notes
    assert f"--skip {skip!r} changes nothing" in note
    assert len(plan.layers) == 12
    with pytest.raises(InputError, match=r"--only .* matches none of 14 layers") as refused:
        make_plan(skeleton, None, only=[skip])
    assert "only linear layers of the blocks" in refused.value.hint


def test_exact_names_are_no_patterns(tiny: Path) -> None:
    skeleton = skeleton_of(tiny)
    name = "model.layers.0.mlp.up_proj"
    assert make_plan(skeleton, None, names=[name]).names == {name}
    for wrong in ("up_proj", "re:.*", "*"):
        with pytest.raises(InputError, match="none of 14 layers is called"):
            make_plan(skeleton, None, names=[name, wrong])
