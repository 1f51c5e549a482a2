"""Whatever is in a file or a flag: it is understood, or refused in our words; nothing else happens.

`FUZZ=20000` tries so many inputs in place of 2,000.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from commands import REPORT
from gguf_files import write_gguf
from helpers import rewrite, save_tiny, text_file, token_file, with_header, word_tokenizer
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from mutations import (
    Mutator,
    damaged_bytes,
    damaged_config,
    damaged_gguf,
    damaged_json,
    damaged_safetensors,
)
from safetensors.torch import save

from llmprune import load
from llmprune.cli.main import main
from llmprune.errors import InputError
from llmprune.knobs import SIZE
from llmprune.model.dequantize import dequantized
from llmprune.model.header import ELEMENT_BITS
from llmprune.model.quantization import Quantization, quantization_of, without_quantization
from llmprune.model.reader import INDEX, SINGLE, SafetensorsFolder
from llmprune.pipeline.state import STATE, read_state
from llmprune.progress import Progress
from llmprune.pruning.sparsity import parse_sparsity
from llmprune.sources.texts import Reader
from llmprune.sources.tokens import calibration_tokens, load_tokens

FUZZ = int(os.environ.get("FUZZ", "2000"))
many = settings(
    deadline=None,
    max_examples=FUZZ // 20,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
numbers = st.integers(-(2**70), 2**70) | st.integers(0, 64)
dtypes = st.sampled_from(["F32", "F64", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "C64", ""]) | st.text(max_size=4)
entries = st.fixed_dictionaries(
    {"dtype": dtypes, "shape": st.lists(numbers, max_size=4), "data_offsets": st.lists(numbers, min_size=1, max_size=3)}
)


def explained(error: InputError) -> None:
    """A refusal says what to do."""
    assert error.hint


def read_all(folder: Path) -> None:
    """Open a folder, and read all that it says it holds."""
    try:
        found = SafetensorsFolder(folder)
        for name in found:
            assert isinstance(found[name], torch.Tensor)
    except InputError as error:
        explained(error)


@many
@given(raw=st.binary(max_size=200))
@example(raw=b"")
@example(raw=b"\xff" * 16)
@example(raw=with_header({}, b""))
def test_any_bytes_for_weights(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(raw)
    read_all(tmp_path)


@many
@given(
    header=json_values | st.dictionaries(st.text(max_size=6), entries | json_values, max_size=4),
    data=st.binary(max_size=64),
)
@example(header={"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, data=b"\0" * 16)
@example(header={"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}, data=b"\0" * 16)
@example(header={"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 16]}}, data=b"\0" * 16)
@example(header={"a": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}}, data=b"\0" * 16)
@example(header={"a": {"dtype": "F32", "shape": [4], "data_offsets": [0.0, 16.0]}}, data=b"\0" * 16)
@example(header={"a": {"dtype": [], "shape": [4], "data_offsets": [0, 16]}}, data=b"\0" * 16)
def test_any_header_of_weights(header: Any, data: bytes, tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(with_header(header, data))
    read_all(tmp_path)


SETTINGS = st.sampled_from(
    ["quant_method", "format", "config_groups", "weights", "weight_block_size", "strategy", "type", "num_bits", "a",
     "symmetric", "block_structure", "group_size", "sparsity_config", "quantization_config", "expert_dtype"]
)  # fmt: skip
WORDS = st.sampled_from(["fp8", "compressed-tensors", "mxfp4", "float-quantized", "float", "block", "group", "channel"])


@many
@given(
    config=st.dictionaries(
        SETTINGS,
        st.recursive(WORDS | json_values, lambda inner: st.dictionaries(SETTINGS, inner, max_size=6), max_leaves=20),
    )
)
def test_any_word_on_how_weights_are_stored(config: dict[str, Any]) -> None:
    for told in (config, {"quantization_config": config}):
        try:
            quantization_of(told)
            assert quantization_of(without_quantization(told)) is None
        except InputError as error:
            explained(error)


@many
@given(
    dtypes=st.lists(st.sampled_from(["F8_E4M3", "I8", "U8", "F32", "F8_E8M0", "BF16"]), min_size=2, max_size=2),
    shapes=st.lists(st.lists(st.integers(0, 40), max_size=4), min_size=2, max_size=2),
    names=st.sampled_from([("a.weight", "a.weight_scale_inv"), ("a.weight", "a.scale"), ("a_blocks", "a_scales")]),
    how=st.sampled_from([Quantization("", ((4, 4), (1, 0))), Quantization("", packed=True)]),
)
@example(
    dtypes=["U8", "U8"],
    shapes=[[2, 3, 2, 16], [2, 3, 2]],
    names=("a_blocks", "a_scales"),
    how=Quantization("", packed=True),
)
@example(
    dtypes=["F8_E4M3", "F32"],
    shapes=[[2, 9, 5], [2, 3, 2]],
    names=("a.weight", "a.scale"),
    how=Quantization("", ((4, 4),)),
)
def test_any_values_and_scales(
    dtypes: list[str], shapes: list[list[int]], names: tuple[str, str], how: Quantization, tmp_path: Path
) -> None:
    header, end = {}, 0
    for name, dtype, shape in zip(names, dtypes, shapes, strict=True):
        start, end = end, end + math.prod(shape) * ELEMENT_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    assume(end < 2**20)
    (tmp_path / SINGLE).write_bytes(with_header(header, b"\x7d" * end))
    try:
        found = dequantized(SafetensorsFolder(tmp_path), how)
        for name, tensor in found.items():
            assert (tensor.shape, tensor.nbytes) == (found.entries[name].shape, found.entries[name].nbytes)
    except InputError as error:
        explained(error)


@many
@given(names=st.dictionaries(st.text(max_size=8), st.text(max_size=16) | st.just(SINGLE) | json_values, max_size=4))
@example(names={"a": SINGLE})
@example(names={"a": "\0"})
@example(names={"a": "x" * 300})
@example(names={"a": "\ud800"})
def test_any_names_in_an_index(names: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(save({"a": torch.zeros(4)}))
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": names}))
    read_all(tmp_path)


@many
@given(raw=st.binary(max_size=100) | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_index(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_bytes(raw)
    read_all(tmp_path)


def load_batch(path: Path) -> None:
    try:
        batch = load_tokens(path, None, None, 50)
        assert 0 <= int(batch.tokens.min()) <= int(batch.tokens.max()) < 50
    except InputError as error:
        explained(error)


@many
@given(raw=st.binary(max_size=200))
def test_any_bytes_for_tokens(raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tokens.safetensors"
    path.write_bytes(raw)
    load_batch(path)


@many
@given(metadata=json_values, tokens=st.lists(st.lists(st.integers(-3, 60), min_size=2, max_size=2), max_size=3))
def test_any_metadata_of_tokens(metadata: Any, tokens: list[list[int]], tmp_path: Path) -> None:
    path = tmp_path / "tokens.safetensors"
    matrix = torch.tensor(tokens, dtype=torch.int64)
    path.write_bytes(save({"tokens": matrix}, {"llmprune": json.dumps(metadata), "format": "pt"}))
    load_batch(path)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return word_tokenizer(20)


rows = st.lists(st.dictionaries(st.sampled_from(["text", "messages", "a"]), json_values, max_size=3), max_size=3)
texts = (
    st.binary(max_size=60)
    | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | rows.map(lambda found: json.dumps(found).encode())
    | rows.map(lambda found: "\n".join(map(json.dumps, found)).encode())
    | st.text(alphabet='text,messages"\r\n\t w1', max_size=60).map(lambda text: f"text{text}".encode())
)


@many
@given(raw=texts, ending=st.sampled_from(["txt", "jsonl", "json", "csv", "tsv", "parquet"]))
def test_any_calibration_text(raw: bytes, ending: str, tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / f"text.{ending}"
    path.write_bytes(raw)
    try:
        reader = Reader(tokenizer, tmp_path, Progress())
        batch = calibration_tokens(str(path), reader, samples=1, seq_len=2, seed=0)
        assert batch.tokens.shape == (1, 2)
    except InputError as error:
        explained(error)


@many
@given(raw=st.binary(max_size=60) | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_state_of_an_unfinished_run(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / STATE).write_bytes(raw)
    assert read_state(tmp_path / STATE) == {}


@many
@given(text=st.text(max_size=16) | st.text("0123456789:.%+ channelsd", max_size=20))
@example(text="channels:25%+heads:33%+2:4")
def test_any_sparsity(text: str) -> None:
    try:
        found = parse_sparsity(text)
    except InputError as error:
        explained(error)
        return
    assert parse_sparsity(found.name).name == found.name


@many
@given(text=st.text(max_size=12) | st.text("0123456789.KMGTiB ", max_size=12))
def test_any_size(text: str) -> None:
    try:
        assert SIZE.read(text) >= 0
    except InputError as error:
        explained(error)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("0", 0), ("512MiB", 2**29), ("2GiB", 2**31), ("1.5 GB", 1_500_000_000), ("2k", 2000), ("7B", 7)],
)
def test_sizes(text: str, wanted: int) -> None:
    assert SIZE.read(text) == wanted


# Damaged files


SECONDS, MEMORY = 5.0, 2**30
"""The most that an input may take: of a processor's time, and above what was resident before."""
SMALL = [
    "--sparsity",
    "2:4",
    "--method",
    "magnitude",
    "--samples",
    "2",
    "--seq-len",
    "8",
    "--no-eval",
    "--device",
    "cpu",
]


