"""Removing channels and heads physically gives what zeroing them gives, in any family whose config can express it."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    random_tokens,
    reload,
    save_tiny,
    skeleton_of,
    toy_block,
    whole_logits,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from variants import source_of, toy_couplings

from llmprune import InputError
from llmprune.model.experts import storage_of
from llmprune.pruning.sparsity import Removal, parse_sparsity
from llmprune.streaming.block_types import all_couplings, block_runs
from llmprune.structure.coupling import Dependency
from llmprune.structure.cut import Cut, Structure
from llmprune.structure.float64 import Float64
from llmprune.structure.plan import plan_structure
from llmprune.structure.slicing import permute_and_slice, slice_channels

QUARTER, HALF = Fraction(1, 4), Fraction(1, 2)
FREE_HEADS = [
    "llama",
    "llama-bias",
    "llama-mha",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi",
    "phi3",
    "granite",
    "smollm3",
    "glm4",
    "starcoder2",
    "nemotron",
    "olmo",
    "cohere",
    "exaone4",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "deepseek_v3",
]
NO_HEADS = [
    "gpt2",
    "gpt_neox",
    "gptj",
    "gpt_neo",
    "bloom",
    "opt",
    "stablelm",
    "falcon",
    "falcon-new",
    "mpt",
    "xglm",
    "biogpt",
    "gpt_oss",
    "olmo2",
    "olmoe",
    "mamba",
]
CHANNELS = [
    "llama",
    "llama-bias",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi",
    "phi3",
    "opt",
    "gpt2",
    "gpt_neox",
    "gptj",
    "gpt_neo",
    "falcon",
    "falcon-new",
    "stablelm",
    "olmo",
    "olmo2",
    "cohere",
    "starcoder2",
    "granite",
    "smollm3",
    "glm4",
    "nemotron",
    "xglm",
    "biogpt",
    "exaone4",
    "qwen2_moe",
    "lfm2",
    "mixtral",
    "qwen3_moe",
    "olmoe",
    "gpt_oss",
    "granitemoe",
    "deepseek_v3",
    "nemotron_h",
    "jamba",
]
NO_CHANNELS = [
    "bloom",
    "mpt",
    "mamba",
    "bitnet",
    "llama4_text",
    "dbrx",
    "jetmoe",
]
SEVERAL = {"qwen2_moe": 2, "deepseek_v3": 2, "nemotron_h": 3}
"""Settings of the config that say widths of MLPs."""


def structure_of(folder: Path, *removals: Removal, **options: Any) -> Structure:
    return plan_structure(
        skeleton := skeleton_of(folder),
        removals,
        all_couplings(skeleton, random_tokens(1, 16)),
        block_runs(skeleton, random_tokens(1, 16)),
        **options,
    )


def random_kept(one: Cut, generator: torch.Generator) -> Tensor:
    """Inputs that stay when random units go."""
    stays = torch.ones(one.coupling.width, dtype=torch.bool)
    for pool in one.units:
        stays[pool[torch.randperm(len(pool), generator=generator)[: one.count]].flatten()] = False
    return stays.nonzero().flatten()


def zeroed_and_cut(folder: Path, structure: Structure) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The dense model with columns of its consumers zeroed, and the smaller one without them."""
    dense, skeleton = reload(folder), skeleton_of(folder)
    state = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    small = dict(state)
    experts: dict[str, list[Tensor]] = {}
    generator = torch.Generator().manual_seed(0)
    for one in structure.cuts:
        kept, block = random_kept(one, generator), skeleton.model.get_submodule(one.block)
        removed = torch.ones(one.coupling.width, dtype=torch.bool)
        removed[kept] = False
        places = {local: storage_of(block, local) for local in one.coupling.sliced_parameters(block)}
        own = {local: part(state[f"{one.block}.{name}"]) for local, (name, part) in places.items()}
        now = {local: part(small[f"{one.block}.{name}"]) for local, (name, part) in places.items()}
        for local, value in slice_channels(one.coupling, kept, now).items():
            name = f"{one.block}.{places[local][0]}"
            if name == f"{one.block}.{local}":
                small[name] = value
            else:
                experts.setdefault(name, []).append(value)
        weight = own[f"{one.coupling.consumer}.weight"]
        (weight.T if not one.coupling.transposed else weight)[removed] = 0
    dense.load_state_dict(state)
    model = AutoModelForCausalLM.from_config(structure.config, dtype=torch.float32).eval()
    model.load_state_dict(small | {name: torch.stack(values) for name, values in experts.items()})
    return dense, model


def assert_same_function(folder: Path, structure: Structure) -> None:
    dense, small = zeroed_and_cut(folder, structure)
    tokens = random_tokens(2, seed=4)
    for model in (dense, small):
        model.config._experts_implementation = "eager"
    dense, small = dense.double(), small.double()
    with Float64():
        before, after = whole_logits(dense, tokens), whole_logits(small, tokens)
    assert float((before - after).norm() / before.norm()) <= 1e-12
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in dense.parameters())


