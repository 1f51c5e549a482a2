"""Removing channels and heads physically gives what zeroing them gives, in any family whose config can say so."""

from __future__ import annotations

import json
import re
from fractions import Fraction
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    Toy,
    ToyConfig,
    job,
    on_disk,
    random_tokens,
    reload,
    save_tiny,
    skeleton_of,
    streamed_logits,
    token_file,
    toy_block,
    whole_logits,
)
from test_coupling import toy_couplings
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from llmprune import InputError, PruneReport, prune
from llmprune.coupling import Feed
from llmprune.cuts import Cut, Structure
from llmprune.float64 import Float64
from llmprune.sparsity import Removal, parse_sparsity
from llmprune.structure import plan_structure
from llmprune.surgery import cut, rearrange
from llmprune.terminal import summary
from llmprune.verify import verify_folder

QUARTER, HALF = Fraction(1, 4), Fraction(1, 2)
EXTRA: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon-new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "llama-bias": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "lfm2": ("lfm2", {"intermediate_size": 240, "block_multiple_of": 8}),
}
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
]
NO_CHANNELS = [
    "bloom",
    "mpt",
    "mixtral",
    "qwen3_moe",
    "olmoe",
    "gpt_oss",
    "deepseek_v3",
    "mamba",
    "jamba",
    "bitnet",
]


def source_of(name: str, folder: Path, **options: Any) -> Path:
    model_type, extra = EXTRA.get(name, (name, {}))
    return save_tiny(model_type, folder, **{**extra, **options})


def structure_of(folder: Path, *removals: Removal, **options: Any) -> Structure:
    return plan_structure(skeleton_of(folder), removals, random_tokens(1, 16), **options)


def random_kept(one: Cut, generator: torch.Generator) -> Tensor:
    """Inputs that stay when random units go."""
    stays = torch.ones(one.coupling.width, dtype=torch.bool)
    for pool in one.units:
        stays[pool[torch.randperm(len(pool), generator=generator)[: one.count]].flatten()] = False
    return stays.nonzero().flatten()


def zeroed_and_cut(folder: Path, structure: Structure) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The dense model with columns of its sinks zeroed, and the smaller one without them."""
    dense = reload(folder)
    state = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    small = dict(state)
    generator = torch.Generator().manual_seed(0)
    for one in structure.cuts:
        kept = random_kept(one, generator)
        small |= cut(one.coupling, kept, small, f"{one.block}.")
        gone = torch.ones(one.coupling.width, dtype=torch.bool)
        gone[kept] = False
        weight = state[f"{one.name}.weight"]
        (weight.T if not one.coupling.transposed else weight)[gone] = 0
    dense.load_state_dict(state)
    model = AutoModelForCausalLM.from_config(structure.config, dtype=torch.float32).eval()
    model.load_state_dict(small)
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
def test_channels_that_are_gone_do_what_zeros_do(name: str, tmp_path: Path) -> None:
    structure = structure_of(source_of(name, tmp_path), Removal("channels", QUARTER))
    assert len(structure.changes) == 1
    assert_same_function(tmp_path, structure)


@pytest.mark.parametrize(
    ("size", "multiple", "old", "new"),
    [(240, 8, 160, 120), (101, 1, 67, 52), (500, 32, 352, 256), (1536, 64, 1024, 768)],
)
def test_a_width_that_is_computed_from_a_size_is_said_by_that_size(
    size: int, multiple: int, old: int, new: int, tmp_path: Path
) -> None:
    """lfm2 makes its MLPs two thirds of `intermediate_size` wide, rounded to a multiple; no setting is that width."""
    source_of("lfm2", tmp_path, intermediate_size=size, block_multiple_of=multiple)
    structure = structure_of(tmp_path, Removal("channels", QUARTER), round_to=max(multiple, 4))
    assert f"{old} -> {new}" in structure.said[0]
    assert set(structure.changes) == {"intermediate_size"}
    assert_same_function(tmp_path, structure)


@pytest.mark.parametrize("name", FREE_HEADS)
def test_heads_that_are_gone_do_what_zeros_do(name: str, tmp_path: Path) -> None:
    structure = structure_of(source_of(name, tmp_path), Removal("heads", HALF))
    assert_same_function(tmp_path, structure)


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "gemma2"])
def test_query_heads_may_go_from_every_kv_group(name: str, tmp_path: Path) -> None:
    source_of(name, tmp_path, hidden_size=96, num_attention_heads=8, num_key_value_heads=2, head_dim=8)
    structure = structure_of(tmp_path, Removal("heads", QUARTER))
    assert structure.changes["num_attention_heads"] == 6
    assert structure.changes["num_key_value_heads"] == 2
    assert "from every kv group" in structure.said[0]
    assert_same_function(tmp_path, structure)


def test_a_head_of_every_kind_goes_with_channels(tmp_path: Path) -> None:
    structure = structure_of(source_of("qwen3", tmp_path), Removal("channels", QUARTER), Removal("heads", HALF))
    assert structure.changes == {
        "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16
    }  # fmt: skip
    assert_same_function(tmp_path, structure)


def reads_as_a_sentence(text: str) -> None:
    """What a validator of transformers says is told to its end, without the validator's name."""
    assert not re.search(r"Error|validator|[:;,]$", text), text


