"""Folders with weights on a grid are packed to the codes that were kept, and come back byte for byte."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from helpers import edit_tensor, job, on_disk, random_tokens, rewrite, save_tiny, token_file, with_entry
from quantised import save_fp4_experts
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmprune import InputError, PruneError, PruneReport, load, pack, prune, unpack
from llmprune.export.verify import verify_folder
from llmprune.model.compressed_tensors import unpack as codes_of
from llmprune.model.compressed_tensors import written_bytes
from llmprune.pruning.grid import parse_grid

GRIDS = ["int4:g32", "int4:channel", "int8", "fp8"]
UP = "model.layers.0.mlp.up_proj.weight"
PACKED = "model.packed.safetensors"


def quantized(folder: Path, grid: str, sparsity: str = "2:4", shard: str = "5GB", dtype: str = "float32") -> Path:
    """A tiny model with zeros and few bits."""
    model = save_tiny("llama", folder / "dense", hidden_size=64, intermediate_size=96, vocab_size=96)
    calib = token_file(folder / "tokens.safetensors")
    options = {"method": "magnitude", "quantize": grid, "max_shard_size": shard, "dtype": dtype}
    prune(job(model, folder / "pruned", calib, sparsity, **options))
    return folder / "pruned"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2:4 in int4."""
    return quantized(tmp_path_factory.mktemp("plain"), "int4:g32")


