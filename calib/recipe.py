"""What a calibration set is made of: a TOML file with settings and one `[[source]]` table per source of documents."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from llmprune.errors import InputError
from llmprune.job import BOS
from llmprune.runtime.redact import base_name

RECIPES = Path(__file__).resolve().parent / "recipes"


@dataclass(frozen=True, slots=True)
class Part:
    """A source of documents: `path` on this machine, or `repo` on the Hugging Face Hub.

    Args:
        path: text file (one document), file of rows such as `.jsonl` (a document a row), or a folder of such files.
        separator: what stands between the documents of a text file; '' where the file is one document.
        repo, config, split, revision: a data set on the Hub.
        join: whether the rows are lines of one text (WikiText), to be read in order and joined by blank lines.
        column: where the text of a row stands.
        messages: where a conversation stands, a list of `{"role", "content"}`; it goes through the chat template.
        weight: share of the windows, relative to the other sources.
    """

    path: str = ""
    separator: str = ""
    repo: str = ""
    config: str = ""
    split: str = "train"
    revision: str = ""
    join: bool = False
    column: str = "text"
    messages: str = ""
    weight: float = 1.0

    @property
    def name(self) -> str:
        """What provenance calls it."""
        return (
            base_name(self.path)
            if self.path
            else "/".join(filter(None, (self.repo, self.config, self.split)))
            + (f"@{self.revision}" if self.revision else "")
        )


@dataclass(frozen=True, slots=True)
class Recipe:
    """A whole calibration set.

    Args:
        name: of the file.
        parts: where documents come from.
        windows: `packed`: documents, each closed by the end-of-text token, are laid end to end and cut; `sampled`: one
            window at a random place of every document that is long enough, as SparseGPT and GPTQ do with C4.
        samples: number of windows.
        seq_len: tokens per window.
        seed: of the order of documents and the choice of windows.
        bos: whether windows begin with BOS: `auto` (as the tokenizer begins a text), `yes`, `no`.
        avoid: evaluation texts (see `llmprune --eval`); no window shares a run of 32 tokens with them.
    """

    name: str
    parts: tuple[Part, ...]
    windows: Literal["packed", "sampled"] = "packed"
    samples: int = 128
    seq_len: int = 2048
    seed: int = 0
    bos: str = "auto"
    avoid: tuple[str, ...] = ()


def known_recipes() -> list[str]:
    """The names of the recipes that come with this checkout."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def read_recipe(name: str, **changes: Any) -> Recipe:
    """A recipe by its file, or by its name in `calib/recipes`; settings that are not None replace its own.

    Raises:
        InputError: no such file, no TOML, a setting or value that means nothing.
    """
    path = Path(name) if name.endswith(".toml") else RECIPES / f"{name}.toml"
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{name} is no recipe: {error}", f"name a .toml file, or {', '.join(known_recipes())}"
        ) from error
    tables = raw.pop("source", [])
    if not isinstance(tables, list) or not tables:
        raise InputError(f"{path} has no [[source]]", "see calib/README.md")
    settings = raw | {key: value for key, value in changes.items() if value is not None}
    settings["avoid"] = tuple(settings.get("avoid", ()))
    parts = tuple(Part(**_checked(Part, table, path)) for table in tables)
    for part in parts:
        if bool(part.path) == bool(part.repo) or part.weight <= 0:
            raise InputError(f"{path}: a source needs either path or repo, and a weight above 0", "see calib/README.md")
    recipe = Recipe(path.stem, parts, **_checked(Recipe, settings, path))
    if recipe.windows not in ("packed", "sampled") or recipe.samples < 1 or recipe.seq_len < 2 or recipe.seed < 0:
        raise InputError(
            f"{path}: windows = {recipe.windows!r}, samples = {recipe.samples}, seq_len = {recipe.seq_len}, "
            f"seed = {recipe.seed} cannot be",
            'windows is "packed" or "sampled", samples at least 1, seq_len at least 2, seed at least 0',
        )
    if recipe.bos not in BOS:
        raise InputError(f"{path}: bos = {recipe.bos!r} cannot be", f"choose from {', '.join(BOS)}")
    return recipe


def _checked(kind: type, values: object, path: Path) -> dict[str, Any]:
    """The values, if every one is a setting of the right type."""
    if not isinstance(values, dict):
        raise InputError(f"{path}: {values!r} is no table", "see calib/README.md")
    defaults = {field.name: field.default for field in fields(kind) if field.name not in ("name", "parts")}
    for key, value in values.items():
        if key not in defaults:
            raise InputError(f"{path}: unknown setting {key!r}", f"known are {', '.join(defaults)}")
        wanted: Any = (int, float) if isinstance(defaults[key], float) else type(defaults[key])
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            raise InputError(f"{path}: {key} = {value!r} is of the wrong type", f"the default is {defaults[key]!r}")
    return values
