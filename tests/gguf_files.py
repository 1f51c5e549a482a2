"""GGUF files, whole or with something wrong, written by gguf's own writer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quantize

HIDDEN, BLOCKS, VOCABULARY = 64, 2, 300
METADATA: dict[str, Any] = {
    "block_count": BLOCKS,
    "context_length": 128,
    "embedding_length": HIDDEN,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "vocab_size": VOCABULARY,
}


def write_gguf(
    path: Path,
    without: str = "",
    poison: str = "",
    changes: Mapping[str, int] | None = None,
    rope: Mapping[str, Any] | None = None,
    bos: bool | None = None,
) -> Path:
    """A tiny random Llama in Q8_0 with a tokenizer.

    Args:
        path: where to.
        without: a tensor that is left out.
        poison: a tensor that gets a NaN.
        changes: of `METADATA`.
        rope: settings and tensors (by names that begin with `rope_`) of the rotary positions.
        bos: whether it says that texts begin with BOS; None: it does not say.
    """
    rope = {"freq_base": 10_000.0, **(rope or {})}
    writer = GGUFWriter(path, "llama")
    for key, value in {**METADATA, **(changes or {})}.items():
        (writer.add_uint64 if abs(value) >= 2**32 else writer.add_int32 if value < 0 else writer.add_uint32)(
            f"llama.{key}", value
        )
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in rope.items():
        if key.startswith("rope_"):
            writer.add_tensor(key, value)
        elif isinstance(value, str):
            writer.add_string(f"llama.rope.{key}", value)
        else:
            writer.add_float32(f"llama.rope.{key}", value)
    _add_tokenizer(writer, bos)
    random = np.random.default_rng(0)
    for name, shape in shapes().items():
        values = random.normal(0, 0.2, shape).astype(np.float32)
        if name == without:
            continue
        if len(shape) == 1:
            values[:] = 1
        if name == poison:
            values.flat[7] = np.nan
        if len(shape) == 1 or name == poison:
            writer.add_tensor(name, values)
        else:
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: GGUFWriter, bos: bool | None) -> None:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [f"▁word{number}" for number in range(VOCABULARY - len(tokens))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(number) for number in range(VOCABULARY)])
    writer.add_token_types([2, 3, 3, *([6] * 256), *([1] * (VOCABULARY - 259))])
    writer.add_bos_token_id(1)
    if bos is not None:
        writer.add_add_bos_token(bos)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of the file."""
    found: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (VOCABULARY, HIDDEN),
        "output_norm.weight": (HIDDEN,),
        "output.weight": (VOCABULARY, HIDDEN),
    }
    for block in range(BLOCKS):
        for name, *shape in (
            ("attn_norm", HIDDEN), ("attn_q", HIDDEN, HIDDEN), ("attn_k", HIDDEN // 2, HIDDEN),
            ("attn_v", HIDDEN // 2, HIDDEN), ("attn_output", HIDDEN, HIDDEN), ("ffn_norm", HIDDEN),
            ("ffn_gate", 96, HIDDEN), ("ffn_up", 96, HIDDEN), ("ffn_down", HIDDEN, 96),
        ):  # fmt: skip
            found[f"blk.{block}.{name}.weight"] = tuple(shape)
    return found
