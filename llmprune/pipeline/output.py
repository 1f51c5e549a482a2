"""The output folder: its name, and what in its place may be replaced."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from llmprune.errors import InputError
from llmprune.job import Job
from llmprune.pruning.sparsity import Sparsity
from llmprune.reporting.html_report import PAGE
from llmprune.reporting.model_card import SPEED
from llmprune.reporting.report import FILE, PruneReport
from llmprune.runtime.files import is_occupied
from llmprune.runtime.foreign import reason, user_path
from llmprune.runtime.ownership import check_ours, regular_files
from llmprune.runtime.redact import base_name

ADDED = {FILE, PAGE, SPEED}
"""Files that other commands of ours write into a finished folder."""
OLDER = re.compile(
    r"README\.md|(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|"
    r"preprocessor_config)\.json|(tokenizer|spiece|sentencepiece\.bpe)\.model|vocab\.(txt|bpe)|merges\.txt|"
    r"chat_template\.(jinja|json)|(LICENSE|NOTICE|USE_POLICY)(\.\w+)?|"
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
)
"""Files of the folders that older versions wrote, whose reports do not name them."""


def workdir_of(out: Path) -> Path:
    """The working directory: beside the output, so that the final rename is atomic."""
    return out.with_name(f".{out.name}.partial")


def output_folder(job: Job, sparsity: Sparsity) -> Path:
    """The folder to be made, free or replaceable; one that may be the result of this job is left to `check_finished`.

    Raises:
        InputError: it cannot be made, or what is there is not to be replaced.
    """
    out = job.out
    if out is None:
        model = Path(job.model).stem if job.model.endswith(".gguf") else Path(job.model).name
        parts = [_spelled(sparsity.name) if sparsity else "", job.grid.name.replace(":", "") if job.grid else ""]
        out = Path("-".join([model or "model", job.label, *filter(None, parts)]))
    try:
        # A link stays a link: its target is replaced.
        out = Path(os.path.realpath(user_path(out)))
        user_path(workdir_of(out))
    except (InputError, OSError, ValueError) as error:
        raise InputError(
            f"--out {str(out)[:80]!r} is no usable path: {reason(error)}", "choose another --out"
        ) from error
    if os.path.ismount(out):
        raise InputError(f"{out} is a mount point, which cannot be renamed", f"use --out {out / 'model'}")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file", "choose another --out")
    check_ours(workdir_of(out))
    if is_occupied(out):
        report = read_owned(out)
        if not job.overwrite and not _may_be_of(report, job, sparsity):
            raise exists_already(out)
    return out


def _may_be_of(report: PruneReport, job: Job, sparsity: Sparsity) -> bool:
    """Whether a report may be of a job, as far as is known before the model is opened."""
    names = {job.model, base_name(job.model)}
    patterns = {report.sparsity.get("pattern"), report.sparsity.get("asked")}
    return report.model.get("name") in names and sparsity.name in patterns


def exists_already(out: Path, difference: str = "") -> InputError:
    """The error that a folder of another run is in the place of the output."""
    return InputError(
        f"{out} exists already{difference}",
        "add --overwrite to replace it when the new one is complete, or choose another --out",
    )


def read_owned(out: Path) -> PruneReport:
    """The report of a folder that holds nothing but what a run of ours wrote.

    Raises:
        InputError: it holds something else.
    """
    if not (out / FILE).exists():
        raise InputError(f"{out} exists and was not written by llmprune", "choose another --out; nothing was touched")
    report = PruneReport.read(out)
    if others := foreign_files(out, report):
        more = f" and {len(others) - 1} more" if others[1:] else ""
        raise InputError(
            f"{out} holds {others[0]!r}{more}, which no run of llmprune wrote",
            "move it away, or choose another --out; nothing was touched",
        )
    return report


def foreign_files(out: Path, report: PruneReport) -> list[str]:
    """What a folder holds beside the files that its report names; links are nobody's but the user's."""
    regular, others = regular_files(out)
    names = {path.relative_to(out).as_posix() for path in regular} - ADDED
    if report.files:
        names -= {str(name) for name in report.files}
    else:
        names = {name for name in names if not OLDER.fullmatch(name)}
    return sorted({*names, *(path.relative_to(out).as_posix() for path in others)})


def free_space(out: Path) -> tuple[Path, int]:
    """The nearest folder above an output folder that is there, and the free bytes of its disk.

    Raises:
        InputError: nothing can be written below it.
    """
    parent = out.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"cannot write below {parent}", "choose another --out")
    return parent, shutil.disk_usage(parent).free


def _spelled(name: str) -> str:
    """A pattern's name as part of a file name: `2of4`, `channels25pct`."""
    removals = re.sub(r"([a-z]+):", r"\1", name)
    return removals.replace(":", "of").replace("%", "pct").replace("+", "-")
