"""Sources in FP8 and MXFP4: what they mean tensor by tensor, and what runs make of them; what cannot be is refused."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import edit_config
from helpers import job, on_disk, reload, rewrite, text_file, token_file, weight_of
from hub_server import Hub
from quantised import (
    compressed,
    meant,
    save_compressed,
    save_fp4_experts,
    save_fp8,
    save_mxfp4,
    save_per_tensor,
    settings_of,
    unpacked,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

from llmprune import load, prune
from llmprune.errors import InputError
from llmprune.export.pack import pack, unpack
from llmprune.export.verify import LayerSelection, verify_folder
from llmprune.model import stored_forms
from llmprune.model.dequantize import dequantized
from llmprune.model.quantization import Quantization
from llmprune.model.reader import SafetensorsFolder
from llmprune.model.skeleton import Skeleton
from llmprune.pipeline.estimate import dry_run
from llmprune.pipeline.output import workdir_of
from llmprune.pipeline.state import RunState
from llmprune.progress import Progress
from llmprune.sources.models import Source, open_source

BLOCKS = {"weight_block_size": (32, 32), "dequantize": True}
STOCK: dict[str, tuple[Callable[[Path], Path], Any]] = {
    "qwen3": (lambda folder: save_fp8("qwen3", folder), FineGrainedFP8Config(**BLOCKS)),
    "qwen3_moe": (lambda folder: save_fp8("qwen3_moe", folder), FineGrainedFP8Config(**BLOCKS)),
    "deepseek_v3": (lambda folder: save_fp8("deepseek_v3", folder), FineGrainedFP8Config(**BLOCKS)),
    "a scale each matrix": (
        lambda folder: save_per_tensor("qwen3", folder),
        FineGrainedFP8Config(weight_block_size=None, dequantize=True),
    ),
    "gpt_oss": (save_mxfp4, Mxfp4Config(dequantize=True)),
    "deepseek_v4": (save_fp4_experts, FineGrainedFP8Config(**BLOCKS, scale_fmt="ue8m0", expert_dtype="fp4")),
}

RAGGED = {"hidden_size": 160, "intermediate_size": 192, "num_hidden_layers": 1}
"""Sizes that blocks of 128 do not divide."""


def opened(folder: Path) -> Source:
    return open_source(str(folder), revision=None, cache=folder.parent, trust_remote_code=False, progress=Progress())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", STOCK)
def test_every_parameter_is_what_stock_transformers_dequantises(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    save, how = STOCK[name]
    folder = save(tmp_path / "model")
    stock = AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, dtype=dtype).state_dict()
    source = opened(folder)
    ours = Skeleton(source.config, source.weights(dtype), dtype=dtype).checkpoint
    assert ours.keys() == stock.keys()
    assert not ours.unused
    for key, tensor in stock.items():
        assert torch.equal(ours[key].to(tensor.dtype), tensor), key
        assert ours[key].dtype == (dtype if tensor.is_floating_point() else tensor.dtype)


def assert_means(folder: Path, suffix: str, block: tuple[int, int], dtype: torch.dtype) -> None:
    """Every tensor is what the slow reference says, at the size that its entry says."""
    raw, made = on_disk(folder), opened(folder).weights(dtype)
    plain = [name for name in raw if "_scale" not in name]
    assert set(made) == set(plain)
    scaled = [name for name in plain if f"{name}{suffix}" in raw]
    assert scaled
    for name in plain:
        wanted = raw[name]
        if name in scaled:
            wanted = meant(wanted, raw[f"{name}{suffix}"], block).to(dtype)
        assert torch.equal(made[name], wanted), name
        entry = made.entries[name]
        assert (entry.shape, entry.dtype, entry.nbytes) == (wanted.shape, wanted.dtype, wanted.nbytes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_last_blocks_may_be_smaller(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_fp8("qwen3", tmp_path / "model", (128, 128), **RAGGED)
    monkeypatch.setattr(stored_forms, "PART", 7 * 192)  # parts that begin inside of blocks
    assert_means(folder, "_scale_inv", (128, 128), dtype)


@pytest.mark.parametrize(
    ("strategy", "block"), [("tensor", (0, 0)), ("channel", (1, 0)), ("block", (24, 40)), ("group", (1, 16))]
)
def test_schemes_of_compressed_tensors(strategy: str, block: tuple[int, int], tmp_path: Path) -> None:
    folder = save_compressed("qwen3", tmp_path / "model", strategy, block, num_hidden_layers=1)
    assert_means(folder, "_scale", block, torch.bfloat16)


@pytest.mark.parametrize("kind", [torch.float8_e8m0fnu, torch.uint8])
def test_scales_may_be_exponents(kind: torch.dtype, tmp_path: Path) -> None:
    exact = tmp_path / "exact"

    def exponents(scale: Tensor) -> Tensor:
        return scale.log2().round().add(127).to(torch.uint8)

    save_fp8("qwen3", exact, shape=lambda scale: exponents(scale).float().sub(127).exp2(), num_hidden_layers=1)
    stored = save_fp8("qwen3", tmp_path / "e", shape=lambda scale: exponents(scale).view(kind), num_hidden_layers=1)
    wanted, found = opened(exact).weights(), opened(stored).weights()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_older_names_of_scales_and_tools_that_name_no_blocks(tmp_path: Path) -> None:
    folder = save_fp8(
        "qwen3", tmp_path / "model", (0, 0), suffix="_scale", settings={"quant_method": "fp8"}, num_hidden_layers=1
    )
    assert_means(folder, "_scale", (0, 0), torch.bfloat16)
    rewrite(folder, lambda tensors: {k.replace("weight_scale", "scale"): v for k, v in tensors.items()})
    assert not [name for name in opened(folder).weights() if "scale" in name]


def test_stacked_matrices_have_the_scales_of_each(tmp_path: Path) -> None:
    torch.manual_seed(0)
    values = torch.randn(3, 6, 10).to(torch.float8_e4m3fn)
    scales = torch.rand(3, 2, 3)
    single = torch.rand(3)
    rewrite(tmp_path, lambda _: {"a": values, "a_scale_inv": scales, "b": values.clone(), "b_scale_inv": single})
    blocks = Quantization("FP8", ((4, 4), (0, 0)))
    made = dequantized(SafetensorsFolder(tmp_path), blocks, torch.float32)
    for at in range(3):
        assert torch.equal(made["a"][at], meant(values[at], scales[at], (4, 4)))
        assert torch.equal(made["b"][at], meant(values[at], single[at], (0, 0)))
        assert all(made.in_rows(name) and torch.equal(made.rows(name, at, 3), made[name][at:]) for name in "ab")


@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_moe", "deepseek_v4"])
def test_an_expert_is_read_alone_and_is_what_it_is_among_the_others(name: str, tmp_path: Path) -> None:
    source = opened(STOCK[name][0](tmp_path / "model"))
    skeleton = Skeleton(source.config, source.weights(), expert_memory=1)
    found = skeleton.sliced(list(skeleton.checkpoint))
    assert len(found) == 4
    for parameter, slices in found.items():
        whole = skeleton.checkpoint[parameter]
        assert all(torch.equal(slices.read(index), part) for index, part in enumerate(whole))


def test_bytes_of_mxfp4_are_what_the_format_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = torch.arange(2 * 5 * 2 * 16).to(torch.uint8).view(2, 5, 2, 16)
    scales = torch.tensor([0, 1, 126, 127, 128, 200, 247, 3, 90, 121] * 2, dtype=torch.uint8).view(2, 5, 2)
    rewrite(tmp_path, lambda _: {"a_blocks": blocks, "a_scales": scales})
    monkeypatch.setattr(stored_forms, "PART", 128)
    packed = Quantization("MXFP4", packed=True)
    for dtype in (torch.float32, torch.bfloat16):
        made = dequantized(SafetensorsFolder(tmp_path), packed, dtype)
        assert torch.equal(made["a"], unpacked(blocks, scales).to(dtype))
    # A scale of 255 is no number.
    scales[0, 0, 0] = 255
    rewrite(tmp_path, lambda _: {"a_blocks": blocks, "a_scales": scales})
    made = dequantized(SafetensorsFolder(tmp_path), packed)
    assert not made["a"].isfinite().all()


RUNS: dict[str, tuple[Callable[[Path], Path], dict[str, Any], str]] = {
    "qwen3": (lambda folder: save_fp8("qwen3", folder, (48, 48)), {"method": "sparsegpt"}, "FP8, blocks of 48 x 48"),
    "qwen3_moe": (
        lambda folder: save_fp8("qwen3_moe", folder, matrices=r"experts\.\d.*weight$"),
        {"method": "sparsegpt"},
        "FP8, blocks of 32 x 32",
    ),
    "deepseek_v3": (
        lambda folder: save_fp8("deepseek_v3", folder),
        {"method": "magnitude"},
        "FP8, blocks of 32 x 32",
    ),
    "each output": (
        lambda folder: save_compressed("qwen3", folder, "channel", (1, 0)),
        {"method": "magnitude"},
        "FP8, a scale each output",
    ),
    "each matrix": (
        lambda folder: save_compressed("qwen3", folder, "tensor", (0, 0)),
        {"method": "magnitude", "dtype": "float32"},
        "FP8, a scale each matrix",
    ),
    "qwen3_vl": (lambda folder: save_fp8("qwen3_vl", folder), {"method": "magnitude"}, "FP8, blocks of 32 x 32"),
    "deepseek_v4": (save_fp4_experts, {"method": "magnitude"}, "FP8, blocks of 32 x 32, experts in FP4"),
    "gpt_oss": (save_mxfp4, {"method": "sparsegpt"}, "MXFP4"),
    "gpt_oss, magnitude": (save_mxfp4, {"method": "magnitude", "dtype": "float16"}, "MXFP4"),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_leaves_a_plain_model(name: str, tmp_path: Path) -> None:
    save, options, form = RUNS[name]
    folder, kind = save(tmp_path / "model"), options.get("dtype", "bfloat16")
    text = text_file(tmp_path / "text.txt")
    measured = {"evaluate": True, "eval_text": str(text), "eval_windows": 2, "eval_context": 24}
    report = prune(
        job(folder, tmp_path / "out", token_file(tmp_path / "tokens.safetensors"), **{**measured, **options})
    )
    dense, pruned = opened(folder).weights(getattr(torch, kind)), on_disk(tmp_path / "out")
    assert set(pruned) == set(dense)
    assert {tensor.dtype for tensor in pruned.values() if tensor.is_floating_point()} == {getattr(torch, kind)}
    assert all(tensor.shape == dense.entries[key].shape for key, tensor in pruned.items())
    settings = settings_of(tmp_path / "out")
    assert "quantization_config" not in settings
    assert settings.get("dtype", settings.get("torch_dtype")) == kind
    # Said in the report and on the card.
    assert (report.model["stored_as"], report.model["dequantized_to"]) == (form, kind)
    assert report.size["dense"] == sum(entry.nbytes for entry in dense.entries.values())
    assert f"stored as {form}; dequantised to {kind}" in (tmp_path / "out" / "README.md").read_text()
    assert f"stored as {form}; dequantised to {kind}" in (tmp_path / "out" / "prune_report.html").read_text()
    # Stock transformers loads it as any other, and every layer holds the pattern.
    model, layers = reload(tmp_path / "out"), [layer.name for layer in report.layers]
    for layer in layers:
        weight = weight_of(model, layer)
        assert int((weight.reshape(len(weight), -1, 4) == 0).sum(-1).min()) >= 2
    assert verify_folder(tmp_path / "out").violations == 0
    if options["method"] == "magnitude":
        # The others are the dequantised ones.
        for key, tensor in pruned.items():
            kept = tensor != 0
            assert torch.equal(tensor[kept], dense[key].to(tensor.dtype)[kept])
    assert report.evaluation is not None
    packed = pack(tmp_path / "out", tmp_path / "packed").out
    assert {p.read_bytes() for p in unpack(Path(packed), tmp_path / "plain").glob("*.safetensors")} == {
        p.read_bytes() for p in (tmp_path / "out").glob("*.safetensors")
    }


def test_the_result_is_that_of_the_model_that_was_dequantised_before(tmp_path: Path) -> None:
    folder, tokens = save_fp8("qwen3", tmp_path / "model"), token_file(tmp_path / "tokens.safetensors")
    stock = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=FineGrainedFP8Config(**BLOCKS), dtype=torch.bfloat16
    )
    plain = tmp_path / "plain"
    plain.mkdir()
    for file in folder.iterdir():
        (plain / file.name).write_bytes(file.read_bytes())
    rewrite(plain, lambda _: {name: tensor.clone() for name, tensor in stock.state_dict().items()})
    edit_config(plain, quantization_config=None)
    for source, out in ((folder, "a"), (plain, "b")):
        prune(job(source, tmp_path / out, tokens, effort="fast"))
    a, b = on_disk(tmp_path / "a"), on_disk(tmp_path / "b")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


class Stopped(BaseException):
    """Ends a run as an interruption would."""


def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, tokens = save_mxfp4(tmp_path / "model"), token_file(tmp_path / "tokens.safetensors")
    prune(job(folder, tmp_path / "whole", tokens, effort="fast"))
    again, commit = job(folder, tmp_path / "again", tokens, effort="fast"), RunState.commit

    def stopping(state: RunState, *arguments: Any) -> None:
        commit(state, *arguments)
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(RunState, "commit", stopping)
        with pytest.raises(Stopped):
            prune(again)
    assert workdir_of(tmp_path / "again").is_dir()
    prune(again)
    a, b = on_disk(tmp_path / "whole"), on_disk(tmp_path / "again")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_dry_run_tells_the_sizes_of_the_result_from_headers_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = token_file(tmp_path / "tokens.safetensors")
    for folder, dtype in ((save_fp8("qwen3", tmp_path / "a"), None), (save_mxfp4(tmp_path / "b"), "float32")):
        options = {"dtype": dtype, "method": "magnitude"}
        report = prune(job(folder, tmp_path / f"{folder.name}-out", tokens, **options))
        with monkeypatch.context() as patch:
            patch.setattr("llmprune.model.reader.read_tensor", lambda entry: pytest.fail(f"{entry} is read"))
            facts = dry_run(job(folder, tmp_path / "none", tokens, **options))
        pruned = on_disk(tmp_path / f"{folder.name}-out")
        assert facts["model"]["parameters"] == sum(tensor.numel() for tensor in pruned.values())
        assert facts["size"]["pruned"] == sum(tensor.nbytes for tensor in pruned.values())
        assert facts["size"]["dense"] == report.size["dense"]
        assert facts["model"]["stored_as"] == report.model["stored_as"]
    assert not (tmp_path / "none").exists()


def test_a_dry_run_of_a_model_on_the_hub_tells_the_same(tmp_path: Path, hub: Hub) -> None:
    tokens = token_file(tmp_path / "tokens.safetensors")
    cases = {
        "org/fp8": (save_fp8("qwen3", tmp_path / "a"), "channels:25%"),
        "org/fp4": (save_mxfp4(tmp_path / "b"), "2:4"),
    }
    for repo, (folder, sparsity) in cases.items():
        hub.add(repo, {path.name: path.read_bytes() for path in folder.iterdir()})
        there, here = (dry_run(job(model, tmp_path / "none", tokens, sparsity)) for model in (Path(repo), folder))
        assert there["model"]["stored_as"] == here["model"]["stored_as"]
        for key in ("layers", "size", "coverage", "sparsity"):
            assert there[key] == here[key], key
    rewrite(tmp_path / "a", without("scale_inv"))
    hub.add("org/bad", {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()})
    with pytest.raises(InputError, match="float8 tensors have no scales"):
        dry_run(job(Path("org/bad"), tmp_path / "none", tokens))


def test_no_tensor_is_kept_and_little_is_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_forms, "PART", 2**10)
    folder = save_fp8("qwen3", tmp_path / "model", num_hidden_layers=1)
    weights = opened(folder).weights()
    made: list[weakref.ref[Tensor]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                made.append(weakref.ref(result))
                assert result.dtype != torch.float32 or result.numel() <= 2**10
            return result

    with Watch():
        for name in weights:
            assert weights[name].dtype == torch.bfloat16
    assert made
    assert not [tensor for tensor in made if tensor() is not None]


def test_the_source_itself_is_verified_and_packed_as_it_is(tmp_path: Path) -> None:
    folder = save_fp8("qwen3", tmp_path / "model")
    assert verify_folder(folder, LayerSelection("2:4")).violations > 0
    pack(folder, tmp_path / "packed", sparsity="2:4")
    unpack(tmp_path / "packed", tmp_path / "back")
    before, after = on_disk(folder), on_disk(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name].view(torch.uint8), value.view(torch.uint8)) for name, value in before.items())
    assert load(folder, dtype=torch.bfloat16) is not None


def without(end: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.endswith(end)}


def changed(end: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {
        name: change(tensor).contiguous() if name.endswith(end) else tensor for name, tensor in tensors.items()
    }


BAD: dict[str, tuple[str, Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "no scales": (
        "fp8",
        without("scale_inv"),
        "14 of 14 float8 tensors have no scales, first '.*weight' of .*no '.*inv'",
    ),
    "a scale is missing": ("fp8", without("1.mlp.up_proj.weight_scale_inv"), "1 of 14 float8 .*layers.1.mlp.up_proj"),
    "rows are missing": (
        "fp8",
        changed("1.mlp.up_proj.weight_scale_inv", lambda scale: scale[1:]),
        r"up_proj.weight_scale_inv' is \(3, 2\), but '.*' of \(128, 64\) \(FP8, blocks of 32 x 32\) needs .* \(4, 2\)",
    ),
    "a scale of whole numbers": (
        "fp8",
        changed("1.mlp.up_proj.weight_scale_inv", lambda scale: scale.int()),
        "stored as I32, not as F32",
    ),
    "the values are missing": ("fp8", without("1.mlp.up_proj.weight"), "scales of float8 values, but .* is not there"),
    "the values are plain": (
        "fp8",
        changed("1.mlp.up_proj.weight", lambda weight: weight.bfloat16()),
        "scales of float8 values, but .*up_proj.weight' is stored as BF16",
    ),
    "a zero point": (
        "fp8",
        lambda tensors: tensors | {"model.layers.1.mlp.up_proj.weight_zero_point": torch.ones(1)},
        "asymmetrically",
    ),
    "no exponents": ("mxfp4", without("1.mlp.experts.down_proj_scales"), r"\(4, 64, 4, 16\) has no scales"),
    "no bytes": ("mxfp4", without("1.mlp.experts.down_proj_blocks"), "has no '.*down_proj_blocks'"),
    "plain as well": (
        "mxfp4",
        lambda tensors: tensors | {"model.layers.1.mlp.experts.down_proj": torch.ones(1)},
        "down_proj' is stored twice",
    ),
    "exponents of another shape": (
        "mxfp4",
        changed("1.mlp.experts.down_proj_scales", lambda scales: scales[:, 1:]),
        r"is \(4, 63, 4\), but '.*' is \(4, 64, 4, 16\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_values_and_scales_that_disagree_are_refused_with_the_numbers(name: str, tmp_path: Path) -> None:
    kind, edit, says = BAD[name]
    folder = save_mxfp4(tmp_path / "model") if kind == "mxfp4" else save_fp8("qwen3", tmp_path / "model")
    rewrite(folder, edit)
    tokens = token_file(tmp_path / "tokens.safetensors")
    with pytest.raises(InputError, match=says) as caught:
        prune(job(folder, tmp_path / "out", tokens))
    assert "original" in caught.value.hint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "tokens.safetensors"]


def test_float8_without_a_word_in_the_config_is_refused(tmp_path: Path) -> None:
    folder = save_fp8("qwen3", tmp_path / "model")
    edit_config(folder, quantization_config=None)
    with pytest.raises(InputError, match=r"stored as F8_E4M3, but .* must be floating-point"):
        prune(job(folder, tmp_path / "out", token_file(tmp_path / "tokens.safetensors")))


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    folder = save_fp8("qwen3", tmp_path / "model")
    rewrite(folder, changed("1.mlp.up_proj.weight_scale_inv", lambda scale: 1e6 * scale))
    with pytest.raises(
        InputError, match=r"1.mlp.up_proj.weight' reach [\d,]+, the largest float16 is 65,504"
    ) as caught:
        prune(job(folder, tmp_path / "out", token_file(tmp_path / "tokens.safetensors"), dtype="float16"))
    assert "bfloat16" in caught.value.hint


INTEGER = compressed("channel", type="int")
REFUSED: dict[str, tuple[Any, str]] = {
    "GPTQ": ({"quant_method": "gptq", "bits": 4}, "gptq"),
    "AWQ": ({"quant_method": "awq", "bits": 4}, "awq"),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
    "packed with zero points": (
        {**compressed("channel", type="int", symmetric=False), "format": "pack-quantized"},
        "pack-quantized of another kind",
    ),
    "packed in groups of what": (
        {**compressed("group", type="int", num_bits=4, group_size=[64]), "format": "pack-quantized"},
        "pack-quantized of another kind",
    ),
    "packed in two bits": (
        {**compressed("channel", type="int", num_bits=2), "format": "pack-quantized"},
        "pack-quantized of another kind",
    ),
    "int8": ({**INTEGER, "format": "int-quantized"}, "compressed-tensors, int-quantized"),
    "naive int8": ({**INTEGER, "format": "naive-quantized"}, "compressed-tensors, int8 weights"),
    "zero points": (compressed("channel", symmetric=False), "asymmetric float8"),
    "sparse": ({**compressed("channel"), "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
    "two formats": (
        {**compressed("channel"), "config_groups": {"a": {"format": "nvfp4-pack-quantized", "weights": {}}}},
        "nvfp4-pack-quantized",
    ),
    "unknown strategy": (compressed("token"), "strategy token"),
    "nothing said": ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "no scheme of weights"),
    "no method": ({"load_in_8bit": True}, "quantization_config"),
    "a number": ({"quant_method": 3}, "3"),
    "a text": ("int4", "quantization_config"),
}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_had_back_is_refused_with_where_the_original_is(
    name: str, inside: bool, tiny: Path, tmp_path: Path
) -> None:
    settings, says = REFUSED[name]
    config = settings_of(tiny)
    key = {"quantization_config": settings}
    (tmp_path / "config.json").write_text(json.dumps(config | ({"text_config": key} if inside else key)))
    with pytest.raises(InputError, match=rf"already quantised \(.*{says}.*\)") as caught:
        opened(tmp_path)
    assert "original model, which its card names as base_model" in caught.value.hint


@pytest.mark.parametrize("size", [[0, 128], [128], "128", [128, True], 128, [1.5, 2]])
def test_a_block_size_that_is_none_is_refused(size: Any, tiny: Path, tmp_path: Path) -> None:
    settings = {"quant_method": "fp8", "weight_block_size": size}
    (tmp_path / "config.json").write_text(json.dumps(settings_of(tiny) | {"quantization_config": settings}))
    with pytest.raises(InputError, match="weight_block_size is"):
        opened(tmp_path)
