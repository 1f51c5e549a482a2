"""The files of a model folder that are no weights: which come along, and how."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from llmprune.errors import InputError
from llmprune.runtime.files import write_json
from llmprune.runtime.foreign import check_inside, parse_json, read_text
from llmprune.runtime.ownership import regular_files
from llmprune.runtime.redact import without_origins

ANEW = ("config.json", "README.md", "prune_report.json", "prune_report.html", "speed.json")
"""Files that a run writes for its own model."""
LEFT_OUT = {
    "weights, also in other formats": (
        "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.ggml", "*.onnx", "*.onnx_data*", "*.h5",
        "*.msgpack", "*.npz", "*.npy", "*.tflite", "*.ot", "*.pkl", "*.pickle", "*.mlmodel", "*.nemo", "*.pte",
        "*.distcp", "*.llamafile", "*.litertlm",
    ),
    "names weights that are not there": ("*.index.json",),
    "a state of training": ("trainer_state.json", "scaler.*", "scheduler.*", "events.out.tfevents.*"),
    "hidden": (".*",),
    "made by Python": ("__pycache__",),
}  # fmt: skip
"""What else of a model folder does not come along, at any depth, and why; nor does a folder in it with weights."""


def companions(names: Iterable[str]) -> list[str]:
    """Of the files of a model folder those that come along, by their paths inside it, with `/`."""
    paths = [PurePosixPath(name) for name in sorted(names)]
    with_weights = {parent for path in paths if _is_weight(path.name) for parent in path.parents if parent.name}
    return [
        path.as_posix()
        for path in paths
        if path.as_posix() not in ANEW
        and with_weights.isdisjoint(path.parents)
        and not any(fnmatchcase(part, glob) for part in path.parts for globs in LEFT_OUT.values() for glob in globs)
    ]


def _is_weight(name: str) -> bool:
    return any(fnmatchcase(name, glob) for glob in LEFT_OUT["weights, also in other formats"])


def copy_companions(source: Path, target: Path) -> list[Path]:
    """Copy the files of a model folder that come along: tokenizer, templates, processors, code, licence.

    They are the same bytes, but for settings that say where a model lay. Links are followed to files inside the
    folder, and in the Hugging Face cache to its own.

    Returns:
        The other links, pipes and devices, which are left out.
    """
    regular, special = regular_files(source)
    files = {path.relative_to(source).as_posix(): path for path in (*regular, *special)}
    strange = {path for path in special if not (path.is_file() and _stays(path, source))}
    others = []
    for name in companions(files):
        if files[name] in strange:
            others.append(files[name])
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("config.json"):
            copy_json(files[name], target / name, without_origins)
        else:
            shutil.copyfile(files[name], target / name)
    return others


def _stays(path: Path, folder: Path) -> bool:
    """Whether a link leads to what belongs to its folder."""
    try:
        check_inside(path, folder)
    except InputError:
        return False
    return True


def copy_json(source: Path, target: Path, edit: Callable[[Any], Any]) -> None:
    """Copy a JSON file, byte for byte where `edit` changes nothing, or where it is no JSON."""
    try:
        values = parse_json(read_text(source))
        edited = edit(values)
    except (OSError, ValueError):
        edited = values = None
    if edited == values:
        shutil.copyfile(source, target)
    else:
        write_json(target, edited)