@pytest.mark.parametrize("name", NO_HEADS)
def test_heads_that_a_config_cannot_say_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot say|could be traced|would change the others") as caught:
        structure_of(source_of(name, tmp_path), Removal("heads", HALF))
    assert caught.value.hint
    reads_as_a_sentence(caught.value.message)


@pytest.mark.parametrize("name", NO_CHANNELS)
def test_channels_that_a_config_cannot_say_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot say|could be traced|would change the others") as caught:
        structure_of(source_of(name, tmp_path), Removal("channels", QUARTER))
    assert caught.value.hint


def test_llama_wants_a_number_of_heads_that_divides_the_width(tmp_path: Path) -> None:
    """Of 6 heads in 6 groups a half may stay; 5 of 6 do not divide 48, so 4 do."""
    source_of("llama", tmp_path, hidden_size=48, num_attention_heads=6, num_key_value_heads=6, head_dim=8)
    structure = structure_of(tmp_path, Removal("heads", Fraction(1, 6)))
    assert structure.changes["num_attention_heads"] == 4
    assert "heads:" in structure.said[0]
    assert "6 -> 4" in structure.said[0]
    assert "nearer numbers cannot be said" in structure.said[0]
    reads_as_a_sentence(structure.said[0])


@pytest.mark.parametrize(("share", "nearer"), [("1/10", "nearer to 4"), ("95/100", "nearer to 0")])
def test_a_share_that_is_nearest_to_none_or_all_heads_is_refused(share: str, nearer: str, tmp_path: Path) -> None:
    source_of("llama", tmp_path)
    with pytest.raises(InputError, match=nearer) as caught:
        structure_of(tmp_path, Removal("heads", Fraction(share)))
    assert "heads:50%" in caught.value.hint


@pytest.mark.parametrize(
    ("asked", "round_to", "width"), [("1/4", None, 96), ("1/2", 64, 64), ("3/10", 8, 88), ("3/10", 1, 90)]
)
def test_widths_are_rounded_and_that_is_said(asked: str, round_to: int | None, width: int, tmp_path: Path) -> None:
    structure = structure_of(source_of("llama", tmp_path), Removal("channels", Fraction(asked)), round_to=round_to)
    assert structure.changes == {"intermediate_size": width}
    assert f"128 -> {width}" in structure.said[0]
    assert ("coarse for" in structure.said[0]) == (round_to is None)


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


def test_a_row_goes_when_all_that_it_feeds_goes() -> None:
    single = torch.tensor([2, 0, -1, -1, -1])
    feed = Feed("q", single, torch.tensor([2, 3]), torch.tensor([[True, True, False], [False, True, True]]))
    assert feed.staying(torch.tensor([True, True, False])).tolist() == [0, 3, 4]
    assert feed.staying(torch.tensor([False, False, False])).tolist() == [0, 1, 2, 3, 4]
    assert feed.staying(torch.tensor([True, True, True])).tolist() == [4]


def test_what_stays_may_change_places(tmp_path: Path) -> None:
    structure = structure_of(source_of("llama", tmp_path), Removal("channels", QUARTER))
    dense = dict(reload(tmp_path).state_dict())
    one = structure.cuts[0]
    kept = random_kept(one, torch.Generator().manual_seed(1))
    order = kept[torch.randperm(len(kept), generator=torch.Generator().manual_seed(2))]
    changed = rearrange(one.coupling, order, dense, f"{one.block}.")
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
    assert coupling.severable
    (feed,) = coupling.feeds
    gone = torch.zeros(32, dtype=torch.bool)
    gone[[3, 7]] = True
    assert sorted(set(range(64)) - set(feed.staying(gone).tolist())) == [6, 7, 14, 15]


