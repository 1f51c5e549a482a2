"""What is read is what transformers would load, or a clear refusal; what is written is whole or not there."""

from __future__ import annotations

import json
import math
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    Toy,
    ToyConfig,
    edit_tensor,
    job,
    on_disk,
    reload,
    rewrite,
    save_tiny,
    skeleton_of,
    tiny_config,
    tiny_model,
    token_file,
    toy_block,
    with_entry,
    with_header,
    without_header,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, Split, WeightConverter

from llmprune import prune
from llmprune.errors import InputError, PruneError
from llmprune.model.reader import INDEX, SINGLE, SafetensorsFolder, read_entries
from llmprune.model.skeleton import LARGEST, build_on_meta
from llmprune.model.tensor_file import join_files
from llmprune.model.writer import ShardWriter

FAMILIES = """
llama gpt2 gpt_neox bloom opt falcon phi3 cohere gemma3_text mamba jamba
mixtral qwen2_moe qwen3_moe olmoe gpt_oss deepseek_v3
"""


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """A folder with one small file."""
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.int64)}, tmp_path / SINGLE)
    return tmp_path


SHARD = "model-00001-of-00001.safetensors"


@pytest.fixture
def sharded(single: Path) -> Path:
    """The same file as a shard."""
    return (single / SINGLE).rename(single / SHARD).parent


