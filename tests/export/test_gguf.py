"""`llmprune export DIR gguf`: what llama.cpp computes is what transformers computes, and every zero stays one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from commands import edit_config
from helpers import edit_tensor, on_disk, random_tokens, rewrite, tiny_model, token_file
from quantised import meant, save_fp8
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmprune import Job, prune
from llmprune.cli.main import main
from llmprune.errors import CheckError, InputError, PruneError
from llmprune.export import GGUF_TYPES
from llmprune.export import gguf as module
from llmprune.export.gguf import export_gguf
from llmprune.export.gguf_families import FAMILIES, interleave
from llmprune.export.gguf_types import KINDS, decode, encode

llama_cpp = pytest.importorskip("llama_cpp", reason="xllamacpp is missing", exc_type=ImportError)

ROWS = llama_cpp.TOKENS + 4
"""Of the embeddings: a few more than there are tokens."""
UNUSED = [0, 1, *range(llama_cpp.TOKENS, ROWS)]
COUNT = 32
FEW_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 80}
_WINDOWS = ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
NEEDED: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "smollm3": {"num_hidden_layers": 5, "no_rope_layers": [1, 1, 1, 0, 1]},
    "granite": {
        "embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2,
    },
    "qwen3_moe": {"norm_topk_prob": True},
    "olmoe": {"num_key_value_heads": 4},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3_text": {"query_pre_attn_scalar": 16, "num_hidden_layers": 7, "layer_types": _WINDOWS},
}  # fmt: skip
"""What llama.cpp takes for granted of a type."""


def rope(kind: str, **more: Any) -> dict[str, Any]:
    """Settings of scaled rotary positions, of which a short text shows something."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **more}}


LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=16)
LINEAR = rope("linear", factor=2.0)
TURNED = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
LOCAL = {"rope_type": "default", "rope_theta": 1e4}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in FAMILIES},
    **{f"{name}, few heads": (name, FEW_HEADS) for name in ("llama", "qwen2", "qwen3_moe", "gemma3_text")},
    **{f"{name}, tied": (name, {"tie_word_embeddings": True}) for name in ("llama", "phi3", "olmo2")},
    "gemma3_text, untied": ("gemma3_text", {"tie_word_embeddings": False}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, llama3": ("llama", LLAMA3),
    **{f"{name}, yarn": (name, YARN) for name in ("llama", "qwen2")},
    **{f"{name}, linear": (name, LINEAR) for name in ("llama", "qwen3")},
    "gemma3_text, linear": (
        "gemma3_text", {"rope_parameters": {"sliding_attention": LOCAL, "full_attention": TURNED}},
    ),
    "phi3, partial": ("phi3", rope("default", partial_rotary_factor=0.5)),
}  # fmt: skip
READ_BY_TRANSFORMERS: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("llama", "mistral", "qwen2")},
    "qwen3": {"head_dim": 128},
    "gemma2": {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096},
}
"""Model types, and the sizes that transformers does not read from GGUF but takes for granted."""


def save(folder: Path, kind: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """A tiny model with a tokenizer whose tokens are all text."""
    options = {"max_position_embeddings": 256, **NEEDED.get(kind, {}), **options}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    model = tiny_model(kind, vocab_size=ROWS, **special, **options)
    model.generation_config.eos_token_id = None
    model.to(dtype).save_pretrained(folder)
    llama_cpp.ascii_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with a tokenizer."""
    return save(tmp_path_factory.mktemp("models") / "tiny")


def stored(path: Path) -> dict[str, Tensor]:
    """All tensors of a file as gguf's own reader has them, float32."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        data = torch.from_numpy(gguf.dequantize(np.array(tensor.data), tensor.tensor_type).astype(np.float32))
        found[tensor.name] = data.view(tuple(int(size) for size in reversed(tensor.shape)))
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_llama_cpp_computes_what_transformers_computes(tmp_path: Path, variant: str) -> None:
    kind, options = VARIANTS[variant]
    source = save(tmp_path / "model", kind, **options)
    export_gguf(source, tmp_path / "model.gguf", kind="f32")
    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=False)
    prompt = torch.randint(2, llama_cpp.TOKENS, (20,), generator=torch.Generator().manual_seed(1)).tolist()
    tokens, told, length = llama_cpp.LlamaCpp(tmp_path / "model.gguf").greedy(prompt, COUNT, UNUSED)
    wanted, expected = llama_cpp.greedy(model, prompt, tokens, UNUSED)
    assert (tokens, len(tokens), length) == (wanted, COUNT, len(prompt))
    # llama.cpp has the GELU of Gemma from a table in float16.
    close = 2e-3 if kind.startswith("gemma") else 1e-5
    for found, whole in zip(told, expected, strict=True):
        assert all(abs(value - float(whole[token])) < close for token, value in found.items())


