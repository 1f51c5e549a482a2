"""No family is special: any class streams bit-equal, prunes exactly, and loads in plain transformers."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    VISION,
    block_prefix,
    edit_tensor,
    job,
    on_disk,
    parameter_of,
    random_tokens,
    reload,
    rewrite,
    save_tiny,
    skeleton_of,
    streamed_logits,
    text_file,
    token_file,
    weight_of,
    whole_logits,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration
from transformers.pytorch_utils import Conv1D

from llmprune import InputError, PruneReport, prune
from llmprune.export.verify import verify_folder
from llmprune.model.reader import SafetensorsFolder
from llmprune.streaming.perplexity import perplexity

NAMES = """
llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi phi3 opt gpt2 gpt_neox gptj gpt_neo bloom falcon mpt stablelm
olmo olmo2 cohere starcoder2 granite smollm3 glm4 nemotron xglm biogpt exaone4
mixtral qwen2_moe qwen3_moe olmoe gpt_oss deepseek_v3 mamba jamba lfm2
llama4_text dbrx jetmoe granitemoe nemotron_h longcat_flash
"""
WRAPPERS = "gemma4 qwen3_vl mistral3 llama4 glm4v idefics3"
"""Models for images and text: a language model, which is pruned, beside a vision tower, which is not."""
BESIDE = r"vision|visual|projector|connector"
"""In names of what lies beside the language model."""
Case = tuple[str, dict[str, Any]]
CASES: dict[str, Case] = {
    **{name: (name, {}) for name in (NAMES + WRAPPERS).split()},
    "falcon-new-decoder": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-alibi-sequential": ("falcon", {"alibi": True, "parallel_attn": False, "multi_query": False, "bias": True}),
    "gpt2-untied": ("gpt2", {"tie_word_embeddings": False}),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "llama-tied-bias": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "opt-350m": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
}
METHODS = [(method, sparsity) for method, sparsity in (("wanda", "50%"), ("magnitude", "4:8"))]
MIXTURES = """
mixtral qwen2_moe qwen3_moe olmoe gpt_oss deepseek_v3 jamba llama4 llama4_text dbrx jetmoe granitemoe nemotron_h
longcat_flash
"""
MOE = set(MIXTURES.split())


@dataclass(frozen=True)
class Run:
    """A source, what `prune` made of it, and both as plain transformers loads them."""

    name: str
    source: Path
    out: Path
    report: PruneReport
    dense: PreTrainedModel
    pruned: PreTrainedModel

    @property
    def layers(self) -> list[str]:
        return [layer.name for layer in self.report.layers]


def run_of(source: Path, work: Path, name: str = "", sparsity: str = "2:4", **options: Any) -> Run:
    out = work / "out"
    report = prune(job(source, out, token_file(work / "tokens.safetensors"), sparsity, **options))
    return Run(name, source, out, report, reload(source), reload(out))


@pytest.fixture(scope="module", params=CASES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    work = tmp_path_factory.mktemp("family")
    model_type, options = CASES[request.param]
    return run_of(save_tiny(model_type, work / "source", **options), work, request.param)


def assert_exact(weight: Tensor, sparsity: str) -> None:
    """Counted by hand: exactly N zeros in every M consecutive inputs, or exactly half of every row or layer."""
    if ":" in sparsity:
        n, m = map(int, sparsity.split(":"))
        assert weight.shape[1] % m == 0
        counts = (weight.reshape(len(weight), -1, m) == 0).sum(-1)
        assert counts.min() == counts.max() == n
    else:
        assert ((weight == 0).sum(1) == weight.shape[1] // 2).all()


def assert_only_layers_changed(run: Run) -> None:
    dense, pruned = run.dense.state_dict(), run.pruned.state_dict()
    assert dense.keys() == pruned.keys()
    touched = {parameter_of(run.dense, name) for name in run.layers}
    assert touched <= dense.keys()
    changed = {name for name in dense if not torch.equal(dense[name], pruned[name])}
    assert touched <= changed
    assert not [name for name in changed if re.search(BESIDE, name)]
    assert type(run.pruned) is type(run.dense)
    # Channels that change places take their biases and scales along.
    for name in changed - touched:
        assert dense[name].dim() == 1 or name.endswith("_bias"), name
        assert torch.equal(dense[name].sort().values, pruned[name].sort().values), name


def assert_streams_like(folder: Path, model: PreTrainedModel) -> None:
    tokens = random_tokens(5, seed=3)
    assert torch.equal(streamed_logits(skeleton_of(folder), tokens), whole_logits(model, tokens))


def assert_verified_until_damaged(run: Run) -> None:
    assert verify_folder(run.out).violations == 0
    touched = parameter_of(run.pruned, run.layers[-1])
    disk = on_disk(run.out)
    # Experts may be stored one by one, or together.
    choices = {
        (run.layers[-1],): weight_of(run.pruned, run.layers[-1]),
        tuple(n for n in run.layers if parameter_of(run.pruned, n) == touched): run.pruned.state_dict()[touched],
    }
    damaged, target, name = next(
        (layers, target, name)
        for layers, target in choices.items()
        for name, t in disk.items()
        if t.shape == target.shape and torch.equal(t.float(), target.float())
    )
    edit_tensor(run.out, name, lambda t: t.masked_fill_(t == 0, 1))
    check = verify_folder(run.out)
    assert check.violations == int((target == 0).sum()) if ":" in run.report.sparsity["pattern"] else check.violations
    assert {layer.name for layer in check.layers if layer.violations} == set(damaged)
    edit_tensor(run.out, name, lambda t: t.copy_(disk[name]))


def assert_coverage_adds_up(run: Run) -> None:
    prefix = block_prefix(run.layers)
    block = {name: p for name, p in run.pruned.named_parameters() if name.startswith(prefix)}
    coverage = run.report.coverage
    assert coverage["block_parameters"] == sum(p.numel() for p in block.values())
    assert coverage["covered"] == sum(weight_of(run.pruned, name).numel() for name in run.layers)
    matrices = sum(p.numel() for p in block.values() if p.dim() >= 2)
    assert coverage["covered"] + sum(coverage["skipped"].values()) == matrices
    assert coverage["fraction"] == pytest.approx(coverage["covered"] / coverage["block_parameters"])


def assert_lawful(run: Run, sparsity: str = "2:4") -> None:
    """All laws at once, for the sources below that are no row of the matrix."""
    for name in run.layers:
        assert_exact(weight_of(run.pruned, name), sparsity)
    assert_only_layers_changed(run)
    assert_streams_like(run.source, run.dense)
    assert_streams_like(run.out, run.pruned)
    assert_coverage_adds_up(run)
    assert_verified_until_damaged(run)
    assert on_disk(run.source).keys() == on_disk(run.out).keys()


def test_streaming_the_source_is_bit_equal_to_the_whole_model(run: Run) -> None:
    assert_streams_like(run.source, run.dense)


def test_streaming_the_pruned_folder_is_bit_equal_to_the_reloaded_model(run: Run) -> None:
    assert_streams_like(run.out, run.pruned)


def test_every_pruned_layer_has_exactly_the_pattern(run: Run) -> None:
    for name in run.layers:
        assert_exact(weight_of(run.pruned, name), "2:4")


def test_nothing_but_the_pruned_layers_changes(run: Run) -> None:
    assert_only_layers_changed(run)
    source, out = on_disk(run.source), on_disk(run.out)
    assert source.keys() == out.keys()
    assert {name: t.dtype for name, t in source.items()} == {name: t.dtype for name, t in out.items()}
    matrices = [name for name, tensor in source.items() if tensor.dim() > 1 and not name.endswith("_bias")]
    changed = sum(source[name].numel() for name in matrices if not torch.equal(source[name], out[name]))
    assert changed == run.report.coverage["covered"]


def test_every_linear_layer_of_a_block_is_pruned_or_accounted_for(run: Run) -> None:
    assert_coverage_adds_up(run)
    prefix = block_prefix(run.layers)
    linear = {
        name
        for name, module in run.pruned.named_modules()
        if name.startswith(prefix) and isinstance(module, nn.Linear | Conv1D)
    }
    assert {name for name in run.layers if parameter_of(run.pruned, name) == f"{name}.weight"} <= linear
    left = sum(weight_of(run.pruned, name).numel() for name in linear - set(run.layers))
    assert left <= sum(run.report.coverage["skipped"].values())
    if run.name not in MOE | {"mamba"}:
        assert linear == set(run.layers)


def test_tied_embeddings_stay_tied(run: Run) -> None:
    def tied(model: PreTrainedModel) -> bool:
        head = model.get_output_embeddings()
        return head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()

    config = run.dense.config if run.name in WRAPPERS.split() else run.dense.config.get_text_config()
    assert tied(run.pruned) == tied(run.dense) == bool(config.tie_word_embeddings)


def test_every_matrix_of_every_expert_is_pruned(run: Run) -> None:
    assert "fused experts" not in run.report.coverage["skipped"]
    pruned = {parameter_of(run.pruned, name) for name in run.layers}
    inside = block_prefix(run.layers)
    fused = {n for n, p in run.pruned.named_parameters() if p.dim() == 3 and "conv" not in n and n.startswith(inside)}
    assert fused <= pruned
    assert (len(pruned) < len(run.layers)) == (run.name in MOE)


def test_the_verifier_passes_until_a_weight_is_damaged(run: Run) -> None:
    assert_verified_until_damaged(run)


@pytest.mark.parametrize(("method", "sparsity"), METHODS)
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bloom"])
def test_other_methods_and_patterns_are_exact_too(model_type: str, method: str, sparsity: str, tmp_path: Path) -> None:
    source = save_tiny(model_type, tmp_path / "source")
    run = run_of(source, tmp_path, model_type, sparsity, method=method)
    assert_lawful(run, sparsity)
    dense, pruned = run.dense.state_dict(), run.pruned.state_dict()
    for name in (parameter_of(run.dense, layer) for layer in run.layers):
        kept = pruned[name] != 0
        assert torch.equal(pruned[name][kept], dense[name][kept])


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2", "mixtral", "qwen2_5_vl"])
def test_reported_perplexity_is_that_of_plain_transformers(model_type: str, tmp_path: Path) -> None:
    calib, text = text_file(tmp_path / "calib.txt"), text_file(tmp_path / "eval.txt", 200, seed=2)
    options = {"evaluate": True, "eval_text": str(text), "eval_context": 32, "eval_windows": 5}
    source = save_tiny(model_type, tmp_path / "source")
    report = prune(job(source, tmp_path / "out", calib, samples=4, seq_len=24, **options))
    ids = torch.tensor([int(word[1:]) for word in text.read_text().split()])[: 5 * 32].view(5, 32)
    assert report.evaluation is not None
    for folder, key in ((source, "dense"), (tmp_path / "out", "pruned")):
        with torch.no_grad():
            scores = reload(folder)(input_ids=ids).logits[:, :-1].double()
        loss = functional.cross_entropy(scores.flatten(0, 1), ids[:, 1:].flatten())
        assert report.evaluation[key]["value"] == pytest.approx(math.exp(float(loss)), rel=1e-5)
        assert perplexity(skeleton_of(folder), ids).value == pytest.approx(math.exp(float(loss)), rel=1e-5)


class TelescopeConfig(PreTrainedConfig):
    """Names that no library has seen."""

    model_type = "telescope"
    attribute_map = {"hidden_size": "aperture"}  # noqa: RUF012

    def __init__(self, aperture: int = 32, lenses: int = 3, vocab_size: int = 96, **kwargs: Any) -> None:
        self.aperture, self.lenses, self.vocab_size = aperture, lenses, vocab_size
        super().__init__(**{"tie_word_embeddings": False, **kwargs})


class Lens(nn.Module):
    """Attention and feed-forward side by side behind one fused in-projection; returns a tuple."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.grind = nn.LayerNorm(width)
        self.refract = nn.Linear(width, 5 * width)
        self.coating = nn.ModuleDict({"inner": nn.Linear(width, width, bias=False)})
        self.focus = nn.Linear(2 * width, width)

    def forward(self, light: Tensor, *, stop: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, a, b = self.refract(self.grind(light)).chunk(5, dim=-1)
        seen = functional.scaled_dot_product_attention(q, k, v, attn_mask=stop)
        glow = torch.cat([self.coating["inner"](seen), functional.silu(a) * b], dim=-1)
        return light + self.focus(glow), glow.mean()


class Telescope(PreTrainedModel):
    """A language model whose head is a product with its embedding; it says nothing about its blocks."""

    config_class = TelescopeConfig

    def __init__(self, config: TelescopeConfig) -> None:
        super().__init__(config)
        self.lookup = nn.Embedding(config.vocab_size, config.aperture)
        self.lenses = nn.ModuleList(Lens(config.aperture) for _ in range(config.lenses))
        self.eyepiece = nn.LayerNorm(config.aperture)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.2)

    def forward(self, input_ids: Tensor, use_cache: bool | None = None, **_: Any) -> CausalLMOutput:
        light = self.lookup(input_ids)
        stop = torch.ones(light.shape[1], light.shape[1], dtype=torch.bool).tril()
        for lens in self.lenses:
            light, _glow = lens(light, stop=stop)
        return CausalLMOutput(logits=self.eyepiece(light) @ self.lookup.weight.T)