@pytest.mark.parametrize("name", CHANNELS)
def test_removed_channels_compute_the_same_as_zeros(name: str, tmp_path: Path) -> None:
    structure = structure_of(source_of(name, tmp_path), Removal("channels", QUARTER))
    assert len(structure.changes) == SEVERAL.get(name, 1)
    assert_same_function(tmp_path, structure)


@pytest.mark.parametrize(
    ("size", "multiple", "old", "new"),
    [(240, 8, 160, 120), (101, 1, 67, 52), (500, 32, 352, 256), (1536, 64, 1024, 768)],
)
def test_a_width_that_is_derived_from_a_size_is_set_by_that_size(
    size: int, multiple: int, old: int, new: int, tmp_path: Path
) -> None:
    """lfm2 makes its MLPs two thirds of `intermediate_size` wide, rounded to a multiple; no setting is that width."""
    source_of("lfm2", tmp_path, intermediate_size=size, block_multiple_of=multiple)
    structure = structure_of(tmp_path, Removal("channels", QUARTER), round_to=max(multiple, 4))
    assert f"{old} -> {new}" in structure.summary[0]
    assert set(structure.changes) == {"intermediate_size"}
    assert_same_function(tmp_path, structure)


def test_shared_experts_stay_as_wide_as_several_of_the_others(tmp_path: Path) -> None:
    """Rounded each for itself the widths would be 24 and 44, and the config says the second as twice the first."""
    source_of("deepseek_v3", tmp_path, n_shared_experts=2)
    structure = structure_of(tmp_path, Removal("channels", Fraction(3, 10)), round_to=4)
    assert structure.changes["moe_intermediate_size"] == 24
    assert "64 -> 48" in structure.summary[0]
    assert_same_function(tmp_path, structure)


def test_one_width_may_stand_in_several_settings(tmp_path: Path) -> None:
    source_of("qwen2_moe", tmp_path, shared_expert_intermediate_size=32)
    structure = structure_of(tmp_path, Removal("channels", QUARTER))
    assert structure.changes == {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}
    assert_same_function(tmp_path, structure)


@pytest.mark.parametrize("name", FREE_HEADS)
def test_removed_heads_compute_the_same_as_zeros(name: str, tmp_path: Path) -> None:
    structure = structure_of(source_of(name, tmp_path), Removal("heads", HALF))
    assert_same_function(tmp_path, structure)


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "gemma2"])
def test_query_heads_may_be_removed_from_every_kv_group(name: str, tmp_path: Path) -> None:
    source_of(name, tmp_path, hidden_size=96, num_attention_heads=8, num_key_value_heads=2, head_dim=8)
    structure = structure_of(tmp_path, Removal("heads", QUARTER))
    assert structure.changes["num_attention_heads"] == 6
    assert structure.changes["num_key_value_heads"] == 2
    assert "from every kv group" in structure.summary[0]
    assert_same_function(tmp_path, structure)


def test_heads_of_every_kind_are_removed_with_channels(tmp_path: Path) -> None:
    structure = structure_of(source_of("qwen3", tmp_path), Removal("channels", QUARTER), Removal("heads", HALF))
    assert structure.changes == {
        "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16
    }  # fmt: skip
    assert_same_function(tmp_path, structure)


def reads_as_a_sentence(text: str) -> None:
    """The message of a validator of transformers is shown to its end, without the validator's name."""
    assert not re.search(r"Error|validator|[:;,]$", text), text


@pytest.mark.parametrize("name", NO_HEADS)
def test_heads_that_a_config_cannot_express_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot express|could be traced|would change the others") as caught:
        structure_of(source_of(name, tmp_path), Removal("heads", HALF))
    assert caught.value.hint
    reads_as_a_sentence(caught.value.message)


@pytest.mark.parametrize("name", NO_CHANNELS)
def test_channels_that_a_config_cannot_express_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot express|could be traced|would change the others") as caught:
        structure_of(source_of(name, tmp_path), Removal("channels", QUARTER))
    assert caught.value.hint


def test_llama_wants_a_number_of_heads_that_divides_the_width(tmp_path: Path) -> None:
    """Of 6 heads in 6 groups a half may stay; 5 of 6 do not divide 48, so 4 do."""
    source_of("llama", tmp_path, hidden_size=48, num_attention_heads=6, num_key_value_heads=6, head_dim=8)
    structure = structure_of(tmp_path, Removal("heads", Fraction(1, 6)))
    assert structure.changes["num_attention_heads"] == 4
    assert "heads:" in structure.summary[0]
    assert "6 -> 4" in structure.summary[0]
    assert "the config cannot express nearer numbers" in structure.summary[0]
    reads_as_a_sentence(structure.summary[0])


