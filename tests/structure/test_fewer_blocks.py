"""The configs of models with fewer blocks, and the names of the blocks that stay."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from helpers import save_tiny, skeleton_of

from llmprune import InputError
from llmprune.pruning.sparsity import Removal, parse_sparsity
from llmprune.structure.cut import unchanged
from llmprune.structure.fewer_blocks import keep_blocks, plan_blocks, removed_count, renumbering
from llmprune.structure.written_config import check_written, smaller_config

SETTINGS: dict[str, tuple[dict[str, Any], tuple[int, ...], dict[str, Any]]] = {
    "llama": ({"num_hidden_layers": 4}, (0, 2), {"num_hidden_layers": 2}),
    "gpt2": ({"num_hidden_layers": 4}, (0, 3), {"n_layer": 2}),
    "mpt": ({"num_hidden_layers": 4}, (0, 1, 3), {"n_layers": 3}),
    "gemma2": (
        {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
        (0, 2, 3),
        {
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
    ),
    "deepseek_v3": (
        {"num_hidden_layers": 4, "first_k_dense_replace": 2},
        (0, 2, 3),
        {"num_hidden_layers": 3, "first_k_dense_replace": 1},
    ),
    "qwen3_moe": (
        {"num_hidden_layers": 4, "mlp_only_layers": [2]},
        (0, 2, 3),
        {"num_hidden_layers": 3, "mlp_only_layers": [1]},
    ),
    "llama4_text": (
        {"num_hidden_layers": 5, "moe_layers": [0, 1, 2, 3, 4]},
        (0, 2, 4),
        {"num_hidden_layers": 3, "moe_layers": [0, 1, 2]},
    ),
    "smollm3": (
        {"num_hidden_layers": 4},
        (0, 3),
        {"num_hidden_layers": 2, "no_rope_layers": [1, 0]},
    ),
}


@pytest.mark.parametrize("model_type", SETTINGS)
def test_numbers_and_lists_are_those_of_the_blocks_that_stay(model_type: str, tmp_path: Path) -> None:
    options, kept, wanted = SETTINGS[model_type]
    save_tiny(model_type, tmp_path, **options)
    skeleton = skeleton_of(tmp_path)
    found = keep_blocks(skeleton, unchanged(skeleton), kept, False)
    assert {key: found.changes[key] for key in wanted} == wanted
    assert found.kept_blocks == kept
    source = json.loads((tmp_path / "config.json").read_text())
    written = smaller_config(found, source)
    assert {key: written[key] for key in wanted} == wanted
    check_written(found, source)
    assert found.removed_parameters(skeleton) == sum(
        parameter.numel()
        for index in set(range(len(skeleton.blocks))) - set(kept)
        for parameter in skeleton.blocks[index].parameters()
    )


def test_a_config_that_would_make_another_block_is_refused(tmp_path: Path) -> None:
    # Every second block has experts: the third one cannot be the second.
    save_tiny("qwen2_moe", tmp_path, num_hidden_layers=4, decoder_sparse_step=2)
    skeleton = skeleton_of(tmp_path)
    with pytest.raises(InputError, match="cannot express 3 of 4 blocks"):
        keep_blocks(skeleton, unchanged(skeleton), (0, 2, 3), False)
    assert keep_blocks(skeleton, unchanged(skeleton), (0, 1), False).changes["num_hidden_layers"] == 2


def test_a_file_that_would_be_read_otherwise_is_refused(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    skeleton = skeleton_of(tmp_path)
    source = json.loads((tmp_path / "config.json").read_text())
    found = keep_blocks(skeleton, unchanged(skeleton), (0,), False)
    check_written(found, source)
    with pytest.raises(InputError, match="1 would be read, not 2"):
        check_written(replace(found, config=skeleton.config), source)


def test_a_file_with_what_json_lacks_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    save_tiny("mamba2", tmp_path, num_hidden_layers=3)
    skeleton = skeleton_of(tmp_path)
    source = json.loads((tmp_path / "config.json").read_text())
    assert source["time_step_limit"] == [0.0, {"__float__": "Infinity"}]
    found = keep_blocks(skeleton, unchanged(skeleton), (0, 2), False)
    check_written(found, source)
    assert smaller_config(found, source)["time_step_limit"] == source["time_step_limit"]


def test_names_of_blocks_are_numbered_anew(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path, num_hidden_layers=4)
    new = renumbering(skeleton_of(tmp_path), (0, 2, 3))
    assert new("model.layers.2.self_attn.q_proj.weight") == "model.layers.1.self_attn.q_proj.weight"
    assert new("model.layers.3.block_sparse_moe.experts.1.w2.weight").startswith("model.layers.2.")
    assert new("model.layers.3.block_sparse_moe.experts.1.w2.weight").endswith("experts.1.w2.weight")
    assert new("model.layers.0") == "model.layers.0"
    assert new("model.norm.weight") == "model.norm.weight"
    assert new("model.layers.4.eh_proj.weight") == "model.layers.3.eh_proj.weight"  # what predicts further tokens


@pytest.mark.parametrize(
    ("text", "total", "count"),
    [("blocks:6", 30, 6), ("blocks:20%", 30, 6), ("blocks:0.25", 6, 2), ("blocks:5%", 30, 2)],
)
def test_numbers_and_ratios(text: str, total: int, count: int) -> None:
    (removal,) = parse_sparsity(text).removals
    assert removed_count(removal, total) == count
    assert parse_sparsity(removal.name).removals == (removal,)


def test_a_number_is_told_with_its_share() -> None:
    found = parse_sparsity("blocks:6").describe(done={"blocks": Fraction(6, 30)})
    assert found == "6 of the transformer blocks (20 %) removed"
    assert parse_sparsity("blocks:6").describe() == "6 of the transformer blocks removed"


@pytest.mark.parametrize(
    ("removal", "total", "said"),
    [
        (Removal("blocks", Fraction(1, 100)), 30, "rounds to none"),
        (Removal("blocks", Fraction(0), 4), 4, "leaves none"),
        (Removal("blocks", Fraction(99, 100)), 4, "leaves none"),
    ],
)
def test_numbers_that_cannot_be_removed(removal: Removal, total: int, said: str) -> None:
    with pytest.raises(InputError, match=said):
        removed_count(removal, total)


@pytest.mark.parametrize("text", ["blocks:0", "blocks:100%", "blocks:1.5", "blocks:x", "blocks:2+blocks:1"])
def test_what_is_no_removal_of_blocks(text: str) -> None:
    with pytest.raises(InputError):
        parse_sparsity(text)


def test_the_plan_says_how_many(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, num_hidden_layers=4)
    skeleton = skeleton_of(tmp_path)
    found = plan_blocks(skeleton, unchanged(skeleton), Removal("blocks", Fraction(1, 4)), False)
    assert found.summary == ("blocks:25%: transformer blocks 4 -> 3 (25.0% of them)",)
    assert found.ratios == {"blocks": Fraction(1, 4)}
    assert found.whole == unchanged(skeleton)