def test_a_norm_over_all_channels_is_seen() -> None:
    (coupling,) = toy_couplings("Odd")
    assert not coupling.severable


def test_an_invented_model_is_cut_only_if_its_config_can_say_so(tmp_path: Path) -> None:
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


def pruned(work: Path, sparsity: str, name: str = "llama", **options: Any) -> tuple[Path, Path, PruneReport]:
    source = source_of(name, work / "source", **options.pop("model", {}))
    report = prune(job(source, work / "out", token_file(work / "tokens.safetensors"), sparsity, **options))
    return source, work / "out", report


def test_without_a_refit_the_written_weights_are_slices(tmp_path: Path) -> None:
    source, out, report = pruned(tmp_path, "channels:25%", method="magnitude", refit=False)
    before, after = on_disk(source), on_disk(out)
    assert before.keys() == after.keys()
    for at in range(2):
        prefix = f"model.layers.{at}.mlp."
        size = before[f"{prefix}down_proj.weight"].norm(dim=0)
        kept = size.sort(stable=True).indices[32:].sort().values
        assert torch.equal(after[f"{prefix}down_proj.weight"], before[f"{prefix}down_proj.weight"][:, kept])
        for layer in ("gate_proj", "up_proj"):
            assert torch.equal(after[f"{prefix}{layer}.weight"], before[f"{prefix}{layer}.weight"][kept])
    assert all(torch.equal(before[n], after[n]) for n in before if ".mlp." not in n)
    assert report.size["pruned"] < report.size["dense"]


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "phi3", "qwen3", "gemma3_text"])
def test_the_written_folder_is_a_stock_model_of_the_new_size(name: str, tmp_path: Path) -> None:
    source, out, report = pruned(tmp_path, "channels:25%", name)
    config = json.loads((out / "config.json").read_text())
    assert report.sparsity["config"].items() <= config.items()
    model, tokens = reload(out), random_tokens(3, seed=3)
    assert torch.equal(streamed_logits(skeleton_of(out), tokens), whole_logits(model, tokens))
    assert model.num_parameters() < reload(source).num_parameters()
    assert verify_folder(out, None, None, (), ()).violations == 0
    assert all(layer.error <= layer.stats["error_unfitted"] + 1e-9 for layer in report.layers if layer.pruned)
    generated = model.generate(tokens[:1, :6], max_new_tokens=5, do_sample=False, use_cache=True, pad_token_id=0)
    again = model.generate(tokens[:1, :6], max_new_tokens=5, do_sample=False, use_cache=False, pad_token_id=0)
    assert torch.equal(generated, again)


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3"])
@pytest.mark.parametrize("sparsity", ["heads:50%", "channels:25%+heads:50%"])
def test_a_model_with_fewer_heads_generates_with_its_cache(name: str, sparsity: str, tmp_path: Path) -> None:
    _, out, report = pruned(tmp_path, sparsity, name)
    assert report.sparsity["config"]["num_key_value_heads"] == 1
    model, tokens = reload(out), random_tokens(3, seed=3)
    assert torch.equal(streamed_logits(skeleton_of(out), tokens), whole_logits(model, tokens))
    generated = model.generate(tokens[:1, :6], max_new_tokens=5, do_sample=False, use_cache=True, pad_token_id=0)
    again = model.generate(tokens[:1, :6], max_new_tokens=5, do_sample=False, use_cache=False, pad_token_id=0)
    assert torch.equal(generated, again)


@pytest.mark.parametrize("options", [{}, {"method": "wanda"}, {"method": "lasso"}, {"method": "sparsegpt"}])
def test_first_smaller_then_sparse(options: dict[str, Any], tmp_path: Path) -> None:
    _, out, report = pruned(tmp_path, "channels:25%+2:4", **options)
    assert report.sparsity["pattern"] == "channels:25%+2:4"
    weights = {n: t for n, t in on_disk(out).items() if "proj" in n}
    assert weights["model.layers.0.mlp.down_proj.weight"].shape == (64, 96)
    for weight in weights.values():
        assert ((weight.reshape(len(weight), -1, 4) == 0).sum(-1) == 2).all()
    assert verify_folder(out, None, None, (), ()).violations == 0
    assert len(report.layers) == 14