@pytest.mark.parametrize(("share", "nearer"), [("1/10", "nearer to 4"), ("95/100", "nearer to 0")])
def test_a_share_that_is_nearest_to_none_or_all_heads_is_refused(share: str, nearer: str, tmp_path: Path) -> None:
    source_of("llama", tmp_path)
    with pytest.raises(InputError, match=nearer) as caught:
        structure_of(tmp_path, Removal("heads", Fraction(share)))
    assert "heads:50%" in caught.value.hint


@pytest.mark.parametrize(
    ("asked", "round_to", "width"), [("1/4", None, 96), ("1/2", 64, 64), ("3/10", 8, 88), ("3/10", 1, 90)]
)
def test_widths_are_rounded_as_the_summary_says(asked: str, round_to: int | None, width: int, tmp_path: Path) -> None:
    structure = structure_of(source_of("llama", tmp_path), Removal("channels", Fraction(asked)), round_to=round_to)
    assert structure.changes == {"intermediate_size": width}
    assert f"128 -> {width}" in structure.summary[0]
    assert ("coarse for" in structure.summary[0]) == (round_to is None)


@pytest.mark.parametrize("share", ["1/100", "99/100"])
def test_a_share_that_rounds_to_all_or_nothing_is_refused(share: str, tmp_path: Path) -> None:
    source_of("llama", tmp_path)
    with pytest.raises(InputError, match="rounds to"):
        structure_of(tmp_path, Removal("channels", Fraction(share)), round_to=32)


def test_groups_of_a_pattern_fit_the_new_width(tmp_path: Path) -> None:
    pattern = parse_sparsity("3:7").pattern
    with pytest.raises(InputError, match="rounds to"):
        structure_of(source_of("llama", tmp_path), Removal("channels", QUARTER), round_to=64, pattern=pattern)
    structure = structure_of(tmp_path, Removal("channels", QUARTER), round_to=1, pattern=pattern)
    assert structure.changes == {"intermediate_size": 98}


def test_a_row_is_removed_with_the_last_input_that_depends_on_it() -> None:
    single = torch.tensor([2, 0, -1, -1, -1])
    dependency = Dependency("q", single, torch.tensor([2, 3]), torch.tensor([[True, True, False], [False, True, True]]))
    assert dependency.kept_rows(torch.tensor([True, True, False])).tolist() == [0, 3, 4]
    assert dependency.kept_rows(torch.tensor([False, False, False])).tolist() == [0, 1, 2, 3, 4]
    assert dependency.kept_rows(torch.tensor([True, True, True])).tolist() == [4]


def test_kept_inputs_may_be_permuted(tmp_path: Path) -> None:
    structure = structure_of(source_of("llama", tmp_path), Removal("channels", QUARTER))
    dense = dict(reload(tmp_path).state_dict())
    one = structure.cuts[0]
    kept = random_kept(one, torch.Generator().manual_seed(1))
    order = kept[torch.randperm(len(kept), generator=torch.Generator().manual_seed(2))]
    changed = permute_and_slice(one.coupling, order, dense, f"{one.block}.")
    prefix = f"{one.block}.mlp."
    assert torch.equal(changed[f"{prefix}down_proj.weight"], dense[f"{prefix}down_proj.weight"][:, order])
    assert torch.equal(changed[f"{prefix}up_proj.weight"], dense[f"{prefix}up_proj.weight"][order])
    assert torch.equal(changed[f"{prefix}gate_proj.weight"], dense[f"{prefix}gate_proj.weight"][order])


@toy_block
class Invented(nn.Module):
    """Attention and a gated MLP with names nobody uses; gate and value interleaved in one layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.peat, self.moss = nn.Linear(width, 4 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.peat(x).unflatten(-1, (-1, 2)).unbind(-1)
        return x + self.moss(nn.functional.silu(a) * b)


def test_an_invented_block_loses_both_rows_of_a_channel() -> None:
    (coupling,) = toy_couplings("Invented")
    assert coupling.removable
    (dependency,) = coupling.dependencies
    removed = torch.zeros(32, dtype=torch.bool)
    removed[[3, 7]] = True
    assert sorted(set(range(64)) - set(dependency.kept_rows(removed).tolist())) == [6, 7, 14, 15]


def test_a_norm_over_all_channels_is_seen() -> None:
    (coupling,) = toy_couplings("Odd")
    assert not coupling.removable


def test_an_invented_model_is_cut_only_if_its_config_can_express_it(tmp_path: Path) -> None:
    save_tiny("toy", tmp_path, kind="Invented", hidden_size=16)
    with pytest.raises(InputError, match=r"'layers\.0\.moss'"):
        structure_of(tmp_path, Removal("channels", QUARTER))


@toy_block
class Summed(nn.Module):
    """An activation that mixes channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu().cumsum(-1))


def test_a_block_that_mixes_channels_is_refused_by_the_name_of_the_layer(tmp_path: Path) -> None:
    save_tiny("toy", tmp_path, kind="Summed", hidden_size=16)
    with pytest.raises(InputError, match=r"'layers\.0\.down'"):
        structure_of(tmp_path, Removal("channels", QUARTER))
