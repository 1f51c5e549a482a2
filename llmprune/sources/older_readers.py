"""What readers from before transformers 5 need beside its own form of a folder's JSON files, to read the same model.

Only for folders that are made here: files that a model came with are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmprune.runtime.files import write_json
from llmprune.runtime.foreign import read_json

TOKENIZER = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
"""The class of any `tokenizer.json` under its older name, without the token types that most models do not take."""
LOCAL = ("is_local", "local_files_only", "_name_or_path", "name_or_path", "_model_name_or_path")
"""How and from where a model was loaded, which is no part of it."""
WHOLE, WINDOW = "full_attention", "sliding_attention"
"""The types of layers whose rotary frequencies may differ."""
SCALINGS = ("linear", "dynamic", "yarn", "longrope", "llama3")
"""The kinds that `rope_scaling` may have; to others that key means something else, or nothing."""


def add_older_keys(folder: Path) -> None:
    """Complete `config.json` and `tokenizer_config.json`, as `save_pretrained` of transformers 5 writes them."""
    config = _without_local(read_json(folder / "config.json"))
    write_json(folder / "config.json", {**config, **rope_keys(config)})
    tokenizer = _without_local(read_json(folder / "tokenizer_config.json"))
    write_json(folder / "tokenizer_config.json", {**tokenizer, **TOKENIZER})


def rope_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary frequencies of `rope_parameters` under the keys that came before it.

    Those were `rope_theta` and `rope_scaling` for all layers, or for those with full attention where
    `rope_local_base_freq` gave the base of the others.
    """
    parameters = config.get("rope_parameters") or {}
    rope = parameters.get(WHOLE, parameters) or {}
    if "rope_theta" not in rope:
        return {}
    found = {"rope_theta": rope["rope_theta"]}
    if WINDOW in parameters:
        found["rope_local_base_freq"] = parameters[WINDOW]["rope_theta"]
    elif "partial_rotary_factor" in rope:
        found["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if rope.get("rope_type") in SCALINGS:
        found["rope_scaling"] = {key: value for key, value in rope.items() if key not in found}
    return found


def _without_local(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in LOCAL}