AutoConfig.register("telescope", TelescopeConfig)
AutoModelForCausalLM.register(TelescopeConfig, Telescope)


def test_a_class_nobody_has_heard_of_prunes_without_a_line_of_its_own(tmp_path: Path) -> None:
    run = run_of(save_tiny("telescope", tmp_path / "source"), tmp_path)
    assert_lawful(run)
    assert run.layers == [f"lenses.{i}.{n}" for i in range(3) for n in ("refract", "coating.inner", "focus")]
    assert run.report.coverage["skipped"] == {}
    assert type(run.pruned).__name__ == "Telescope"


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bloom", "opt", "gemma2", "mixtral", "falcon"])
def test_a_checkpoint_without_prefix_prunes_to_the_same_weights(model_type: str, tmp_path: Path) -> None:
    tied = {"tie_word_embeddings": True}
    full = run_of(save_tiny(model_type, tmp_path / "full", **tied), tmp_path)
    (tmp_path / "b").mkdir()
    bare = run_of(save_tiny(model_type, tmp_path / "bare", base=True, **tied), tmp_path / "b")
    assert on_disk(bare.source).keys() != on_disk(full.source).keys()
    assert_lawful(bare)
    theirs = full.pruned.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in bare.pruned.state_dict().items())


@pytest.mark.parametrize("head", ["stored", "absent"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "gpt_neox"])
def test_a_tied_head_may_be_stored_or_absent(model_type: str, head: str, tmp_path: Path) -> None:
    source = save_tiny(model_type, tmp_path / "source", head=head, tie_word_embeddings=True)
    run = run_of(source, tmp_path)
    assert_lawful(run)
    embedding, output = run.pruned.get_input_embeddings(), run.pruned.get_output_embeddings()
    assert embedding.weight.data_ptr() == output.weight.data_ptr()


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral"])
def test_many_shards_in_any_order_prune_to_the_same_weights(model_type: str, tmp_path: Path) -> None:
    one = run_of(save_tiny(model_type, tmp_path / "one"), tmp_path)
    (tmp_path / "m").mkdir()
    source = save_tiny(model_type, tmp_path / "many", shard="50KB")
    assert len(list(source.glob("*.safetensors"))) > 3
    rewrite(source, lambda tensors: dict(reversed(tensors.items())), shards=7)
    many = run_of(source, tmp_path / "m")
    assert_lawful(many)
    a, b = on_disk(one.out), on_disk(many.out)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_legacy_names_are_read_and_kept(tmp_path: Path) -> None:
    source = save_tiny("gpt_neox", tmp_path / "source", rename={"lm_head": "embed_out"})
    run = run_of(source, tmp_path)
    assert "embed_out.weight" in on_disk(run.out)
    assert_lawful(run)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_half_precision_source_keeps_its_dtype(model_type: str, dtype: torch.dtype, tmp_path: Path) -> None:
    run = run_of(save_tiny(model_type, tmp_path / "source", dtype=dtype), tmp_path)
    assert_lawful(run)
    assert {tensor.dtype for tensor in on_disk(run.out).values()} == {dtype}
    assert AutoConfig.from_pretrained(run.out).dtype == dtype