def files(folder: Path) -> dict[str, str]:
    """Relative name -> sha256 of all files."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


@pytest.mark.parametrize("shard", ["5GB", "30kB"])
@pytest.mark.parametrize("grid", GRIDS)
def test_a_folder_comes_back_byte_for_byte_and_is_as_small_as_its_bits_say(
    grid: str, shard: str, tmp_path: Path
) -> None:
    folder = quantized(tmp_path, grid, shard=shard)
    assert (len(list(folder.glob("*.safetensors"))) > 2) == (shard == "30kB")
    report = pack(folder)
    layers = PruneReport.read(folder).layers
    assert (report.packed, report.plainly) == (len(layers), {})
    form = parse_grid(grid)
    shapes: list[tuple[int, int]] = [(layer.shape[0], layer.shape[1]) for layer in layers]
    before = sum(written_bytes(shape, form) for shape in shapes)
    # Of every four codes two, and two positions of two bits.
    saved = sum(rows * width * form.bits // 8 - rows * width // 2 * (form.bits + 2) // 8 for rows, width in shapes)
    assert report.layer_bytes == [before, before - saved]
    weights = sum(rows * width for rows, width in shapes)
    assert report.weights == weights
    assert f", {8 * (before - saved) / weights:.2f} bits a weight" in report.text()
    packed = Path(report.out)
    tensors, stored = (sum(tensor.nbytes for tensor in on_disk(one).values()) for one in (folder, packed))
    assert report.total_bytes == [tensors, stored]
    assert tensors - stored == saved
    unpack(packed, tmp_path / "again")
    assert files(tmp_path / "again") == files(folder)
    assert verify_folder(tmp_path / "again").violations == 0


@pytest.mark.parametrize(("grid", "sparsity"), [("int4:g32", "3:4"), ("int4:channel", "4:8"), ("int8:g32", "1:4")])
def test_other_patterns_come_back_as_well(grid: str, sparsity: str, tmp_path: Path) -> None:
    folder = quantized(tmp_path, grid, sparsity, dtype="bfloat16")
    report = pack(folder)
    assert (report.packed, report.plainly) == (14, {})
    unpack(Path(report.out), tmp_path / "again")
    assert files(tmp_path / "again") == files(folder)


def test_scales_may_lie_in_another_file_than_their_codes(plain: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "spread"))
    rewrite(folder, lambda tensors: tensors, shards=3)
    whole = pack(plain, tmp_path / "whole")
    report = pack(folder)
    assert (report.layer_bytes, report.total_bytes) == (whole.layer_bytes, whole.total_bytes)
    unpack(Path(report.out), tmp_path / "again")
    assert files(tmp_path / "again") == files(folder)


def test_a_folder_that_was_quantised_after_pruning_is_packed(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "dense", hidden_size=64, intermediate_size=96, vocab_size=96)
    calib = token_file(tmp_path / "tokens.safetensors")
    prune(job(model, tmp_path / "pruned", calib, "2:4", method="magnitude"))
    prune(job(tmp_path / "pruned", tmp_path / "bits", calib, "none", quantize="int8"))
    report = pack(tmp_path / "bits")
    assert (report.packed, report.pattern) == (14, "2:4")
    unpack(Path(report.out), tmp_path / "again")
    assert files(tmp_path / "again") == files(tmp_path / "bits")


@pytest.mark.parametrize("grid", ["int4:g32", "int8", "fp8"])
def test_a_packed_model_computes_what_the_plain_one_does(grid: str, tmp_path: Path) -> None:
    folder = quantized(tmp_path, grid)
    packed = load(Path(pack(folder).out))
    stock = AutoModelForCausalLM.from_pretrained(folder)
    ids = random_tokens(2, 12)
    with torch.no_grad():
        assert torch.equal(packed(ids).logits, stock(ids).logits)


def test_the_files_explain_themselves(plain: Path, tmp_path: Path) -> None:
    packed = Path(pack(plain, tmp_path / "packed").out)
    with safe_open(packed / PACKED, framework="pt") as file:
        metadata = file.metadata()
        values, scales = file.get_tensor(f"{UP}_packed.values"), file.get_tensor(f"{UP}_scale")
    assert metadata["version"] == "2"
    assert set(json.loads(metadata["packed"]).values()) == {"int4"}
    codes = codes_of(on_disk(plain)[f"{UP}_packed"], 4)
    assert (values.shape, values.dtype) == ((96, 16), torch.uint8)
    kept = torch.stack((values & 15, values >> 4), dim=-1).flatten(1).int()
    kept = torch.where(kept > 7, kept - 16, kept)
    assert kept[kept != 0].tolist() == codes[codes != 0].tolist()
    assert torch.equal(scales, on_disk(plain)[f"{UP}_scale"])


def test_a_layer_whose_codes_break_the_pattern_is_stored_plainly_and_named(plain: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "broken"))
    edit_tensor(folder, f"{UP}_packed", lambda words: words.fill_(0x11111111))
    report = pack(folder)
    assert report.packed == 13
    assert report.plainly == {f"{UP}_packed": "its zeros do not fit 2:4"}
    unpack(Path(report.out), tmp_path / "again")
    assert files(tmp_path / "again") == files(folder)


def test_weights_of_two_values_a_byte_are_refused(tmp_path: Path) -> None:
    folder = save_fp4_experts(tmp_path / "model")
    with pytest.raises(InputError, match="two values of four bits a byte"):
        pack(folder, sparsity="2:4", only=("*experts*",))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_damage_is_found_and_leaves_nothing(plain: Path, tmp_path: Path) -> None:
    packed = Path(pack(plain, tmp_path / "packed").out)
    raw, chance = (packed / PACKED).read_bytes(), random.Random(0)
    damaged = [raw[:-1], raw + b"\0", b"", raw.replace(b'\\"int4\\"', b'\\"int8\\"'), raw.replace(b'"2"', b'"3"', 1)]
    damaged.append(with_entry(raw, f"{UP}_packed.values", "shape", [1, 96 * 16]))
    damaged.append(with_entry(raw, f"{UP}_packed.values", "dtype", "I8"))
    for _ in range(20):
        flipped = bytearray(raw)
        flipped[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
        damaged.append(bytes(flipped))
    for bad in damaged:
        assert bad != raw
        (packed / PACKED).write_bytes(bad)
        with pytest.raises(InputError):
            unpack(packed, tmp_path / "out")
        assert {path.name for path in tmp_path.iterdir()} == {"packed"}


def test_a_full_disk_leaves_nothing(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> Tensor:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llmprune.export.packed_forms.Codes.stored", full)
    with pytest.raises(PruneError, match="No space left"):
        pack(plain, tmp_path / "packed")
    assert not list(tmp_path.iterdir())