@dataclass(frozen=True)
class Gate:
    """A file that is damaged, and the command that reads it.

    Args:
        share: of all inputs, in percent.
        base: folder to copy, below which the file is.
        file: its name, or a glob.
        mutator: of its bytes.
        commands: of which one is run, given the copy and the folder of all bases.
    """

    share: int
    base: str
    file: str
    mutator: Mutator
    commands: Callable[[Path, Path], list[list[str]]]


def prune_with(name: str) -> Callable[[Path, Path], list[list[str]]]:
    """The command that prunes the copy, calibrated on a file beside it."""
    return lambda copy, given: [
        ["--model", str(copy), "--calib", str(given / name), "--out", str(copy.parent / "out"), "--quiet", *SMALL]
    ]


def gates(given: Path) -> dict[str, Gate]:
    """All gates by name."""
    tokens, words = prune_with("tokens.safetensors"), prune_with("words.txt")
    return {
        "config": Gate(8, "model", "config.json", damaged_config, tokens),
        "index": Gate(3, "shards", INDEX, damaged_json, tokens),
        "header": Gate(12, "model", SINGLE, damaged_safetensors, tokens),
        "gguf": Gate(
            4, "gguf", "tiny.gguf", damaged_gguf(given / "gguf" / "tiny.gguf"),
            lambda copy, given: [
                ["--cache-dir", str(copy.parent / "cache"), *tokens(copy / "tiny.gguf", given)[0][:4],
                 "--out", str(copy.parent / "out"), "--quiet", *SMALL]
            ],
        ),
        "tokens": Gate(
            3, "tokens", "tokens.safetensors", damaged_safetensors,
            lambda copy, given: [
                [*tokens(given / "model", copy)[0][:4], "--out", str(copy.parent / "out"), "--quiet", *SMALL]
            ],
        ),
        "packed": Gate(
            10, "packed", "*.packed.safetensors", damaged_safetensors,
            lambda copy, given: [["unpack", str(copy), "--out", str(copy.parent / "out")], ["load", str(copy)]],
        ),
        "report": Gate(
            12, "pruned", REPORT, damaged_json,
            lambda copy, given: [
                ["verify", str(copy)], ["report", str(copy)], ["pack", str(copy), "--out", str(copy.parent / "out")],
            ],
        ),
        "tokenizer": Gate(2, "model", "tokenizer.json", damaged_json, words),
        "tokenizer_config": Gate(2, "model", "tokenizer_config.json", damaged_json, words),
        "generation": Gate(
            2, "model", "generation_config.json", damaged_json,
            lambda copy, given: [
                ["report", str(given / "pruned"), "--generate", "2", "--dense", str(copy), "--prompt", "w1 w2"],
                ["load", str(copy)],
            ],
        ),
        "text": Gate(1, "text", "words.txt", damaged_bytes, lambda copy, given: words(given / "model", copy)),
    }  # fmt: skip


