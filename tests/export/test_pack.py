"""A packed folder is small, and everything the plain one was; what is damaged is refused."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import (
    job,
    on_disk,
    random_tokens,
    reload,
    rewrite,
    save_tiny,
    token_file,
    with_entry,
    with_header,
    without_header,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import llmprune
from llmprune import InputError, PruneError, PruneReport, load, pack, prune, unpack
from llmprune.cli.main import main
from llmprune.export.pack import PackReport, is_packed
from llmprune.export.packed import PackedFile
from llmprune.export.upload import check_folder
from llmprune.progress import Progress

PATTERNS = ["2:4", "1:4", "3:4", "4:8", "5:8"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PACKED = "model.packed.safetensors"


def pruned(folder: Path, family: str = "llama", sparsity: str = "2:4", shard: str = "5GB", **options: object) -> Path:
    """A pruned tiny model, in files of so many bytes."""
    model = save_tiny(family, folder / "dense", **options)  # type: ignore[arg-type]
    out = folder / "pruned"
    calib = token_file(folder / "tokens.safetensors")
    prune(job(model, out, calib, sparsity, method="magnitude", max_shard_size=shard))
    return out


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2:4 model in bfloat16, in shards."""
    return pruned(tmp_path_factory.mktemp("plain"), shard="100kB", dtype=torch.bfloat16)


@pytest.fixture
def single(plain: Path, tmp_path: Path) -> Path:
    """The same in a single file, packed."""
    folder = Path(shutil.copytree(plain, tmp_path / "single"))
    rewrite(folder, lambda tensors: tensors)
    pack(folder)
    return tmp_path / "single-packed"