@pytest.mark.parametrize("kind", READ_BY_TRANSFORMERS)
def test_transformers_reads_the_file_as_the_same_model(tmp_path: Path, kind: str) -> None:
    source = save(tmp_path / "model", kind, **READ_BY_TRANSFORMERS[kind])
    export_gguf(source, source / "model.gguf", kind="f32")
    tokens = torch.randint(2, llama_cpp.TOKENS, (2, 20))
    plain, read = (
        AutoModelForCausalLM.from_pretrained(source, trust_remote_code=False, **where)
        for where in ({}, {"gguf_file": "model.gguf", "dtype": torch.float32})
    )
    with torch.no_grad():
        torch.testing.assert_close(read(tokens).logits, plain(tokens).logits, rtol=1e-4, atol=1e-4)


def test_rows_are_interleaved_as_by_hand() -> None:
    width = 6
    weight = torch.arange(2 * width * 3.0).view(2 * width, 3)
    order = [head * width + half * width // 2 + row for head in range(2) for row in range(3) for half in range(2)]
    assert torch.equal(interleave(weight, width), weight[order])
    assert torch.equal(interleave(weight[:, 0], width), weight[order, 0])


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_zeros_of_any_block_stay_zeros(kind: str) -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(512, 64, generator=draw) * torch.logspace(-45, 5, 512)[:, None]
    zeros = torch.rand(512, 64, generator=draw) < 0.5
    weight[zeros] = 0.0
    weight[torch.rand(512, 64, generator=draw) < 0.1] *= -0.0
    weight[7] = 0.0
    for sign in (1, -1):  # the largest weight of a block has code 0, whichever sign it has
        weight[9 + sign] = torch.where(torch.arange(64) % 4 == 0, 5.0 * sign, 0.0)
    found = decode(encode("w", weight, KINDS[kind]).reshape(512, -1), KINDS[kind])
    assert not found[weight == 0].any()
    middle = weight.abs().amax(1).log10().abs() < 2  # below, scales lose digits in float16
    bound = weight.abs().amax(1, keepdim=True) / (200 if kind == "q8_0" else 7)
    assert bool(((found - weight).abs() <= bound)[middle].all())


@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_a_pruned_model_keeps_its_zeros_in_every_type(tmp_path: Path, folder: Path, kind: str) -> None:
    source = shutil.copytree(folder, tmp_path / "model")

    def prune(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(0)
        masks = {name: torch.rand(weight.shape, generator=draw) < 0.5 for name, weight in tensors.items()}
        return {
            name: weight.masked_fill(masks[name], 0) if "layers" in name else weight for name, weight in tensors.items()
        }

    rewrite(source, prune)
    out = tmp_path / "model.gguf"
    report = export_gguf(source, out, kind=kind)
    float32, found = tmp_path / "plain.gguf", stored(out)
    export_gguf(source, float32, kind="f32")
    plain = stored(float32)
    assert plain.keys() == found.keys()
    zeros = sum(int((weight == 0).sum()) for weight in plain.values())
    assert report.zeros == [zeros, sum(int((weight == 0).sum()) for weight in found.values())]
    assert zeros > 10_000
    for name, weight in plain.items():
        assert not found[name][weight == 0].any(), name
        scale = {"f32": 0, "f16": 2e-3, "bf16": 2e-2, "q8_0": 1e-2, "q4_0": 0.15}[kind]
        assert float((found[name] - weight).abs().max()) <= scale * float(weight.abs().max()), name
    assert report.size == out.stat().st_size
    tokens, _, _ = llama_cpp.LlamaCpp(out).greedy([5, 6, 7], 4, UNUSED)
    assert len(tokens) == 4


def kinds(path: Path) -> dict[str, str]:
    """The types of the tensors in a file, by name."""
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


def test_vectors_norms_and_embeddings_keep_more_bits(tmp_path: Path) -> None:
    source = save(tmp_path / "model", "qwen3_moe")
    export_gguf(source, tmp_path / "model.gguf", kind="q4_0")
    found = kinds(tmp_path / "model.gguf")
    assert {name: found[f"{name}.weight"] for name in ("token_embd", "output", "output_norm")} == {
        "token_embd": "Q8_0", "output": "Q8_0", "output_norm": "F32",
    }  # fmt: skip
    block = {name.removeprefix("blk.0."): kind for name, kind in found.items() if name.startswith("blk.0.")}
    assert {name for name, kind in block.items() if kind == "F32"} == {
        *("attn_norm.weight", "ffn_norm.weight", "attn_q_norm.weight", "attn_k_norm.weight", "ffn_gate_inp.weight"),
    }
    assert {kind for name, kind in block.items() if "exps" in name or "attn_v" in name} == {"Q4_0"}


def test_rows_that_are_no_whole_blocks_are_float16_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = save(tmp_path / "model", intermediate_size=80), tmp_path / "model.gguf"
    assert main(["export", str(source), "gguf", "--type", "q4_0", "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "float16: 2 matrices, first blk.0.ffn_down.weight: their rows of 80 are no multiple of 32" in told
    assert {name for name, kind in kinds(out).items() if kind == "F16"} == {
        f"blk.{block}.ffn_down.weight" for block in (0, 1)
    }
    assert len(llama_cpp.LlamaCpp(out).greedy([5, 6, 7], 4, UNUSED)[0]) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_type_of_the_weights_is_the_default_and_loses_nothing(tmp_path: Path, dtype: torch.dtype) -> None:
    source = save(tmp_path / "model", dtype=dtype)
    report = export_gguf(source)
    kind = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}[dtype]
    assert (report.type, Path(report.out)) == (kind, tmp_path / f"model-{kind}.gguf")
    export_gguf(source, tmp_path / "plain.gguf", kind="f32")
    plain = stored(tmp_path / "plain.gguf")
    assert all(torch.equal(weight, plain[name]) for name, weight in stored(Path(report.out)).items())


def test_the_same_folder_gives_the_same_bytes(tmp_path: Path, folder: Path) -> None:
    for name in ("one.gguf", "two.gguf"):
        export_gguf(folder, tmp_path / name, kind="q8_0")
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


def test_windows_that_llama_cpp_lacks_bound_the_context(tmp_path: Path) -> None:
    source = save(tmp_path / "model", "mistral", sliding_window=64)
    export_gguf(source, tmp_path / "model.gguf")
    field = gguf.GGUFReader(tmp_path / "model.gguf").fields["llama.context_length"]
    assert field.contents() == 64


def test_weights_in_fewer_bits_are_exported_with_what_they_mean(tmp_path: Path) -> None:
    source = save_fp8("llama", tmp_path / "model", vocab_size=ROWS)
    llama_cpp.ascii_tokenizer().save_pretrained(source)
    assert export_gguf(source).type == "bf16"
    export_gguf(source, tmp_path / "model.gguf", kind="f32")
    weight = on_disk(source)["model.layers.1.mlp.up_proj.weight"]
    scales = on_disk(source)["model.layers.1.mlp.up_proj.weight_scale_inv"]
    assert torch.equal(stored(tmp_path / "model.gguf")["blk.1.ffn_up.weight"], meant(weight, scales, (32, 32)))


def test_a_quantised_folder_is_exported_with_its_codes(tmp_path: Path, folder: Path) -> None:
    tokens = token_file(tmp_path / "tokens.safetensors", random_tokens(8, 32))
    prune(
        Job(str(folder), "2:4", quantize="int8", effort="fast", calib=str(tokens), evaluate=False, out=tmp_path / "q")
    )
    report = export_gguf(tmp_path / "q", tmp_path / "q.gguf")
    assert report.type == "f32"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    model(random_tokens(1, 4))
    wanted = model.get_parameter("model.layers.1.mlp.down_proj.weight")
    assert torch.equal(stored(tmp_path / "q.gguf")["blk.1.ffn_down.weight"], wanted)
    assert report.zeros[0] == report.zeros[1] >= wanted.numel() // 2


def refused(source: Path, out: Path, says: str, hints: str, **options: Any) -> None:
    """An export fails with this error, and leaves nothing."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(PruneError, match=says) as caught:
        export_gguf(source, out, **options)
    assert hints in caught.value.hint
    assert sorted(out.parent.iterdir()) == before


def test_what_llama_cpp_does_not_have_is_refused(tmp_path: Path, folder: Path) -> None:
    out = tmp_path / "model.gguf"
    refused(tmp_path / "none", out, "there is no folder", "name a model folder")
    refused(save(tmp_path / "opt", "opt"), out, "model type 'opt' is none of those", "convert_hf_to_gguf.py")
    refused(folder, tmp_path, "is a folder", "name of a file")
    with pytest.raises(InputError, match="lies in no folder"):
        export_gguf(folder, tmp_path / "none" / "model.gguf")


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob False, but llama.cpp computes qwen3_moe with True"),
        ("qwen3", {"attention_bias": True}, "attention_bias True"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("gemma2", {"query_pre_attn_scalar": 32}, "query_pre_attn_scalar 32, but .* with 16"),
        ("gemma3_text", {"layer_types": _WINDOWS[::-1]}, "layer_types"),
        ("gemma2", {"final_logit_softcapping": None}, "final_logit_softcapping None"),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 1, 1]}, "no_rope_layers"),
        ("olmoe", {"num_key_value_heads": 2}, "num_key_value_heads 2"),
        ("olmo2", FEW_HEADS, "2 heads of 16 are not as wide as the model .64."),
        ("gemma", {"tie_word_embeddings": False}, "no place for 'lm_head.weight'"),
        ("gemma", LINEAR, "scaled by 'linear'"),
        ("llama", rope("dynamic", factor=2.0), "scaled by 'dynamic'"),
        ("llama", rope("yarn", factor=4.0, original_max_position_embeddings=16, attention_factor=2.0), "attention_fac"),
        ("llama", rope("default", partial_rotary_factor=0.5), "partial_rotary_factor 0.5"),
    ],
)  # fmt: skip
def test_what_llama_cpp_computes_in_another_way_is_refused(
    tmp_path: Path, kind: str, options: dict[str, Any], says: str
) -> None:
    refused(save(tmp_path / "model", kind, **options), tmp_path / "model.gguf", says, "")


def test_bad_weights_are_refused_and_nothing_is_left(tmp_path: Path, folder: Path) -> None:
    source, out = shutil.copytree(folder, tmp_path / "model"), tmp_path / "model.gguf"
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensor(source, name, lambda weight: weight[0, :1].fill_(1e6))
    refused(source, out, "blk.1.ffn_up.weight' reach 1,000,000, the largest f16 is 65,504", "--type bf16", kind="f16")
    edit_tensor(source, name, lambda weight: weight[0, :1].fill_(torch.nan))
    refused(source, out, "blk.1.ffn_up.weight' hold NaN", "undamaged")
    edit_config(source, vocab_size=ROWS + 1)
    refused(source, out, "in the config", "config")


def test_a_zero_that_is_lost_is_found_in_the_file(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = shutil.copytree(folder, tmp_path / "model"), tmp_path / "model.gguf"
    edit_tensor(source, "model.layers.0.mlp.up_proj.weight", lambda weight: weight[3, :5].fill_(0))
    monkeypatch.setattr(module, "encode", lambda name, weight, kind: encode(name, weight + 1, kind))
    with pytest.raises(CheckError, match=r"5 zeros of 'blk\.0\.ffn_up\.weight' are none in the file"):
        export_gguf(source, out)
    assert not out.exists()


def test_too_little_disk_is_found_before(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: free)
    refused(folder, tmp_path / "model.gguf", "MiB, but .* has 0 MiB free", "free disk space")


def test_a_file_is_replaced_only_if_asked(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "model.gguf"
    out.write_text("mine")
    words = ["export", str(folder), "gguf", "--out", str(out)]
    assert main(words) == 2
    assert capsys.readouterr().err == f"error: {out} exists already\nhint: choose another --out, or add --overwrite\n"
    assert out.read_text() == "mine"
    assert main([*words, "--overwrite", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["size"] == out.stat().st_size
    assert told["architecture"] == "llama"
    assert main(["export", str(folder), "onnx"]) == 2
    assert "choose from gguf" in capsys.readouterr().err


def test_the_demo_model_writes_the_same_text(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from llmprune.progress import Progress
    from llmprune.sources.demo import default_cache, demo_model

    try:
        source = demo_model(default_cache(), Progress())
    except InputError as error:
        pytest.skip(error.message)
    export_gguf(source, tmp_path / "demo.gguf", kind="f32")
    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    prompt = "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n"
    tokens = tokenizer(prompt)["input_ids"]
    with torch.no_grad():
        made = model.generate(torch.tensor([tokens]), max_new_tokens=COUNT, do_sample=False)[0, len(tokens) :]
    found, _, length = llama_cpp.LlamaCpp(tmp_path / "demo.gguf").greedy(prompt, COUNT)
    assert (found, length) == (made.tolist(), len(tokens))