GATES = ("config", "index", "header", "gguf", "tokens", "packed", "report", "tokenizer", "tokenizer_config",
         "generation", "text")  # fmt: skip


@pytest.fixture(scope="module")
def given_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each kind to damage."""
    folder = tmp_path_factory.mktemp("given")
    for name in ("gguf", "tokens", "text"):
        (folder / name).mkdir()
    save_tiny("llama", folder / "model")
    shutil.copytree(folder / "model", folder / "shards")
    rewrite(folder / "shards", lambda tensors: tensors, shards=2)
    write_gguf(folder / "gguf" / "tiny.gguf")
    for place in (folder, folder / "tokens"):
        token_file(place / "tokens.safetensors")
    for place in (folder, folder / "text"):
        text_file(place / "words.txt")
    [command] = prune_with("tokens.safetensors")(folder / "model", folder)
    assert main(command) == 0
    (folder / "out").rename(folder / "pruned")
    assert main(["pack", str(folder / "pruned"), "--out", str(folder / "packed")]) == 0
    return folder


FORBIDDEN = {"socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"}
ALLOWED = ("ninja", ["ninja", "--version"])
"""What transformers asks for where it builds one old model type."""
happened: list[str] = []
sys.addaudithook(lambda event, values: happened.append(event) if event in FORBIDDEN and values[:2] != ALLOWED else None)


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Everything below a folder, with size and date of the files; what is whole in a cache may stay."""
    found = {}
    for path in folder.rglob("*"):
        if "cache" in path.parts and not any(part.startswith(".") for part in path.parts):
            continue
        status = path.lstat()
        found[str(path)] = (status.st_size, status.st_mtime_ns) if path.is_file() else (0, 0)
    return found


