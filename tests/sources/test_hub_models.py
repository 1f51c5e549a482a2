"""Of a Hub model no byte is fetched that a run does not need, and none of its weights before its config is known."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import job, reload, rewrite, save_tiny
from hub_server import Hub

from llmprune import InputError, prune
from llmprune.export.verify import verify_folder
from llmprune.model.reader import INDEX, SINGLE, SafetensorsFolder
from llmprune.run import dry_run

REPO = "org/tiny"
SMALL: dict[str, Any] = {"samples": 2, "seq_len": 8, "method": "magnitude"}
ALONG = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md", "tekken.json",
         "LICENSE", "additional_chat_templates/tool.jinja", "assets/logo.png", "odd [name].txt"}  # fmt: skip
TRAPS = {
    "consolidated.safetensors", "model.fp16.safetensors", "model.fp16.safetensors.index.json", "pytorch_model.bin",
    "original/consolidated.00.pth", "original/params.json", "original/tokenizer.model", "checkpoint-500/config.json",
    "checkpoint-500/model.safetensors", "checkpoint-500/trainer_state.json", "onnx/model.onnx", "onnx/config.json",
    "tiny.Q8_0.gguf", "runs/events.out.tfevents.1", "training_args.bin",
}  # fmt: skip


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in three files of more than 100 kB, with files of every other kind beside them."""
    folder = save_tiny("llama", tmp_path_factory.mktemp("hub") / "tiny", vocab_size=2000, hidden_size=96)
    rewrite(folder, lambda tensors: tensors, shards=3)
    for name in (ALONG | TRAPS) - {path.name for path in folder.iterdir()}:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(name))  # the cache keeps equal files once
    return folder


@pytest.fixture
def published(hub: Hub, model: Path) -> set[str]:
    """The names of the weights of a model on the Hub."""
    hub.add(REPO, files_of(model))
    return {path.name for path in model.glob("model-*")}


def test_a_run_fetches_the_files_of_the_index_and_what_comes_along(
    hub: Hub, published: set[str], model: Path, text: Path, tmp_path: Path
) -> None:
    report = prune(job(Path(REPO), tmp_path / "out", text, **SMALL))
    sizes = {name: len(data) for name, data in files_of(model).items() if name in published | ALONG | {INDEX}}
    assert hub.fetched() == sizes
    assert report.model["revision"] == hub.repos[REPO].branches["main"][0][0]
    assert files_of(tmp_path / "out").keys() == ALONG | {SINGLE, "prune_report.json", "prune_report.html"}
    assert verify_folder(tmp_path / "out").violations == 0
    wanted = prune(job(model, tmp_path / "local", text, **SMALL))
    assert [layer.error for layer in report.layers] == [layer.error for layer in wanted.layers]


@pytest.mark.parametrize(
    "options",
    [{}, {"sparsity": "channels:25%+heads:50%+2:4", "method": "auto"}, {"effort": "best", "method": "auto"}],
)
def test_a_dry_run_asks_for_no_more_of_the_weights_than_headers(
    options: dict[str, Any], hub: Hub, published: set[str], model: Path, text: Path, tmp_path: Path
) -> None:
    told = {**SMALL, **options}
    found = dry_run(job(Path(REPO), tmp_path / "out", text, **told))
    fetched = hub.fetched()
    assert fetched.keys() == published | ALONG | {INDEX}
    # As much as the client asks for at once, to find most headers whole.
    assert {fetched[name] for name in published} == {100_001}
    assert all(path.stat().st_size > 100_001 for path in model.glob("model-*"))
    wanted = dry_run(job(model, tmp_path / "out", text, **told))
    for key in ("layers", "size", "coverage", "sparsity", "recipe"):
        assert found[key] == wanted[key], key
    assert not (tmp_path / "out").exists()


