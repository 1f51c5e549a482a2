"""What is no weight comes along as it was; only what must change does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import job

from llmprune import prune
from llmprune.model.companions import companions, copy_companions

ODD = '{ "architectures":["LlamaForCausalLM"],\t"model_type":"llama", "note":"\\u00fc",\n\n  "initializer_range":2E-2,'
"""The beginning of a config whose spelling nobody would repeat."""
SMALL: dict[str, Any] = {"samples": 2, "seq_len": 8, "method": "magnitude"}


@pytest.fixture
def source(tiny: Path, tmp_path: Path) -> Path:
    """A model whose JSON files have a form of their own."""
    folder = shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    for key in ("architectures", "model_type", "initializer_range"):
        del config[key]
    rest = json.dumps({**config, "_name_or_path": "someone/tiny", "dtype": "float32", "torch_dtype": "float32"})
    (folder / "config.json").write_text(f"{ODD} {rest[1:]}\n\n")
    for name in ("tokenizer_config.json", "tokenizer.json"):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()), indent=7) + " \n")
    for name in ("tekken.json", "special_tokens_map.json", "preprocessor_config.json"):
        (folder / name).write_text('{"b":1,   "a":[ ]}')
    return folder


def written(source: Path, out: Path, text: Path, **options: Any) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The JSON files of the source that a run wrote, as bytes, and its config."""
    prune(job(source, out, text, **{**SMALL, **options}))
    names = [path.name for path in source.glob("*.json")]
    return {name: (out / name).read_bytes() for name in names}, json.loads((out / "config.json").read_text())


def test_files_that_need_no_change_are_the_same_bytes(source: Path, text: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in source.glob("*.json")}
    found, _ = written(source, tmp_path / "out", text)
    assert found == before
    again, _ = written(source, tmp_path / "again", text, dtype="float32")
    assert again == before


def test_a_new_dtype_and_new_sizes_are_all_that_changes(source: Path, text: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in source.glob("*.json")}
    config = json.loads(before.pop("config.json"))
    found, new = written(source, tmp_path / "out", text, dtype="bfloat16")
    assert new == config | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
    assert list(new) == list(config)
    assert before.items() <= found.items()
    found, new = written(source, tmp_path / "less", text, sparsity="channels:50%", method="auto")
    assert new == config | {"intermediate_size": config["intermediate_size"] // 2}
    assert before.items() <= found.items()


def test_what_was_dequantised_says_so_no_more(source: Path, text: Path, tmp_path: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(
        json.dumps({**config, "quantization_config": None, "sparsity_config": {"a": 1}})
    )
    _, new = written(source, tmp_path / "out", text)
    assert new == config


ALONG = [
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "tokenizer.model", "tekken.json",
    "chat_template.jinja", "LICENSE", "additional_chat_templates/tool.jinja", "processor_config.json",
    "modeling_x.py", "custom_generate/generate.py", "assets/logo.png", "video/config.json", "video/README.md",
    "generation_config.json", "notes/config.txt", "sentencepiece.bpe.model",
]  # fmt: skip
LEFT = [
    "config.json", "README.md", "prune_report.json", "model.safetensors", "model-00001-of-00002.safetensors",
    "model.safetensors.index.json", "pytorch_model.bin.index.json", "pytorch_model.bin", "consolidated.00.pth",
    "original/params.json", "original/tokenizer.model", "original/consolidated.00.pth", "onnx/deep/model.onnx_data_1",
    "onnx/config.json", "onnx/deep/config.json", "checkpoint-5/trainer_state.json", "checkpoint-5/a/optimizer.pt",
    "checkpoint-5/a/b/vocab.json", ".gitattributes", ".cache/huggingface/x.json",
    "__pycache__/modeling_x.cpython-311.pyc", "trainer_state.json", "x/.hidden/y.json",
]  # fmt: skip


def test_what_comes_along_is_known_by_the_names_alone() -> None:
    assert companions([*LEFT, *ALONG]) == sorted(ALONG)


def test_what_is_copied_is_what_comes_along(tmp_path: Path) -> None:
    for name in (*ALONG, *LEFT):
        (tmp_path / "a" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "a" / name).write_text(name)
    assert copy_companions(tmp_path / "a", tmp_path / "b") == []
    copied = [path for path in (tmp_path / "b").rglob("*") if path.is_file()]
    assert {path.relative_to(tmp_path / "b").as_posix(): path.read_text() for path in copied} == {n: n for n in ALONG}