@pytest.mark.parametrize(
    ("stored", "asked"), [("float32", "bfloat16"), ("float32", "float16"), ("bfloat16", "float32")]
)
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_masks_are_exact_after_the_cast_and_the_config_says_the_dtype(
    model_type: str, stored: str, asked: str, tmp_path: Path
) -> None:
    source = save_tiny(model_type, tmp_path / "source", dtype=getattr(torch, stored))
    run = run_of(source, tmp_path, dtype=asked)
    dtype = getattr(torch, asked)
    dense, pruned = on_disk(source), on_disk(run.out)
    assert {tensor.dtype for tensor in pruned.values()} == {dtype}
    assert AutoConfig.from_pretrained(run.out).dtype == dtype
    assert AutoModelForCausalLM.from_pretrained(run.out).dtype == dtype
    for name in run.layers:
        assert_exact(weight_of(run.pruned, name), "2:4")
    matrices = [name for name, tensor in dense.items() if tensor.dim() > 1]
    assert sum(not torch.equal(pruned[name], dense[name].to(dtype)) for name in matrices) == len(run.layers)
    assert_streams_like(run.out, run.pruned)
    assert_verified_until_damaged(run)


@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "magnitude"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_sparse_source_keeps_its_zeros(model_type: str, method: str, tmp_path: Path) -> None:
    source = save_tiny(model_type, tmp_path / "source")
    generator = torch.Generator().manual_seed(5)
    rewrite(source, lambda ts: {k: t * (torch.rand(t.shape, generator=generator) > 0.3) for k, t in ts.items()})
    run = run_of(source, tmp_path, method=method)
    dense, pruned = on_disk(source), on_disk(run.out)
    assert all((pruned[name][tensor == 0] == 0).all() for name, tensor in dense.items())
    for name in run.layers:
        groups = (weight_of(run.pruned, name).reshape(-1, 4) == 0).sum(1)
        before = (weight_of(run.dense, name).reshape(-1, 4) == 0).sum(1)
        assert torch.equal(groups, before.clamp(min=2))
    assert verify_folder(run.out).violations == 0