def test_what_is_here_is_not_fetched_again_and_serves_without_a_network(
    hub: Hub, published: set[str], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(action: Callable[[], object]) -> None:
        with monkeypatch.context() as patch:
            patch.setattr("llmprune.sources.hub.hub_reachable", lambda: False)
            before = hub.requests.copy()
            action()
            assert hub.requests == before

    run = job(Path(REPO), tmp_path / "out", text, **SMALL)

    def refused() -> None:
        with pytest.raises(InputError, match="the Hugging Face Hub cannot be reached"):
            prune(run)

    offline(refused)
    dry_run(run)
    offline(refused)
    first = hub.fetched()
    prune(run)
    assert {name: size for name, size in hub.fetched().items() if name not in published} == {
        name: size for name, size in first.items() if name not in published
    }
    offline(lambda: prune(replace(run, overwrite=True)))


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, r"already quantised \(gptq\)"),
    "an encoder": ({"model_type": "bert"}, "'bert' is an encoder-only model"),
    "encoder and decoder": ({"model_type": "t5", "is_encoder_decoder": True}, "'t5' is an encoder-decoder model"),
    "no language": ({"model_type": "vit"}, "model type 'vit' cannot be built as a causal language model"),
    "nobody knows": ({"model_type": "llama9"}, "does not understand the config"),
    "code": ({"model_type": "x", "auto_map": {"AutoConfig": "configuration_x.C"}}, "needs code of its own"),
    "no JSON": ({}, "cannot be used"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_that_its_config_alone_refuses_is_not_fetched(
    name: str, hub: Hub, model: Path, text: Path, tmp_path: Path
) -> None:
    changes, says = CONFIGS[name]
    files = {**files_of(model), "configuration_x.py": b"raise SystemExit"}
    files["config.json"] = json.dumps({**json.loads(files["config.json"]), **changes}).encode() if changes else b"{"
    hub.add(REPO, files)
    with pytest.raises(InputError, match=says):
        prune(job(Path(REPO), tmp_path / "out", text, **SMALL))
    assert hub.fetched().keys() == {"config.json", "configuration_x.py"}


def test_an_adapter_and_weights_that_cannot_be_read_are_not_fetched(
    hub: Hub, model: Path, text: Path, tmp_path: Path
) -> None:
    rest = {name: data for name, data in files_of(model).items() if not name.startswith("model")}
    cases = {
        "org/adapter": ({"adapter_config.json": b"{}", SINGLE: b"x"}, "a model with a PEFT adapter beside it"),
        "org/pickles": ({"pytorch_model.bin": b"x"}, r"holds only pickled weights \(pytorch_model\.bin\)"),
        "org/packed": ({"model.packed.safetensors": b"x"}, "is packed"),
        "org/none": ({}, f"has no {SINGLE} and no {INDEX}"),
        "org/lacking": ({INDEX: b'{"weight_map": {"a": "model-9.safetensors"}}'}, r"has no model-9\.safetensors"),
        "org/outside": ({INDEX: b'{"weight_map": {"a": "../x.safetensors"}}'}, "points outside its folder"),
    }
    for repo, (files, says) in cases.items():
        hub.add(repo, {name: data for name, data in rest.items() if not name.endswith(".bin")} | files)
        with pytest.raises(InputError, match=says):
            prune(job(Path(repo), tmp_path / "out", text, **SMALL))
    assert not [name for name in hub.fetched() if name.endswith((".safetensors", ".bin"))]


@pytest.mark.parametrize(
    "damage", [b"", b"\xff" * 200, b"\x10\0\0\0\0\0\0\0[]              ", b'\x08\0\0\0\0\0\0\0{"a":3} ']
)
def test_a_damaged_header_on_the_hub_is_named(damage: bytes, hub: Hub, model: Path, text: Path, tmp_path: Path) -> None:
    shard = "model-00002-of-00003.safetensors"
    hub.add(REPO, {**files_of(model), shard: damage})
    with pytest.raises(InputError, match=f"{shard} of {REPO} is not a whole safetensors file"):
        dry_run(job(Path(REPO), tmp_path / "out", text, **SMALL))


def test_an_index_that_was_left_beside_a_whole_file_is_not_looked_at(
    hub: Hub, model: Path, text: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    for name in TRAPS:
        (folder / name).unlink()
    rewrite(folder, lambda tensors: {name: 2 * tensor for name, tensor in tensors.items()})
    # What transformers takes.
    wanted = reload(folder).state_dict()
    shutil.copy(model / INDEX, folder)
    for shard in model.glob("model-*"):
        shutil.copy(shard, folder)
    taken = reload(folder).state_dict()
    found = SafetensorsFolder(folder)
    assert all(torch.equal(found[name], taken[name]) for name in found)
    assert all(torch.equal(taken[name], tensor) for name, tensor in wanted.items())
    hub.add(REPO, files_of(folder))
    prune(job(Path(REPO), tmp_path / "out", text, **SMALL))
    assert {name for name in hub.fetched() if name.startswith("model")} == {SINGLE}