def twice(raw: bytes) -> bytes:
    """A file whose header has the first tensor's entry twice."""
    header, data = without_header(raw)
    entry = json.dumps(header["a"])
    text = f'{{"a":{entry},"b":{json.dumps(header["b"])},"a":{entry}}}'.encode()
    return struct.pack("<Q", len(text)) + text + data


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "zero length": lambda raw: b"",
    "seven bytes": lambda raw: raw[:7],
    "length only": lambda raw: raw[:8],
    "truncated header": lambda raw: raw[:20],
    "truncated data": lambda raw: raw[:-1],
    "half": lambda raw: raw[: len(raw) // 2],
    "one byte more": lambda raw: raw + b"\0",
    "absurd header length": lambda raw: struct.pack("<Q", 2**63) + raw[8:],
    "all ones": lambda raw: b"\xff" * 8 + raw[8:],
    "header length zero": lambda raw: struct.pack("<Q", 0) + raw[8:],
    "a name twice": twice,
    "corrupt JSON": lambda raw: raw[:8] + b"}" + raw[9:],
    "no UTF-8": lambda raw: raw[:9] + b"\xff\xfe" + raw[11:],
    "deep JSON": lambda raw: struct.pack("<Q", 200_000) + b"[" * 200_000,
    "a list": lambda raw: with_header([1, 2], b""),
    "a number": lambda raw: with_header(3, b""),
    "entry is no object": lambda raw: with_header({"a": 1}, b""),
    "no offsets": lambda raw: with_header({"a": {"dtype": "F32", "shape": [1]}}, b"0000"),
    "three offsets": lambda raw: with_entry(raw, "a", "data_offsets", [0, 1, 2]),
    "text offsets": lambda raw: with_entry(raw, "a", "data_offsets", ["0", "24"]),
    "offsets beyond the file": lambda raw: with_entry(raw, "a", "data_offsets", [0, 10**9]),
    "shape is text": lambda raw: with_entry(raw, "a", "shape", "xy"),
    "shape is null": lambda raw: with_entry(raw, "a", "shape", None),
    "a web page": lambda raw: b"<!DOCTYPE html><html><body>404</body></html>",
    "an LFS pointer": lambda raw: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1234\n",
}
LYING: dict[str, Callable[[bytes], bytes]] = {
    "shape disagrees with the size": lambda raw: with_entry(raw, "a", "shape", [2, 4]),
    "negative shape": lambda raw: with_entry(raw, "a", "shape", [-2, -3]),
    "negative offsets": lambda raw: with_entry(raw, "a", "data_offsets", [-24, 0]),
    "offsets swapped": lambda raw: with_entry(raw, "a", "data_offsets", [24, 0]),
    "dtype is null": lambda raw: with_entry(raw, "a", "dtype", None),
    "unknown dtype": lambda raw: with_entry(raw, "a", "dtype", "F33"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_refused_when_it_is_opened(name: str, single: Path) -> None:
    file = single / SINGLE
    file.write_bytes(DAMAGE[name](file.read_bytes()))
    with pytest.raises(InputError, match="not a whole safetensors file") as caught:
        SafetensorsFolder(single)
    assert str(file) in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("name", LYING)
def test_a_header_that_lies_is_refused_at_the_latest_when_read(name: str, single: Path) -> None:
    file = single / SINGLE
    file.write_bytes(LYING[name](file.read_bytes()))
    with pytest.raises(InputError) as caught:
        SafetensorsFolder(single)["a"]
    assert str(file) in caught.value.message


def test_random_damage_never_escapes_as_another_error(single: Path) -> None:
    file = single / SINGLE
    raw, chance = file.read_bytes(), random.Random(0)
    for _ in range(300):
        bad = bytearray(raw)
        for _ in range(chance.randrange(1, 4)):
            bad[chance.randrange(len(raw) - 56)] = chance.randrange(256)
        file.write_bytes(bytes(bad))
        try:
            folder = SafetensorsFolder(single)
            for name in folder:
                folder[name]
        except InputError:
            pass


def test_a_header_tells_dtype_shape_and_size(single: Path) -> None:
    entries = read_entries(single / SINGLE)
    assert {name: (e.dtype, e.shape, e.nbytes) for name, e in entries.items()} == {
        "a": (torch.float32, (2, 3), 24),
        "b": (torch.int64, (4,), 32),
    }
    folder = SafetensorsFolder(single)
    assert folder.nbytes == 56
    assert torch.equal(folder["a"], torch.arange(6.0).view(2, 3))
    assert folder.meta("a").device.type == "meta"


@pytest.mark.parametrize("escape", ["../secret.safetensors", "/etc/passwd", "a/../../b", "..", ".", "", "x\\y"])
def test_an_index_that_points_outside_its_folder_is_refused(escape: str, sharded: Path) -> None:
    (sharded / INDEX).write_text(json.dumps({"weight_map": {"a": SHARD, "b": escape}}))
    with pytest.raises(InputError, match="outside its folder"):
        SafetensorsFolder(sharded)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": ["a"]}', "\xff"])
def test_an_index_that_is_none_is_refused(text: str, sharded: Path) -> None:
    (sharded / INDEX).write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match="not a safetensors index"):
        SafetensorsFolder(sharded)


def test_an_index_that_points_nowhere_is_refused(sharded: Path) -> None:
    (sharded / INDEX).write_text(json.dumps({"weight_map": {"a": SHARD, "b": "model-2.safetensors"}}))
    with pytest.raises(InputError, match=r"model-2\.safetensors"):
        SafetensorsFolder(sharded)
    (sharded / INDEX).write_text(json.dumps({"weight_map": {"a": SHARD, "ghost": SHARD}}))
    with pytest.raises(InputError, match="ghost"):
        SafetensorsFolder(sharded)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_a_folder_of_pickles_is_refused_unread(file: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(b"\x80\x04.")
    with pytest.raises(InputError, match="pickled") as caught:
        SafetensorsFolder(tmp_path)
    assert "save_pretrained" in caught.value.hint


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no model\.safetensors"):
        SafetensorsFolder(tmp_path)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("llama"), tokenizer=False)


def copy_of(source: Path, target: Path, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    rewrite(target, edit)
    return target


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_a_missing_tensor_is_named(name: str, llama: Path, tmp_path: Path) -> None:
    folder = copy_of(llama, tmp_path / "m", lambda ts: {k: t for k, t in ts.items() if k != name})
    with pytest.raises(InputError, match="lacks 1 of") as caught:
        skeleton_of(folder)
    assert repr(name) in caught.value.message


def test_a_shape_that_differs_from_the_config_is_named_with_both(llama: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    folder = copy_of(llama, tmp_path / "m", lambda ts: {**ts, name: ts[name][:64].clone()})
    with pytest.raises(InputError, match=r"\(64, 64\) on disk but \(128, 64\)") as caught:
        skeleton_of(folder)
    assert name in caught.value.message


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_weight_that_is_not_finite_is_named(value: float, llama: Path, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"

    def poison(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors[name][3, 5] = value
        return tensors

    checkpoint = skeleton_of(copy_of(llama, tmp_path / "m", poison)).checkpoint
    with pytest.raises(InputError, match="NaN or Inf") as caught:
        checkpoint.check_finite()
    assert name in caught.value.message


@pytest.mark.parametrize("model_type", FAMILIES.split())
@pytest.mark.parametrize("base", [False, True], ids=["full", "base"])
def test_every_parameter_is_what_transformers_loads(model_type: str, base: bool, tmp_path: Path) -> None:
    """Fused experts, legacy names and prefixes included."""
    options = {"tie_word_embeddings": True} if base else {}
    save_tiny(model_type, tmp_path, base=base, tokenizer=False, **options)
    checkpoint = skeleton_of(tmp_path).checkpoint
    loaded = reload(tmp_path).state_dict()
    assert checkpoint.keys() == loaded.keys()
    assert all(torch.equal(checkpoint[name], tensor) for name, tensor in loaded.items())


@toy_block
class Halves(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.gate = (nn.Linear(width, width, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(x) * self.gate(x)


@pytest.fixture
def halves(tmp_path: Path) -> Iterator[Path]:
    """A checkpoint that stores `up` and `gate` as one matrix, which is split on load."""
    model = Toy(ToyConfig("Halves", 16))
    folder = tmp_path / "halves"
    model.save_pretrained(folder)

    def fuse(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for i in range(2):
            parts = [tensors.pop(f"layers.{i}.{name}.weight") for name in ("up", "gate")]
            tensors[f"layers.{i}.both.weight"] = torch.cat(parts)
        return tensors

    rewrite(folder, fuse)
    rule = WeightConverter("both.weight", ["up.weight", "gate.weight"], operations=[Chunk(dim=0)])
    register_checkpoint_conversion_mapping("toy", [rule], overwrite=True)
    yield folder
    register_checkpoint_conversion_mapping("toy", [], overwrite=True)


def test_one_matrix_on_disk_may_be_several_parameters(halves: Path) -> None:
    model, skeleton = reload(halves), skeleton_of(halves)
    assert all(torch.equal(skeleton.checkpoint[name], t) for name, t in model.state_dict().items())
    with skeleton.loaded(skeleton.block_parameters(1)):
        for name in skeleton.block_parameters(1):
            assert torch.equal(skeleton.model.get_parameter(name), model.get_parameter(name))


def test_a_matrix_is_split_at_the_sizes_of_its_parameters_whichever_is_asked_for(tmp_path: Path) -> None:
    folder = save_tiny("toy", tmp_path, kind="Uneven", tokenizer=False)

    def fuse(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for at in range(2):
            parts = [tensors.pop(f"layers.{at}.{name}.weight") for name in ("up", "gate")]
            tensors[f"layers.{at}.both.weight"] = torch.cat(parts)
        return tensors

    expected = {name: tensor.clone() for name, tensor in reload(folder).state_dict().items()}
    rewrite(folder, fuse)
    rule = WeightConverter("both.weight", ["up.weight", "gate.weight"], operations=[Split(dim=0)])
    register_checkpoint_conversion_mapping("toy", [rule], overwrite=True)
    try:
        skeleton = skeleton_of(folder)
        assert all(torch.equal(skeleton.checkpoint[name], tensor) for name, tensor in expected.items())
    finally:
        register_checkpoint_conversion_mapping("toy", [], overwrite=True)


@toy_block
class Uneven(nn.Module):
    """Two layers of different sizes that may be one matrix on disk."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.gate = nn.Linear(width, 2 * width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate(x) * self.up(x).chunk(2, -1)[0]


def test_a_model_is_built_without_allocating_its_weights() -> None:
    """Fused experts of 3.5 GiB in float32; rotary tables are real, and the same as elsewhere."""
    config = tiny_config("mixtral", num_local_experts=8, hidden_size=4096, intermediate_size=14336)
    allocated: list[int] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            if isinstance(made, Tensor) and not made.is_meta:
                allocated.append(made.numel())
            return made

    with Watch():
        model = build_on_meta(config, torch.float32)
    assert max(allocated) <= LARGEST
    assert sum(p.numel() for p in model.parameters()) > 2 * LARGEST
    assert all(p.is_meta for p in model.parameters())
    small = tiny_model("mixtral", hidden_size=256, num_attention_heads=16)
    tables = {name: buffer for name, buffer in small.named_buffers() if "inv_freq" in name}
    assert tables
    assert all(torch.equal(dict(model.named_buffers())[name], buffer) for name, buffer in tables.items())


def test_large_buffers_that_no_file_holds_are_real(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmprune.model.skeleton.LARGEST", 4)
    model = build_on_meta(tiny_config("gpt_neo"), torch.float32)
    wanted = dict(tiny_model("gpt_neo").named_buffers())
    assert wanted
    assert all(torch.equal(buffer, wanted[name]) for name, buffer in model.named_buffers() if not buffer.is_meta)
    lost = {name for name, buffer in model.named_buffers() if buffer.is_meta}
    assert not lost - set(model.state_dict())


@pytest.mark.parametrize("effort", ["fast", "balanced"])
def test_weights_whose_squares_leave_the_range_are_refused_by_name(effort: str, tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    shutil.copytree(tiny, folder)
    edit_tensor(folder, "model.layers.1.mlp.up_proj.weight", lambda t: t.fill_(1e-20))
    with pytest.raises(InputError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' are 1\.0e-20 at most"):
        prune(job(folder, tmp_path / "out", token_file(tmp_path / "tokens.safetensors"), effort=effort))


@pytest.mark.parametrize("effort", ["fast", "balanced"])
@pytest.mark.parametrize("factor", [2.0**-40, 2.0**40])
def test_the_unit_of_a_layers_inputs_changes_nothing(effort: str, factor: float, tiny: Path, tmp_path: Path) -> None:
    """A norm so much smaller, and the layers behind it so much larger: the same function, and the same masks."""
    scaled, tokens = tmp_path / "scaled", token_file(tmp_path / "tokens.safetensors")
    shutil.copytree(tiny, scaled)

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for name, tensor in tensors.items():
            if "post_attention_layernorm" in name:
                tensor.mul_(factor)
            if "gate_proj" in name or "up_proj" in name:
                tensor.div_(factor)
        return tensors

    rewrite(scaled, change)
    for name, source in (("a", tiny), ("b", scaled)):
        prune(job(source, tmp_path / name, tokens, effort=effort))
    a, b = on_disk(tmp_path / "a"), on_disk(tmp_path / "b")
    assert all(torch.equal(a[name] == 0, b[name] == 0) for name in a)
    assert all(torch.allclose(a[name], b[name], rtol=1e-3, atol=1e-5) for name in a if "down_proj" in name)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", ["llama", "mixtral", "gpt2"])
def test_an_export_without_changes_is_the_source(model_type: str, dtype: torch.dtype | None, tmp_path: Path) -> None:
    save_tiny(model_type, tmp_path, tokenizer=False)
    skeleton = skeleton_of(tmp_path, dtype=dtype)
    blocks = [skeleton.checkpoint.export(skeleton.block_parameters(i), {}) for i in range(len(skeleton.blocks))]
    written = [*skeleton.export_outside(), *(pair for block in blocks for pair in block)]
    source = on_disk(tmp_path)
    assert sorted(name for name, _ in written) == sorted(source)
    assert all(torch.equal(tensor, source[name].to(dtype or torch.float32)) for name, tensor in written)
    assert skeleton.checkpoint.out_bytes() == sum(tensor.nbytes for _, tensor in written)


def test_no_weight_of_a_skeleton_is_in_memory_but_its_own_tables_are(llama: Path) -> None:
    model = skeleton_of(llama).model
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    assert all(buffer.device.type == "cpu" for buffer in model.buffers())


def tensors_of(count: int, rows: int = 10) -> list[tuple[str, Tensor]]:
    return [(f"t{i}", torch.full((rows, 10), float(i))) for i in range(count)]


def test_one_shard_needs_no_index(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 10**9)
    writer.write(tensors_of(3))
    writer.seal()
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE]
    assert writer.nbytes == 3 * 400


@pytest.mark.parametrize("limit", [1, 400, 401, 1000, 1200, 2799, 2800, 10**6])
@pytest.mark.parametrize("join", [False, True])
def test_shards_keep_to_the_limit_and_the_index_is_right(limit: int, join: bool, tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, limit)
    wanted = tensors_of(7)
    for part in (wanted[:2], wanted[2:3], wanted[3:4], wanted[4:]):
        writer.write(part)
    for replaced in writer.join() if join else ():
        for file in replaced:
            (tmp_path / file).unlink()
    writer.seal()
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    found = SafetensorsFolder(tmp_path)
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted)
    assert writer.nbytes == 7 * 400
    for file in files:
        tensors = load_file(tmp_path / file)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= limit
    if join:
        # As few as neighbours allow.
        assert len(files) == math.ceil(7 / max(limit // 400, 1))
    if files == [SINGLE]:
        assert list(tmp_path.iterdir()) == [tmp_path / SINGLE]
        return
    index = json.loads((tmp_path / INDEX).read_text())
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*files, INDEX])
    assert index["metadata"]["total_size"] == 7 * 400
    assert set(index["weight_map"].values()) == set(files)
    assert all(index["weight_map"][name] == file for file in files for name in load_file(tmp_path / file))


def test_a_joined_file_is_what_safetensors_writes_at_once(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(2, 5), "a": torch.randn(7).half(), "c": torch.arange(3), "d": torch.empty(0, 4),
        "e": torch.tensor(2.5), "f": torch.tensor([True]), "g": torch.ones(3, dtype=torch.bool),
    }  # fmt: skip
    for name, tensor in tensors.items():
        save_file({name: tensor}, tmp_path / f"{name}.safetensors", metadata={"format": "pt"})
    join_files([tmp_path / f"{name}.safetensors" for name in tensors], tmp_path / "joined")
    save_file(tensors, tmp_path / "whole", metadata={"format": "pt"})
    assert (tmp_path / "joined").read_bytes() == (tmp_path / "whole").read_bytes()


def test_nothing_has_its_final_name_before_the_seal(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 400)
    writer.write(tensors_of(4))
    assert list(writer.join()) == []
    assert not list(tmp_path.glob("model*"))
    assert not list(tmp_path.glob("*.tmp"))
    with pytest.raises(InputError):
        SafetensorsFolder(tmp_path)


def test_a_write_that_fails_leaves_no_shard_under_its_name(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "gone", 400)
    with pytest.raises(PruneError, match="cannot write"):
        writer.write(tensors_of(1))
    assert not list(tmp_path.rglob("*.safetensors"))
