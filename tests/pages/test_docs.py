"""What the pages say is what was measured, and what can be run."""

from __future__ import annotations

import re
import shlex
from importlib import import_module

import pytest
from helpers import ROOT
from test_floors import FLOORS

from eval import record, sweep, tables
from llmprune.cli.flags import (
    EXIT_CODES,
    build_parser,
    export_parser,
    pack_parser,
    push_parser,
    report_parser,
    unpack_parser,
    verify_parser,
)
from llmprune.errors import InputError, Interrupted, PruneError
from llmprune.export import GGUF_TYPES, packed
from llmprune.export.gguf_families import FAMILIES
from llmprune.model import bounded, header
from llmprune.pruning.criteria import CRITERIA
from llmprune.pruning.methods import METHODS
from llmprune.pruning.recipe import EFFORTS, STRUCTURED_EFFORTS
from llmprune.runtime import foreign
from llmprune.sources import gguf_header, models

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
every_page = pytest.mark.parametrize("page", TEXTS)


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 140
    assert len(TEXTS["ARCHITECTURE.md"].splitlines()) <= 120


@pytest.mark.parametrize("page", record.PAGES)
def test_tables_are_made_from_the_recorded_results(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert "<!-- results: " in text
    assert tables.rewrite(text) == text


@every_page
def test_pages_without_such_tables_are_not_rewritten(page: str) -> None:
    assert ("<!-- results: " in TEXTS[page]) == (page in record.PAGES)


def test_what_the_readme_says_of_a_peer_was_recorded() -> None:
    found = re.search(r"\(([\d.]+ ± [\d.]+) beside ([\d.]+ ± [\d.]+), WikiText-2\) in ([\d.]+) times", README)
    assert found
    recorded = tables.render("peers-modelopt")
    assert re.search(rf"Model Optimizer \|.*\| {found[1]} \|", recorded)
    assert re.search(rf"llmprune \|.*\| {found[2]} \|", recorded)
    assert f"whole run {found[3]}" in recorded


def test_the_exit_codes_of_the_page_are_those_of_the_help_and_of_the_errors() -> None:
    page = (ROOT / "docs" / "reference" / "exit-codes.md").read_text(encoding="utf-8")
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}
    assert codes == {int(code) for code in re.findall(r"^  (\d+) ", EXIT_CODES, re.MULTILINE)}
    assert codes == {0} | {error.exit_code for error in (PruneError, InputError, Interrupted)}


def test_the_bounds_of_the_security_page_are_those_of_the_code() -> None:
    page = re.sub(r"\s+", " ", TEXTS["SECURITY.md"])
    for sentence in (
        f"configs up to {foreign.CONFIG_BYTES >> 20} MiB, other JSON up to {foreign.JSON_BYTES >> 20} MiB",
        f"tokenizers and templates up to {foreign.TEXT_BYTES >> 20} MiB",
        f"headers of safetensors up to {foreign.JSON_BYTES >> 20} MiB and {header.MOST_TENSORS:,} tensors",
        f"up to {models.MOST_OF_A_KIND:,} layers, heads, experts or labels",
        f"may take up to {bounded.MOST_BYTES >> 20} MiB (or 8 bytes for each stored weight)",
        f"up to {bounded.MOST_TENSORS} tensors for each stored one",
        f"may unpack to {packed.MOST_GROWTH} times its values",
        f"may announce {gguf_header.MOST_ITEMS:,} items",
    ):
        assert sentence in page, sentence


def test_the_first_commands_of_the_readme_do_everything() -> None:
    main, tests = re.findall(r"^pip install .*$", README, re.MULTILINE)[:2]
    assert main.startswith("pip install -c constraints.txt -e . && python -m llmprune --model demo --sparsity 2:4")
    assert tests == 'pip install -c constraints.txt -e ".[test]" && pytest -n auto'
    build_parser().parse_args(shlex.split(main.partition("llmprune ")[2]))


