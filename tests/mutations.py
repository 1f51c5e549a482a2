"""Damage of every kind to files of the formats that are read: the same seed, the same damage."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from mmap import ACCESS_READ, mmap
from pathlib import Path
from random import Random
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from llmprune.sources.gguf_header import _Cursor

Mutator = Callable[[bytes, Random], bytes]
DEEP = 5_000
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 64, 1.5, -0.0, 1e-300, 1e308, float("nan"), float("inf"), 10**5, 10**6, 10**9,
    2**31, 2**32 - 1, 2**40, 2**63, 2**64, -(2**63), 2**70, "", "x", "1", "../x", "/etc/passwd", "a\nhint: b",
    "\x1b[2J", "\ud800", "\0", "é" * 300, "x" * 100_000, [], {}, [[]], [1], ["x"], {"a": 1}, [None] * 1000,
    [0] * 100_000,
]  # fmt: skip
CONFIG: list[tuple[str, Any]] = [
    *(("model_type", kind) for kind in sorted(CONFIG_MAPPING_NAMES)),
    *((key, value) for value in (0, 1, 4, 10**6, 10**9) for key in (
        "num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size",
        "n_positions", "sliding_window", "max_position_embeddings", "n_layer", "n_head", "n_embd", "head_dim",
        "num_key_value_heads", "attention_chunk_size", "num_nextn_predict_layers", "num_labels", "d_model", "ffn_dim",
        "mtp_num_layers",
    )),
    ("auto_map", {"AutoConfig": "a.B"}), ("quantization_config", {"quant_method": "gptq"}), ("is_decoder", True),
    ("quantization_config", {"quant_method": 3}), ("quantization_config", {"quant_method": "mxfp4"}),
    ("quantization_config", {"quant_method": "fp8", "weight_block_size": [2**70, 1]}),
    ("attn_implementation", "eager"), ("torch_dtype", "float16"),
    ("text_config", {"hidden_size": 3}), ("vision_config", {}), ("layer_types", ["full_attention"]),
    ("rope_scaling", {"rope_type": "yarn", "factor": 1e30}), ("rope_parameters", {"rope_type": "dynamic", "factor": 0}),
    ("tie_word_embeddings", True), ("attention_bias", True), ("pruned_heads", {"0": [0]}), ("hidden_act", "gelu"),
    ("base_model_tp_plan", {"x": "y"}), ("transformers_version", [1]), ("id2label", {"x": "y"}), ("use_cache", "no"),
]  # fmt: skip
"""Settings of other models."""


def damaged_bytes(raw: bytes, random: Random) -> bytes:
    """A few bytes changed, the end cut off, something put in, or a part doubled."""
    found = bytearray(raw)
    for _ in range(random.choice((1, 1, 2, 5))):
        at = random.randrange(len(found) + 1)
        kind = random.randrange(6)
        if kind == 0:
            del found[at:]
        elif kind == 1:
            found[at:at] = random.randbytes(random.choice((1, 8, 300)))
        elif kind == 2:
            del found[at : at + random.choice((1, 8, 300))]
        elif kind == 3:
            found[at:at] = found[at : at + random.choice((8, 300, 5000))]
        elif found:
            # Where headers are.
            for near in (at % min(len(found), 400), min(at, len(found) - 1)):
                found[near] = random.choice((0, 1, 0x7F, 0xFF, found[near] ^ (1 << random.randrange(8))))
    return bytes(found)


def changed(value: Any, random: Random, also: Sequence[tuple[str, Any]] = ()) -> Any:
    """A JSON value with something gone, new, moved or of another type, at any depth, also in texts that are JSON."""
    if isinstance(value, str) and value.startswith(("{", "[")) and random.random() < 0.8:
        with suppress(ValueError):
            return json.dumps(changed(json.loads(value), random))
    if isinstance(value, dict) and value:
        if also and random.random() < 0.4:
            return value | dict([random.choice(also)])
        key = random.choice(list(value))
        if random.random() < 0.6:
            return value | {key: changed(value[key], random)}
        rest = {name: item for name, item in value.items() if name != key}
        other = random.choice(list(value))
        return random.choice(
            (rest, rest | {odd_name(random): value[key]}, rest | {key: value[other], other: value[key]},
             value | {odd_name(random): random.choice(ODD)}, {key: value}),
        )  # fmt: skip
    if isinstance(value, list) and value:
        at = random.randrange(len(value))
        if random.random() < 0.6:
            return [*value[:at], changed(value[at], random), *value[at + 1 :]]
        return random.choice((value[:at], value * 2, [value], [*value, random.choice(ODD)], value[::-1]))
    if isinstance(value, int) and not isinstance(value, bool) and random.random() < 0.3:
        return random.choice(
            (value + 1, value - 1, -value, value * 2, value // 2, value * 1000, str(value), float(value))
        )
    return random.choice(ODD)


def odd_name(random: Random) -> str:
    """A key that nobody expects."""
    return str(
        random.choice(("", "x", "__class__", "__metadata__", "\n", "\ud800", "re:(a+)+$", "*", "../x", "y" * 1000))
    )


def json_text(value: Any, random: Random) -> bytes:
    """A JSON text, now and then nested deeply, or with a name twice."""
    text = json.dumps(value)
    kind = random.randrange(20)
    if kind == 0:
        text = '{"a":' + "[" * DEEP + "]" * DEEP + "," + text[1:]
    elif kind == 1 and text[0] == "{" and len(text) > 2:
        text = f"{text[:-1]}, {text[1:]}"
    return text.encode("utf-8", "surrogatepass")


def damaged_json(raw: bytes, random: Random, also: Sequence[tuple[str, Any]] = ()) -> bytes:
    """A JSON file with changed values, or with changed bytes."""
    if random.random() < 0.1:
        return damaged_bytes(raw, random)
    value = json.loads(raw)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        value = changed(value, random, also)
    return json_text(value, random)


def damaged_config(raw: bytes, random: Random) -> bytes:
    """A config with changed values, or those of other models."""
    return damaged_json(raw, random, CONFIG)


def damaged_safetensors(raw: bytes, random: Random) -> bytes:
    """A file with a changed header, or with changed bytes."""
    if random.random() < 0.2:
        return damaged_bytes(raw, random)
    end = 8 + int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8:end]), raw[end:]
    for _ in range(random.choice((1, 1, 2))):
        header = changed(header, random)
    text = json_text(header, random)
    length = len(text) if random.random() < 0.9 else random.choice((0, 1, 2**31, 2**62, 2**64 - 1, len(text) + 8))
    return length.to_bytes(8, "little") + text + (data if random.random() < 0.8 else damaged_bytes(data, random))


class _Places(_Cursor):
    """Notes where the numbers of a GGUF header stand."""

    def __init__(self, data: mmap) -> None:
        super().__init__(data)
        self.places: list[tuple[int, str]] = []

    def number(self, code: str) -> int:
        self.places.append((self.at, code))
        return super().number(code)


def damaged_gguf(path: Path) -> Mutator:
    """Damages of a GGUF file: numbers of its header, bytes of its texts, or any bytes."""
    with path.open("rb") as stream, mmap(stream.fileno(), 0, access=ACCESS_READ) as data:
        cursor = _Places(data)
        cursor.header()
        places, end = cursor.places, cursor.at

    def damaged(raw: bytes, random: Random) -> bytes:
        if random.random() < 0.15:
            return damaged_bytes(raw, random)
        found = bytearray(raw)
        for _ in range(random.choice((1, 1, 2))):
            # Half of them before the long lists of the tokenizer.
            at, code = random.choice(places[:60] if random.random() < 0.5 else places)
            size = struct.calcsize(f"<{code}")
            old = int.from_bytes(found[at : at + size], "little")
            new = random.choice(
                (0, 1, 2, 8, 10**6, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1, old + 1, old - 1, old * 2)
            )
            found[at : at + size] = (new % 2 ** (8 * size)).to_bytes(size, "little")
        if random.random() < 0.2:
            found[random.randrange(24, end)] = random.randrange(256)
        return bytes(found)

    return damaged