def test_tensors_that_the_model_does_not_use_survive(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source")
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(8),
        "model.layers.1.self_attn.rotary_emb.inv_freq": torch.rand(8),
        "some.counter": torch.arange(3),
    }
    rewrite(source, lambda tensors: {**tensors, **extra})
    run = run_of(source, tmp_path)
    assert_lawful(run)
    out = on_disk(run.out)
    assert all(torch.equal(out[name], tensor) for name, tensor in extra.items())


def test_the_folder_holds_all_that_stock_loaders_need(tmp_path: Path) -> None:
    run = run_of(save_tiny("llama", tmp_path / "source"), tmp_path)
    names = {path.name for path in run.out.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "prune_report.json", "README.md"} <= names
    assert not [name for name in names if name.endswith(".tmp")]
    assert json.loads((run.out / "config.json").read_text()) == json.loads((run.source / "config.json").read_text())
    assert PruneReport.read(run.out).to_json() == {**run.report.to_json(), "out": run.out.name}
    assert not list(tmp_path.glob(".*.partial"))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"only": ("*.1.*",)}, "1.q 1.k 1.v 1.o 1.gate 1.up 1.down"),
        ({"only": ("*.k_proj", "*.down_proj")}, "0.k 0.down 1.k 1.down"),
        ({"skip": ("*.0.*", "*.q_proj", "*.gate_proj")}, "1.k 1.v 1.o 1.up 1.down"),
    ],
)
def test_layers_that_are_left_out_stay_as_they_are(options: dict[str, Any], expected: str, tmp_path: Path) -> None:
    run = run_of(save_tiny("llama", tmp_path / "source"), tmp_path, **options)
    short = {f"{name.split('.')[2]}.{name.rpartition('.')[2].removesuffix('_proj')}" for name in run.layers}
    assert short == set(expected.split())
    assert_lawful(run)