def test_a_layer_that_only_loses_inputs_is_reported_and_verified_as_such(tmp_path: Path) -> None:
    _, out, report = pruned(tmp_path, "channels:25%+2:4", method="wanda", skip=("*.down_proj",))
    assert {layer.name.rpartition(".")[2] for layer in report.layers if not layer.pattern} == {"down_proj"}
    check = verify_folder(out, None, None, (), ())
    assert check.violations == 0
    assert len(check.layers) == 12


def test_the_error_is_told_before_the_refit_after_it_and_with_weights_pruned(tmp_path: Path) -> None:
    _, out, report = pruned(tmp_path, "channels:25%+2:4", "opt", method="wanda")
    (sink, *_) = [layer for layer in report.layers if "error_unfitted" in layer.stats]
    assert sink.stats["error_refitted"] < min(sink.stats["error_unfitted"], sink.error)
    assert "with the weights pruned" in summary(report)
    removed = report.sparsity["done"][0]
    for page in ("README.md", "prune_report.html"):
        assert removed in unescape((out / page).read_text(encoding="utf-8"))


def test_what_is_not_fitted_needs_no_dense_model(tmp_path: Path) -> None:
    _, _, report = pruned(tmp_path, "channels:25%", method="auto", effort="balanced", refit=False)
    assert report.recipe["targets"] == "pruned"


