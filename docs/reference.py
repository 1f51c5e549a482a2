"""`python docs/reference.py`: write the reference pages of the command line and of `Job` anew, from the code.

A setting is described once, in the metadata of its field (`llmprune/knobs.py`); other flags in `llmprune/cli/flags.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path

from llmprune.cli import flags
from llmprune.job import GROUPS, Job, knobs
from llmprune.knobs import REQUIRED, Knob
from llmprune.pruning.blocks import BLOCK_CRITERIA
from llmprune.pruning.criteria import CRITERIA
from llmprune.pruning.methods import METHODS, TableEntry

FOLDER = Path(__file__).parent / "reference"
MADE = "<!-- made by `python docs/reference.py` from the code: change that, not this page -->"
COMMANDS = {
    "verify": flags.verify_parser,
    "push": flags.push_parser,
    "pack": flags.pack_parser,
    "unpack": flags.unpack_parser,
    "export": flags.export_parser,
    "distill": flags.distill_parser,
    "report": flags.report_parser,
}


def cli() -> str:
    """The page of the command line."""
    parser = flags.build_parser()
    of_field = {each.name for each in parser.knobs}
    extra = {
        group.title: rows
        for group in parser._action_groups
        if (rows := [_action_row(action) for action in group._group_actions if action.dest not in of_field])
    }
    parts = ["# Command line", MADE, f"```\n{parser.format_usage().strip()}\n```", parser.description or ""]
    for group, title in GROUPS.items():
        rows = [_flag_row(each) for each in parser.knobs if each.group == group] + extra.pop(title, [])
        parts += [f"## {_title(title)}", _table(("flag", "default", "meaning"), rows)]
    for title, rows in extra.items():
        parts += [f"## {_title(title or '')}", _table(("flag", "default", "meaning"), rows)]
    parts += ["## Methods for weights", _entries(METHODS), "## Criteria for channels and heads", _entries(CRITERIA)]
    parts += ["## Criteria for blocks", _entries(BLOCK_CRITERIA)]
    parts += ["## Commands on a folder", *(part for make in COMMANDS.values() for part in _command(make()))]
    codes = flags.EXIT_CODES.partition("\n")[2].rstrip()
    return "\n\n".join([*parts, "## Exit codes", f"```\n{codes}\n```"]) + "\n"


def job() -> str:
    """The page of `Job`."""
    types = {field.name: str(field.type).replace(" | ", " or ") for field in fields(Job)}
    parts = ["# Job", MADE, INTRODUCTION]
    for group, title in GROUPS.items():
        rows = [_field_row(each, types[each.name]) for each in knobs() if each.group == group]
        parts += [f"## {_title(title)}", _table(("field", "type", "default", "values", "flag", "meaning"), rows)]
    earlier = ", ".join(f"`{old}` for `{each.name}`" for each in knobs() for old in each.earlier)
    return "\n\n".join([*parts, f"Earlier names that are still taken, with a warning: {earlier}."]) + "\n"


INTRODUCTION = """\
```python
from pathlib import Path

from llmprune import Job, ProgressBars, prune

report = prune(Job("demo", "2:4", effort="fast", samples=32, out=Path("pruned")), ProgressBars())
```

A job is a frozen dataclass; every field is a flag of the [command line](cli.md) and means the same there. A value
out of range raises `llmprune.InputError`, whose `hint` says what to do; so does `prune` for all that cannot be done,
before it writes anything. `llmprune.run.dry_run(job)` returns the plan with its estimates."""


def _flag_row(each: Knob) -> tuple[str, ...]:
    value = "" if each.is_switch else f" {each.metavar}"
    flag = each.flag.replace("--", "--[no-]", 1) if each.is_switch and each.default is None else each.flag
    return f"`{flag}{value}`", _default(each), flags.help_of(replace(each, default_text=""))


def _field_row(each: Knob, kind: str) -> tuple[str, ...]:
    values = each.range + (f" ({each.unit})" if each.unit else "")
    only = f" ({each.applies_to} only)" if each.applies_to else ""
    return f"`{each.name}`", f"`{kind}`", _default(each, python=True), values, f"`{each.flag}`", each.help + only


def _default(each: Knob, python: bool = False) -> str:
    if each.default is REQUIRED:
        return "required"
    if each.default is None:
        return each.default_text or "that of the effort"
    return f"`{each.default!r}`" if python else "" if each.is_switch else each.default_text or "none"


def _action_row(action: argparse.Action) -> tuple[str, ...]:
    value = str(action.metavar or "") or " or ".join(action.choices or ())
    told, _, default = (action.help or "").replace("%%", "%").partition(" (default: ")
    return f"`{' '.join(filter(None, (', '.join(action.option_strings), value)))}`", default.removesuffix(")"), told


def _command(parser: argparse.ArgumentParser) -> Iterable[str]:
    rows = [_action_row(action) for action in parser._actions if action.dest != "help"]
    return f"### {parser.prog}", parser.description or "", _table(("", "default", "meaning"), rows)


def _entries(entries: Mapping[str, TableEntry]) -> str:
    return _table(("name", "meaning"), [(f"`{name}`", entry.help) for name, entry in entries.items()])


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _title(text: str) -> str:
    return text[:1].upper() + text[1:].partition(" (")[0]


PAGES = {"cli.md": cli, "job.md": job}


def main() -> None:
    """Write the pages."""
    for name, make in PAGES.items():
        (FOLDER / name).write_text(make(), encoding="utf-8")
        sys.stderr.write(f"wrote docs/reference/{name}\n")


if __name__ == "__main__":
    main()