def test_a_weight_that_blocks_share_is_written_once(tmp_path: Path) -> None:
    run = run_of(save_tiny("toy-shared", tmp_path / "source", kind="Plain", hidden_size=16), tmp_path)
    first, second = (run.pruned.get_submodule(f"layers.{i}.up").weight for i in range(2))
    assert first.data_ptr() == second.data_ptr()
    assert_streams_like(run.out, run.pruned)
    names = [name for file in run.out.glob("*.safetensors") for name in load_file(file)]
    assert len(names) == len(set(names))
    assert sum(name.endswith(".up") for name in run.layers) <= 1


@pytest.mark.parametrize("model_type", ["llava", "internvl", "paligemma"])
def test_what_lies_beside_the_language_model_of_a_wrapper_is_copied(model_type: str, tmp_path: Path) -> None:
    source = save_tiny(model_type, tmp_path / "source", dtype=torch.bfloat16)
    (source / "preprocessor_config.json").write_text('{"size":  7}')
    run = run_of(source, tmp_path, model_type, method="wanda")
    assert_lawful(run)
    dense, pruned = on_disk(source), on_disk(run.out)
    beside = {name for name in dense if re.search(BESIDE, name)}
    assert beside
    assert all(torch.equal(dense[name].view(torch.uint8), pruned[name].view(torch.uint8)) for name in beside)
    assert (run.out / "preprocessor_config.json").read_bytes() == (source / "preprocessor_config.json").read_bytes()
    assert json.loads((run.out / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    model, card = run.report.model, (run.out / "README.md").read_text()
    assert (model["tower"], model["loader"]) == ("model.language_model", "AutoModelForImageTextToText")
    assert model["beside"] == "model.vision_tower, model.multi_modal_projector"
    assert model["parameters_beside"] == sum(dense[name].numel() for name in beside)
    assert "AutoProcessor" in card
    assert "model.language_model, the language model inside; unchanged beside it: model.vision_tower" in card


def test_text_may_pass_through_what_lies_beside_the_language_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some wrappers run the embedding of images for text, too, and use nothing of it."""
    plain = LlavaForConditionalGeneration.forward

    def through(self: Any, input_ids: Tensor, **options: Any) -> Any:
        image = self.model.multi_modal_projector(torch.ones(1, 1, VISION["hidden_size"]))
        output = plain(self, input_ids=input_ids, **options)
        output.logits = output.logits + image.mean()
        return output

    monkeypatch.setattr(LlavaForConditionalGeneration, "forward", through)
    source = save_tiny("llava", tmp_path / "source")
    assert_streams_like(source, reload(source))
    skeleton = skeleton_of(source)
    streamed_logits(skeleton, random_tokens())
    assert {p.stride() for p in skeleton.model.model.multi_modal_projector.linear_1.parameters()} == {(0, 0), (0,)}


def test_the_view_of_a_wrapper_as_a_language_model_is_pruned_to_the_same_bytes(tmp_path: Path) -> None:
    whole = run_of(save_tiny("llama4", tmp_path / "whole"), tmp_path, effort="fast")
    (tmp_path / "t").mkdir()
    shutil.copytree(whole.source, tmp_path / "text")
    settings = json.loads((whole.source / "config.json").read_text())
    (tmp_path / "text" / "config.json").write_text(json.dumps({**settings, "architectures": ["Llama4ForCausalLM"]}))
    text = run_of(tmp_path / "text", tmp_path / "t", effort="fast")
    assert [type(run.pruned).__name__ for run in (whole, text)] == [
        "Llama4ForConditionalGeneration", "Llama4ForCausalLM",
    ]  # fmt: skip
    a, b = on_disk(whole.out), on_disk(text.out)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert_streams_like(text.out, AutoModelForCausalLM.from_pretrained(whole.out).eval())


def test_blocks_are_those_of_the_language_model_and_no_other_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(VISION, "intermediate_size", 1024)
    source = save_tiny("qwen2_5_vl", tmp_path / "source")
    skeleton, read = skeleton_of(source), set()
    towers = [skeleton.model.model.visual, skeleton.model.model.language_model]
    vision, text = (sum(p.numel() for p in tower.parameters()) for tower in towers)
    assert vision > text
    assert skeleton.block_path == "model.language_model.layers"
    tensor = SafetensorsFolder.__getitem__
    monkeypatch.setattr(SafetensorsFolder, "__getitem__", lambda self, name: read.add(name) or tensor(self, name))
    streamed_logits(skeleton, random_tokens())
    assert {name for name in on_disk(source) if not re.search(BESIDE, name)} == read


@pytest.mark.parametrize(("model_type", "flat"), [("gemma3", False), ("qwen2_vl", True)])
def test_a_wrapper_loses_channels_where_its_config_says_the_widths(model_type: str, flat: bool, tmp_path: Path) -> None:
    source = save_tiny(model_type, tmp_path / "source")
    settings = json.loads((source / "config.json").read_text())
    if flat:
        settings = settings.pop("text_config") | settings
        (source / "config.json").write_text(json.dumps(settings))
    run = run_of(source, tmp_path, sparsity="channels:50%", method="wanda")
    found = json.loads((run.out / "config.json").read_text())
    section = found if flat else found["text_config"]
    assert section.pop("intermediate_size") == 64
    (settings if flat else settings["text_config"]).pop("intermediate_size")
    assert found == settings
    assert_streams_like(run.out, run.pruned)
    assert verify_folder(run.out).sizes == {"intermediate_size": (64, 64)}


@pytest.mark.parametrize(
    ("model_type", "options", "says"),
    [
        ("blip", {}, "cannot run on text alone.*pixel_values"),
        ("paligemma", {"evaluate": True}, "tokens see those that come after them"),
    ],
)
def test_a_wrapper_whose_language_model_needs_more_than_text_is_refused(
    model_type: str, options: dict[str, Any], says: str, tmp_path: Path
) -> None:
    source, text = save_tiny(model_type, tmp_path / "source"), text_file(tmp_path / "eval.txt")
    sizes = {"eval_text": str(text), "eval_context": 32}
    with pytest.raises(InputError, match=says):
        prune(job(source, tmp_path / "out", token_file(tmp_path / "t.safetensors"), **sizes, **options))
    assert not (tmp_path / "out").exists()