def test_a_share_of_the_rows_is_exact_after_rows_are_gone(tmp_path: Path) -> None:
    _, out, report = pruned(tmp_path, "channels:25%+50%", method="wanda")
    assert report.sparsity["scope"] == "row"
    for name, weight in on_disk(out).items():
        if "proj" in name:
            assert ((weight == 0).sum(1) == weight.shape[1] // 2).all()
    assert verify_folder(out, None, None, (), ()).violations == 0


def test_a_tampered_config_is_a_violation(tmp_path: Path) -> None:
    _, out, report = pruned(tmp_path, "channels:25%")
    report_file = out / "prune_report.json"
    text = json.loads(report_file.read_text())
    text["sparsity"]["config"]["intermediate_size"] = 100
    report_file.write_text(json.dumps(text))
    check = verify_folder(out, None, None, (), ())
    assert check.violations == 1
    assert "intermediate_size is 96, not 100" in check.text()
    (out / "config.json").write_text((out / "config.json").read_text().replace("96", "104"))
    with pytest.raises(InputError, match="on disk"):
        verify_folder(out, None, None, (), ())
    assert report.sparsity["config"] == {"intermediate_size": 96}


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "no channel left": ("channels:100%", {}, "leaves none"),
    "nothing goes": ("channels:0%", {}, "removes none"),
    "twice": ("channels:10%+channels:20%", {}, "twice"),
    "two patterns": ("2:4+50%", {}, "two patterns"),
    "no column score": ("channels:25%", {"method": "sparsegpt"}, "score for whole channels"),
    "no score for weights": ("2:4", {"method": "lasso"}, "rule for single weights"),
    "no scale": ("channels:25%", {"method": "scaling"}, "no learned scale"),
    "unknown": ("tails:25%", {}, "unknown sparsity"),
    "skip": ("channels:25%", {"skip": ("*.0.*",)}, "--skip"),
    "round": ("2:4", {"round_to": 8}, "--round-to"),
    "allocate": ("channels:25%", {"allocate": "error"}, "--allocate"),
    "permute": ("channels:25%", {"permute": True}, "--permute"),
    "scope": ("channels:25%", {"scope": "row"}, "--scope"),
    "dense": ("channels:25%", {"refit": False, "targets": "dense"}, "--targets dense"),
    "layer scope": ("channels:25%+50%", {"scope": "layer"}, "--scope layer"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_and_nothing_is_written(case: str, tmp_path: Path) -> None:
    sparsity, options, message = BAD[case]
    with pytest.raises(InputError, match=message) as caught:
        pruned(tmp_path, sparsity, **options)
    assert caught.value.hint
    assert {path.name for path in tmp_path.iterdir()} <= {"source", "tokens.safetensors"}


@pytest.mark.parametrize("method", ["magnitude", "wanda", "obd", "obs", "lasso", "apoz"])
@pytest.mark.parametrize("steps", [1, 3])
def test_every_criterion_with_refit_beats_it_without(method: str, steps: int, tmp_path: Path) -> None:
    _, _, fitted = pruned(tmp_path / "a", "channels:25%", "opt", method=method, steps=steps)
    _, _, bare = pruned(tmp_path / "b", "channels:25%", "opt", method=method, steps=steps, refit=False)
    (first, *_), (plain, *_) = fitted.layers, bare.layers
    assert first.error < plain.error
    assert plain.error == pytest.approx(plain.stats["error_unfitted"], rel=1e-4)


class PeatConfig(ToyConfig):
    """The toy of a kind whose config says how wide it is."""

    model_type = "toy-peat"

    def __init__(self, bog_width: int = 32, **kwargs: Any) -> None:
        self.bog_width = bog_width
        super().__init__(**kwargs)


class Stain(nn.Module):
    """A learned scale for every channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Bog(nn.Module):
    """A plain MLP with a learned scale in the middle."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.peat, self.stain, self.moss = nn.Linear(width, inner), Stain(inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.moss(self.stain(self.peat(x).relu()))


class Peat(Toy):
    """Two such blocks."""

    config_class = PeatConfig

    def __init__(self, config: PeatConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Bog(config.hidden_size, config.bog_width) for _ in range(2))
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


AutoConfig.register("toy-peat", PeatConfig)
AutoModelForCausalLM.register(PeatConfig, Peat)


def test_channels_go_by_their_learned_scale(tmp_path: Path) -> None:
    source, out, report = pruned(tmp_path, "channels:25%", "toy-peat", method="scaling", round_to=1)
    assert report.sparsity["config"] == {"bog_width": 24}
    before, after = on_disk(source), on_disk(out)
    for at in range(2):
        scale = before[f"layers.{at}.stain.weight"]
        kept = scale.abs().sort(stable=True).indices[8:].sort().values
        assert torch.equal(after[f"layers.{at}.stain.weight"], scale[kept])
        assert torch.equal(after[f"layers.{at}.peat.bias"], before[f"layers.{at}.peat.bias"][kept])
    tokens = random_tokens(2, seed=3)
    assert torch.equal(streamed_logits(skeleton_of(out), tokens), whole_logits(reload(out), tokens))


@pytest.mark.parametrize(("name", "offset"), [("llama", 0.0), ("gemma", 1.0), ("gpt2", 0.0)])
def test_weights_go_by_the_scale_of_the_norm_that_feeds_them(name: str, offset: float, tmp_path: Path) -> None:
    layer, norm = {
        "gpt2": ("transformer.h.1.mlp.c_fc", "transformer.h.1.ln_2"),
    }.get(name, ("model.layers.1.mlp.up_proj", "model.layers.1.post_attention_layernorm"))
    source, out, _ = pruned(tmp_path, "2:4", name, method="scaling", only=(layer,))
    before, after = on_disk(source), on_disk(out)
    weight, left = before[f"{layer}.weight"], after[f"{layer}.weight"]
    if name == "gpt2":
        weight, left = weight.T, left.T
    score = weight.abs() * (before[f"{norm}.weight"] + offset).abs()
    keep = torch.zeros(score.numel() // 4, 4, dtype=torch.bool)
    keep.scatter_(1, score.reshape(-1, 4).topk(2).indices, True)
    assert torch.equal(left, weight * keep.view_as(weight))


def test_layers_without_a_norm_before_them_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no norm feeds 'model\.layers\.0\.self_attn\.o_proj'"):
        pruned(tmp_path, "2:4", method="scaling")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "name", "meaning"),
    [
        ("channels:25%", "channels:25%", "25 % of the MLP channels removed"),
        ("heads:0.5 + channels : 1%", "channels:1%+heads:50%", "1 % of the MLP channels removed and 50 % of the"),
        ("channels:20%+2:4", "channels:20%+2:4", "20 % of the MLP channels removed, then 2:4, prunes 2 of every 4"),
        ("2:4", "2:4", "2:4, prunes 2 of every 4 weights, 50 %"),
        ("heads:33%+50%", "heads:33%+50%", "33 % of the attention heads removed, then 50 % unstructured"),
    ],
)
def test_what_goes_is_read_and_said(text: str, name: str, meaning: str) -> None:
    goal = parse_sparsity(text)
    assert goal.name == name
    assert goal.describe().startswith(meaning)
    assert parse_sparsity(goal.name) == goal


@pytest.mark.parametrize("text", ["channels", "channels:x", "channels:-5%", "heads:2:4", "channels:25%+", ""])
def test_what_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_sparsity(text)
    assert caught.value.hint