def test_every_command_of_the_pages_parses() -> None:
    parsers = {"verify": verify_parser, "pack": pack_parser, "unpack": unpack_parser, "report": report_parser}
    parsers |= {"push": push_parser, "export": export_parser, "--model": build_parser}
    usage, recorded = "docs/reference/cli.md", "eval/LOG.md"
    text = "\n".join(text for page, text in TEXTS.items() if page not in {usage, recorded})
    found = re.findall(rf"^[^`\n]*(?<![\w.])llmprune ({'|'.join(parsers)}) ([^#`\n]*)", text, re.MULTILINE)
    assert {command for command, _ in found} == parsers.keys()
    for command, arguments in found:
        parsers[command]().parse_args([*(["--model"] if command == "--model" else []), *shlex.split(arguments)])


@every_page
def test_code_on_the_pages_compiles(page: str) -> None:
    for code in re.findall(r"^```python.*?\n(.*?)^```", TEXTS[page], re.DOTALL | re.MULTILINE):
        compile(code, page, "exec")
    for module, names in re.findall(r"^from (llmprune[\w.]*) import (.*)$", TEXTS[page], re.MULTILINE):
        assert all(hasattr(import_module(module), name) for name in names.split(", "))


@every_page
def test_what_a_page_links_to_exists(page: str) -> None:
    for link in re.findall(r"\]\((?!http)([^)#\s]+)", re.sub(r"```.*?```", "", TEXTS[page], flags=re.DOTALL)):
        assert ((ROOT / page).parent / link).exists(), link


@every_page
def test_paths_of_the_package_that_a_page_names_exist(page: str) -> None:
    """`streaming/hooks.py`, `pruning/methods/`: from the checkout or from the package."""
    if page == "CHANGELOG.md":
        return
    for path in re.findall(r"`((?:[a-z_0-9]+/)+[a-z_0-9]*(?:\.(?:py|md))?)`", TEXTS[page]):
        places = [folder / path for folder in (ROOT, ROOT / "llmprune", ROOT / "llmprune/pruning")]
        assert any(place.exists() or place.with_suffix(".py").exists() for place in places), path


def test_the_rooms_of_the_architecture_stand_on_their_floors() -> None:
    rows = re.findall(r"^\| (\d+) \| `(\w+)(?:\.py)?` \| \S", TEXTS["ARCHITECTURE.md"], re.MULTILINE)
    floors = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms if not room.startswith("__")}
    assert {room: int(floor) for floor, room in rows} == floors


def test_the_guide_to_gguf_names_every_type() -> None:
    page = TEXTS["docs/guides/gguf.md"]
    assert all(re.search(rf"\b{name}\b", page) for name in FAMILIES)
    assert all(f"`{name}`" in page for name in GGUF_TYPES)


def test_the_readme_names_every_method_and_criterion() -> None:
    assert all(f"| `{name}`" in README for name in METHODS)
    assert all(f"`{name}`" in README for name in CRITERIA)


@pytest.mark.parametrize("effort", EFFORTS)
def test_the_pages_tell_what_an_effort_stands_for(effort: str) -> None:
    recipe, removal = EFFORTS[effort], STRUCTURED_EFFORTS[effort]
    permute = "yes" if recipe.permute else "no"
    stages = f"{recipe.targets} | {permute} | {recipe.ridge:g} | {recipe.self_calibration:g} | {recipe.reconstruct}"
    assert f"| `{effort}` | `{recipe.method}` | {stages} |" in README
    row = f"| `{effort}` | `{removal.criterion}` | {removal.targets} | {removal.reconstruct} |"
    assert row in TEXTS["docs/guides/channels-and-heads.md"]


def test_cells_may_be_named_one_by_one() -> None:
    cells = [{"method": "wanda", "sparsity": "2:4"}, {"method": "obs", "sparsity": "heads:33%"}]
    assert sweep.cells({"cells": cells, "fixed": {"model": "demo"}}) == cells


def test_a_grid_gives_every_combination() -> None:
    grid = {"grid": {"method": ["wanda", "sparsegpt"], "sparsity": ["2:4", "50%"]}}
    assert [tuple(settings.values()) for settings in sweep.cells(grid)] == [
        *(("wanda", "2:4"), ("wanda", "50%"), ("sparsegpt", "2:4"), ("sparsegpt", "50%")),
    ]
    assert sweep.flags({"model": "demo", "skip": ["a", "b"], "no_eval": True, "refit": False}) == [
        *("--model", "demo", "--skip", "a", "--skip", "b", "--no-eval", "--no-refit"),
    ]
