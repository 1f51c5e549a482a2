"""The `config.json` of a smaller model: that of its source, with the settings that changed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llmprune.errors import InputError
from llmprune.model.auto_class import text_section
from llmprune.structure.config_search import with_changes
from llmprune.structure.cut import Structure


def smaller_config(structure: Structure, source: Mapping[str, Any]) -> dict[str, Any]:
    """The source's config with the sizes of the smaller model; all else stays.

    Args:
        structure: of the smaller model.
        source: the content of the source's file.
    """
    config, changes = dict(source), structure.changes
    if not changes:
        return config
    section = text_section(structure.config)
    if section not in config and changes.keys() & config.keys():
        section = ""  # older wrappers say the sizes of their language model beside those of the rest
    # A config may say a number under another name, which must not contradict it.
    aliases = {old for old, new in structure.config.get_text_config().attribute_map.items() if new in changes}
    old = config.get(section, {}) if section else config
    kept = {key: value for key, value in old.items() if key not in aliases}
    return with_changes({**config, section: kept} if section else kept, section, changes)


def check_written(structure: Structure, source: Mapping[str, Any]) -> None:
    """Read the smaller model's config as others will: what it says of the sizes must be what is meant.

    Raises:
        InputError: another setting of the file contradicts it.
    """
    wanted = structure.config.get_text_config()
    with TemporaryDirectory() as folder:
        # Infinity, for one, stands in files in a way of its own, so a file it is.
        (Path(folder) / "config.json").write_text(json.dumps(smaller_config(structure, source)), encoding="utf-8")
        found = type(structure.config).from_pretrained(folder, trust_remote_code=False).get_text_config()
    for key in (*structure.changes, "num_hidden_layers"):
        said, meant = getattr(found, key, None), getattr(wanted, key, None)
        if said != meant:
            raise InputError(
                f"the config of {wanted.model_type!r} says {key} in a second way: {said} would be read, not {meant}",
                "this model cannot get smaller; remove weights instead, e.g. --sparsity 2:4",
            )