def resident(key: str) -> int:
    """`VmRSS` or `VmHWM` of this process, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{key}:")[2].split()[0])


def run_command_or_load(command: list[str]) -> int:
    """The exit code of a command, that of `llmprune.load` included."""
    if command[0] != "load":
        return main(command)
    try:
        load(command[1])
    except InputError as error:
        sys.stderr.write(f"error: {error.message}\nhint: {error.hint}\n")
        return 2
    return 0


def faults(gate: Gate, seed: int, given: Path, place: Path, capfd: pytest.CaptureFixture[str]) -> list[str]:
    """What goes wrong with a damaged file."""
    shutil.rmtree(place, ignore_errors=True)
    copy = shutil.copytree(given / gate.base, place / gate.base)
    random = Random(seed)
    path = next(copy.glob(gate.file))
    path.write_bytes(gate.mutator(path.read_bytes(), random))
    command = random.choice(gate.commands(copy, given))
    before = contents(place)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that of now
    memory = resident("VmRSS")
    happened.clear()
    capfd.readouterr()
    started = time.process_time()
    code = run_command_or_load(command)
    took, memory = time.process_time() - started, resident("VmHWM") - memory
    said = capfd.readouterr()
    starts = [line.partition(":")[0] for line in said.err.splitlines() if line.startswith(("error:", "hint:"))]
    violated = command[0] == "verify" and code == 1 and "VIOLATED" in said.out
    wrong = {
        f"exit code {code}: {said.err[-300:]}": code not in (0, 2) and not violated,
        f"not two lines: {said.err[-300:]}": code == 2 and starts != ["error", "hint"],
        f"{took:.1f} s": took > SECONDS,
        f"{memory >> 20} MiB": memory > MEMORY,
        f"it did {happened}": bool(happened),
        f"it left {contents(place).keys() ^ before.keys()}": code == 2 and contents(place) != before,
        f"it shows {said.err + said.out!r}": not (said.err + said.out).replace("\n", "").isprintable(),
    }
    return [text for text, is_wrong in wrong.items() if is_wrong]


@pytest.mark.parametrize("name", GATES)
def test_a_damaged_file_is_understood_or_refused(
    name: str, given_files: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    gate = gates(given_files)[name]
    found = {
        seed: wrong
        for seed in range(FUZZ * gate.share // 100)
        if (wrong := faults(gate, seed, given_files, tmp_path / "place", capfd))
    }
    assert not found