def files(folder: Path) -> dict[str, str]:
    """Relative name -> sha256 of all files."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def weights_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("sparsity", PATTERNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_folder_comes_back_byte_for_byte(sparsity: str, dtype: torch.dtype, tmp_path: Path) -> None:
    plain = pruned(tmp_path, sparsity=sparsity, dtype=dtype)
    (plain / "more").mkdir()
    (plain / "more" / "notes.txt").write_text("mine")
    before = files(plain)
    report = pack(plain)
    assert Path(report.out) == tmp_path / "pruned-packed"
    assert not report.plainly
    assert report.packed == len(PruneReport.read(plain).layers)
    assert unpack(Path(report.out), tmp_path / "again") == tmp_path / "again"
    assert files(tmp_path / "again") == before == files(plain)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("sparsity", PATTERNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_are_those_of_the_formula(sparsity: str, dtype: torch.dtype, tmp_path: Path) -> None:
    plain = pruned(tmp_path, sparsity=sparsity, dtype=dtype)
    report = pack(plain)
    n, m = map(int, sparsity.split(":"))
    weights = sum(rows * width for rows, width in (layer.shape for layer in PruneReport.read(plain).layers))
    position = {2: 1, 4: 2, 8: 3}[m]
    before = weights * dtype.itemsize
    assert report.layer_bytes == [
        before,
        weights * (m - n) // m * dtype.itemsize + weights * (m - n) // m * position // 8,
    ]
    tensors = sum(tensor.nbytes for tensor in on_disk(plain).values())
    stored = sum(tensor.nbytes for tensor in on_disk(Path(report.out)).values())
    assert report.total_bytes == [tensors, stored]
    assert stored == tensors - report.layer_bytes[0] + report.layer_bytes[1]
    if (sparsity, dtype) == ("2:4", torch.bfloat16):
        assert report.layer_bytes[1] / report.layer_bytes[0] == 0.5625


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt", "mixtral", "gemma3_text"])
def test_a_packed_model_computes_what_the_plain_one_does(family: str, tmp_path: Path) -> None:
    plain = pruned(tmp_path, family, dtype=torch.bfloat16)
    packed = Path(pack(plain).out)
    model, other = load(packed), load(plain)
    assert type(model) is type(other)
    assert model.dtype == other.dtype == torch.bfloat16
    assert not model.training
    state = other.state_dict()
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.generation_config.to_dict() == other.generation_config.to_dict()
    assert load(packed, dtype=torch.float32).dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(model(random_tokens(1)).logits, other(random_tokens(1)).logits)


def test_a_base_model_without_the_prefix_is_loaded_too(tmp_path: Path) -> None:
    packed = Path(pack(pruned(tmp_path, "gpt2", base=True)).out)
    with torch.no_grad():
        assert torch.equal(load(packed)(random_tokens(1)).logits, reload(tmp_path / "pruned")(random_tokens(1)).logits)


def test_the_files_are_plain_safetensors_that_explain_themselves(single: Path, tmp_path: Path) -> None:
    with safe_open(single / PACKED, framework="pt") as file:
        metadata, names = file.metadata(), set(file.keys())
        values = file.get_tensor("model.layers.0.mlp.up_proj.weight.values")
        positions = file.get_tensor("model.layers.0.mlp.up_proj.weight.positions")
    weight = load_file(tmp_path / "single" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    rows, width = weight.shape
    assert (values.shape, values.dtype) == ((rows, width // 2), torch.bfloat16)
    assert (positions.shape, positions.dtype) == ((rows, width // 8), torch.uint8)
    assert values.count_nonzero() == weight.count_nonzero()
    assert metadata["format"] == "llmprune-packed"
    assert metadata["pattern"] == "2:4"
    assert set(json.loads(metadata["packed"]).values()) == {"out,in"}
    assert metadata["sha256"] == files(tmp_path / "single")["model.safetensors"]
    assert "model.layers.0.mlp.up_proj.weight" not in names
    assert "model.layers.0.input_layernorm.weight" in names


def test_what_was_carried_along_is_as_it_was(plain: Path, tmp_path: Path) -> None:
    pack(plain, tmp_path / "packed")
    others = {name: value for name, value in files(plain).items() if not name.endswith(".safetensors")}
    assert {"config.json", "prune_report.json", "README.md", "model.safetensors.index.json"} <= others.keys()
    assert others.items() <= files(tmp_path / "packed").items()


def test_kept_zeros_of_either_sign_survive(plain: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "zeros"))

    def edit(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        weight = tensors["model.layers.0.mlp.up_proj.weight"]
        kept = weight.nonzero()
        weight[tuple(kept[0])] = 0.0
        weight[tuple(kept[1])] = -0.0
        return tensors

    rewrite(folder, edit)
    report = pack(folder)
    assert not report.plainly
    unpack(Path(report.out), tmp_path / "again")
    assert files(tmp_path / "again") == files(folder)


def test_a_layer_that_breaks_the_pattern_is_stored_plainly_and_named(plain: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "broken"))

    def edit(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors["model.layers.0.mlp.up_proj.weight"][0, :4] = 1.0
        pruned = tensors["model.layers.1.mlp.up_proj.weight"]
        pruned[tuple((pruned == 0).nonzero()[0])] = -0.0
        tensors["model.layers.1.mlp.gate_proj.weight.values"] = torch.ones(1)
        return tensors

    rewrite(folder, edit)
    report = pack(folder)
    assert report.plainly.keys() == {
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.1.mlp.gate_proj.weight",
    }
    assert "do not fit 2:4" in report.plainly["model.layers.0.mlp.up_proj.weight"]
    assert all(f"stored plainly: {name}" in report.text() for name in report.plainly)
    unpack(Path(report.out), tmp_path / "again")
    assert files(tmp_path / "again") == files(folder)


def test_a_folder_without_a_report_is_packed_by_a_named_pattern(plain: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "bare"))
    (folder / "prune_report.json").unlink()
    with pytest.raises(InputError, match="no report"):
        pack(folder)
    assert pack(folder, sparsity="2:4", only=("*.mlp.*",)).packed == 6
    with pytest.raises(InputError, match="50% cannot be packed"):
        pack(folder, tmp_path / "other", sparsity="50%")
    assert not (tmp_path / "other").exists()


def test_what_links_lead_to_is_not_unpacked(single: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(single, tmp_path / "copy"))
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "key.txt").write_text("SECRET=1")
    (folder / "key.txt").symlink_to(tmp_path / "secrets" / "key.txt")
    (folder / "secrets").symlink_to(tmp_path / "secrets")
    (folder / "inside.json").symlink_to("config.json")
    os.mkfifo(folder / "pipe")
    (folder / "deep").mkdir()
    (folder / "deep" / "notes.txt").write_text("mine")
    told: list[str] = []
    progress = Progress()
    progress.warn = told.append  # type: ignore[method-assign]
    unpack(folder, tmp_path / "out", progress=progress)
    assert not {"key.txt", "secrets", "inside.json", "pipe"} & set(os.listdir(tmp_path / "out"))
    assert (tmp_path / "out" / "deep" / "notes.txt").read_text() == "mine"
    assert told == [
        f"left out: {name} is a link or no regular file" for name in ("inside.json", "key.txt", "pipe", "secrets")
    ]


@pytest.mark.parametrize("name", ["weights.bin", "notes.txt"])
def test_what_links_lead_to_is_not_packed(plain: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "copy"))
    (folder / "inside.json").symlink_to("config.json")
    assert not Path(pack(folder, tmp_path / "out").out, "inside.json").exists()
    (folder / name).symlink_to(tmp_path / "key.txt")
    (tmp_path / "key.txt").write_text("SECRET=1")
    assert not Path(pack(folder, tmp_path / "other").out, name).exists()


@pytest.mark.parametrize("action", [pack, unpack])
def test_weights_behind_a_link_are_refused(
    action: Callable[[Path, Path], object], plain: Path, single: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(plain if action is pack else single, tmp_path / "copy"))
    weights = next(folder.glob("*.safetensors"))
    weights.rename(folder / "weights")
    weights.symlink_to("weights")
    with pytest.raises(InputError, match=f"{weights.name} is a link"):
        action(folder, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("action", [pack, unpack])
def test_an_output_that_exists_is_left_alone(
    action: Callable[[Path, Path], object], plain: Path, single: Path, tmp_path: Path
) -> None:
    source = plain if action is pack else single
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = files(source)
    for out in (tmp_path / "mine", tmp_path / "file", source, source / "inside"):
        with pytest.raises(InputError):
            action(source, out)
    assert (tmp_path / "mine" / "file").read_text() == (tmp_path / "file").read_text() == "mine"
    assert files(source) == before


def test_what_is_not_packed_is_said(plain: Path, single: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no packed model"):
        unpack(plain)
    with pytest.raises(InputError, match="is packed") as caught:
        pack(single)
    assert "llmprune unpack" in caught.value.hint
    assert not is_packed(plain)
    assert check_folder(plain)
    with pytest.raises(InputError, match="is packed"):
        check_folder(single)
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(single)


def edited_metadata(raw: bytes, key: str, value: str) -> bytes:
    """A packed file whose metadata says something else."""
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    header["__metadata__"][key] = value
    return with_header(header, raw[end:])


HUGE = json.dumps({"w": {"dtype": "F32", "shape": [2**40, 2**21], "data_offsets": [0, 2**63 - 1]}})
UP = "model.layers.0.mlp.up_proj.weight"
DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda raw: b"",
    "truncated": lambda raw: raw[:-1],
    "half": lambda raw: raw[: len(raw) // 2],
    "one byte more": lambda raw: raw + b"\0",
    "no metadata": lambda raw: edited_metadata(raw, "format", "pt"),
    "a later version": lambda raw: edited_metadata(raw, "version", "3"),
    "no pattern": lambda raw: edited_metadata(raw, "pattern", "x"),
    "another pattern": lambda raw: edited_metadata(raw, "pattern", "1:4"),
    "a share": lambda raw: edited_metadata(raw, "pattern", "50%"),
    "no header": lambda raw: edited_metadata(raw, "header", "{"),
    "an empty header": lambda raw: edited_metadata(raw, "header", "{}"),
    "packed is no JSON": lambda raw: edited_metadata(raw, "packed", "x"),
    "packed is a list": lambda raw: edited_metadata(raw, "packed", "[]"),
    "nothing is packed": lambda raw: edited_metadata(raw, "packed", "{}"),
    "unknown tensor packed": lambda raw: edited_metadata(raw, "packed", '{"x": "out,in"}'),
    "unknown order": lambda raw: edited_metadata(raw, "packed", json.dumps({UP: "in"})),
    "values of another shape": lambda raw: with_entry(raw, UP + ".values", "shape", [1, 2]),
    "values of another dtype": lambda raw: with_entry(raw, UP + ".values", "dtype", "F16"),
    "positions elsewhere": lambda raw: with_entry(raw, UP + ".positions", "data_offsets", [0, 10**9]),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_refused_before_anything_is_written(name: str, single: Path, tmp_path: Path) -> None:
    (single / PACKED).write_bytes(DAMAGE[name]((single / PACKED).read_bytes()))
    for action in (lambda: unpack(single, tmp_path / "out"), lambda: load(single)):
        with pytest.raises(InputError) as caught:
            action()
        assert PACKED in caught.value.message
        assert caught.value.hint
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_flipped_bit_never_gets_through(single: Path, tmp_path: Path) -> None:
    raw, chance = (single / PACKED).read_bytes(), random.Random(0)
    for _ in range(40):
        bad = bytearray(raw)
        bad[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
        (single / PACKED).write_bytes(bytes(bad))
        with pytest.raises(InputError):
            unpack(single, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".*"))


def test_an_index_that_was_left_beside_a_whole_file_is_not_looked_at(plain: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "whole"))
    index = next(folder.glob("*.index.json")).read_bytes()
    rewrite(folder, lambda tensors: tensors)
    (folder / "model.safetensors.index.json").write_bytes(index)
    packed = Path(pack(folder).out)
    assert [path.name for path in packed.glob("*.safetensors")] == [PACKED]
    assert files(unpack(packed, tmp_path / "again")) == files(folder)
    assert load(packed).state_dict().keys() == load(folder).state_dict().keys()


def claim(folder: Path, rows: int, m: int) -> int:
    """Write a consistent packed file of one value for every `m` weights; the bytes that it claims to hold."""
    size = 4 * rows * m
    plain = {"w": {"dtype": "F32", "shape": [rows, m], "data_offsets": [0, size]}}
    ends = 4 * rows, 4 * rows + rows * -(-(m - 1).bit_length() // 8)
    metadata = {"format": "llmprune-packed", "version": "1", "pattern": f"{m - 1}:{m}", "sha256": "0" * 64}
    metadata |= {"packed": json.dumps({"w": "out,in"}), "header": json.dumps(plain)}
    parts = {
        "w.values": {"dtype": "F32", "shape": [rows, 1], "data_offsets": [0, ends[0]]},
        "w.positions": {"dtype": "U8", "shape": [rows, (ends[1] - ends[0]) // rows], "data_offsets": list(ends)},
    }
    (folder / PACKED).write_bytes(with_header({"__metadata__": metadata, **parts}, bytes(ends[1])))
    return size


def test_a_small_file_that_claims_to_hold_much_is_refused_unread(single: Path, tmp_path: Path) -> None:
    assert claim(single, 16_000, 999_999) > 60 * 10**9
    for action in (lambda: unpack(single, tmp_path / "out"), lambda: load(single)):
        with pytest.raises(InputError, match=r"'w': 999998:999999 would unpack to more than 64 times the values"):
            action()
    assert claim(single, 4, 64) == 1024
    PackedFile(single / PACKED)
    claim(single, 4, 65)
    with pytest.raises(InputError, match="64:65 would unpack"):
        PackedFile(single / PACKED)
    (single / PACKED).write_bytes(edited_metadata((single / PACKED).read_bytes(), "header", HUGE))
    with pytest.raises(InputError, match="not a whole packed file"):
        PackedFile(single / PACKED)


def test_a_missing_shard_is_named(plain: Path, tmp_path: Path) -> None:
    packed = Path(pack(plain, tmp_path / "packed").out)
    lost = sorted(packed.glob("*.safetensors"))[1]
    lost.unlink()
    for action in (unpack, load):
        with pytest.raises(InputError, match=lost.name):
            action(packed)


def test_a_full_disk_leaves_nothing(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llmprune.export.packed.write_file", full)
    with pytest.raises(PruneError, match="No space left"):
        pack(plain, tmp_path / "packed")
    assert not list(tmp_path.iterdir())


def test_a_header_with_holes_is_refused(plain: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "holes"))
    rewrite(folder, lambda tensors: tensors)
    file = folder / "model.safetensors"
    header, data = without_header(file.read_bytes())
    entry = next(value for value in header.values() if value.get("data_offsets", [1])[0] == 0)
    entry["data_offsets"][1] -= 2
    file.write_bytes(with_header(header, data))
    with pytest.raises(InputError, match=r"begins at byte|shape|size"):
        pack(folder)


@pytest.mark.parametrize("number", range(3))
def test_any_layout_of_the_header_comes_back(number: int, plain: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "laid-out"))
    rewrite(folder, lambda tensors: tensors)
    file = folder / "model.safetensors"
    header, data = without_header(file.read_bytes())
    texts = [json.dumps(header, indent=1), json.dumps(dict(reversed(header.items()))) + " " * 77, json.dumps(header)]
    text = (texts[number].replace("mlp", "\\u006dlp") if number == 2 else texts[number]).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    unpack(Path(pack(folder).out), tmp_path / "again")
    assert files(tmp_path / "again") == files(folder)


def test_the_command_line_packs_and_unpacks(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed, again = tmp_path / "p", tmp_path / "a"
    assert main(["pack", str(plain), "--out", str(packed), "--json"]) == 0
    report = PackReport(**json.loads(capsys.readouterr().out))
    assert report.packed == 14
    assert main(["unpack", str(packed), "--out", str(again)]) == 0
    assert capsys.readouterr().out == f"saved to {again}\n"
    assert files(again) == files(plain)
    assert main(["pack", str(plain), "--out", str(packed)]) == 2
    assert "error: " in capsys.readouterr().err
    assert main(["pack", str(plain), "--out", str(tmp_path / "q")]) == 0
    assert "14 layers of 2:4 packed" in capsys.readouterr().out
    assert main(["verify", str(packed)]) == 2


def test_the_public_names_are_there() -> None:
    assert all(callable(getattr(llmprune, name)) for name in ("pack", "unpack", "load", "accelerate"))


SCRIPT = """
import resource, sys
from pathlib import Path
from llmprune.export.packed import PackedFile, pack_file
from llmprune.export.packed_forms import Elements
from llmprune.model.tensor_file import TensorFile
from llmprune.pruning.pattern import NM

source, folder = Path(sys.argv[1]), Path(sys.argv[2])
names = dict.fromkeys(TensorFile(source).fields, Elements())
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
pack_file(source, folder / "packed", NM(2, 4), names)
PackedFile(folder / "packed").unpack(folder / "plain")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)
"""


def test_one_tensor_at_a_time_is_in_memory(tmp_path: Path) -> None:
    weight = torch.randn(1024, 4096).bfloat16()
    weight.masked_fill_(~llmprune.pruning.pattern.NM(2, 4).project(weight.float().abs()), 0)
    peaks = []
    for count in (2, 24):
        source = tmp_path / f"{count}.safetensors"
        save_file({f"w{number}": weight.clone() for number in range(count)}, source)
        (tmp_path / str(count)).mkdir()
        command = [sys.executable, "-c", SCRIPT, str(source), str(tmp_path / str(count))]
        peaks.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        assert (tmp_path / str(count) / "plain").read_bytes() == source.read_bytes()
    unit = 1 if sys.platform == "darwin" else 1024
    assert (peaks[1] - peaks[0]) * unit < 2 * weight.nbytes
