"""The command line: flags to a `Job`, a run to words; torch is imported inside the commands."""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune.cli.flags import (
    build_parser,
    distill_parser,
    export_parser,
    make_distill_job,
    make_job,
    pack_parser,
    push_parser,
    report_parser,
    unpack_parser,
    verify_parser,
)
from llmprune.cli.shell import INTERRUPTED, is_worker, run_command, say, silence_libraries
from llmprune.errors import InputError, Interrupted, complete, printable
from llmprune.progress import Progress
from llmprune.runtime.foreign import reading, user_path
from llmprune.sources.network import start_probe

if TYPE_CHECKING:
    from llmprune.export.upload import Destination
    from llmprune.job import Job


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["distill"]:
        return run_command(distill_parser(), lambda options: run_distill(options, arguments), arguments[1:])
    commands = {
        "verify": (verify_parser, run_verify),
        "push": (push_parser, run_push),
        "pack": (pack_parser, run_pack),
        "unpack": (unpack_parser, run_unpack),
        "export": (export_parser, run_export),
        "report": (report_parser, run_report),
    }
    if arguments[:1] == ["quantize"]:
        return run_command(build_parser(), lambda options: run_prune(options, arguments), as_pruning(arguments[1:]))
    if arguments and arguments[0] in commands:
        parser, command = commands[arguments[0]]
        return run_command(parser(), command, arguments[1:])
    return run_command(build_parser(), lambda options: run_prune(options, arguments), arguments)


def as_pruning(arguments: Sequence[str]) -> list[str]:
    """The arguments of the main command that `llmprune quantize DIR GRID ...` stands for."""
    words, named = list(arguments), ["--sparsity", "none"]
    for flag in ("--model", "--quantize"):
        if words and not words[0].startswith("-"):
            named += [flag, words.pop(0)]
    return named + words


def entry() -> int:
    """The process's way in: `main`, but an interruption keeps its exit code.

    Python remembers a KeyboardInterrupt that passed through a C extension's import, handled or not, and would end the
    process by the signal instead.
    """
    code = main()
    if code == INTERRUPTED:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def run_prune(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """The main command, the same in every process of a run; only the first one speaks."""
    from llmprune.cli.terminal import TerminalProgress

    try:
        job, where = make_job(options, arguments), destination(options)
        local = job.model == "demo" or job.model.endswith(".gguf") or user_path(job.model).exists()
    except InputError as error:
        error.silent = is_worker()
        raise
    words = sys.stderr if options.json else sys.stdout
    progress = Progress() if is_worker() else TerminalProgress(quiet=options.quiet)
    if not local:
        start_probe()
    progress.note("loading libraries")
    silence_libraries(options.debug)
    if where:
        from llmprune.export.upload import check_destination

        check_destination(where, job.model)
    if options.dry_run and is_worker():
        return 0
    facts, text = (plan if options.dry_run else run)(job, progress)
    if is_worker():
        return 0
    with nullcontext() if options.dry_run else complete(facts["out"]):
        if not options.quiet:
            say(text, words)
        if options.json:
            say(json.dumps(facts, indent=2))
        if where and not options.dry_run:
            address = send(Path(facts["out"]), where, progress, quiet=options.quiet)
            say(f"pushed to    {printable(address)}", words)
    return 0


def plan(job: Job, progress: Progress) -> tuple[dict[str, Any], str]:
    """The plan of a run, as JSON and as text."""
    from llmprune.cli.terminal import plan_text
    from llmprune.run import dry_run

    facts = dry_run(job, progress)
    return facts, plan_text(facts)


def run(job: Job, progress: Progress) -> tuple[dict[str, Any], str]:
    """Prune; the report, as JSON and as text."""
    from llmprune.cli.terminal import summary
    from llmprune.run import prune

    report = prune(job, progress)
    for text in report.warnings:
        progress.warn(text)
    return report.to_json(), summary(report)


def run_distill(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """`llmprune distill`, the same in every process of a run; only the first one speaks."""
    from llmprune.cli.terminal import TerminalProgress, distilled_text

    try:
        job = make_distill_job(options, arguments)
    except InputError as error:
        error.silent = is_worker()
        raise
    progress = Progress() if is_worker() else TerminalProgress(quiet=options.quiet)
    start_probe()
    progress.note("loading libraries")
    silence_libraries(options.debug)
    from llmprune.pipeline.distill.run import distill

    report = distill(job, progress)
    if is_worker():
        return 0
    with complete(report.out):
        if not options.quiet:
            say(distilled_text(report), sys.stderr if options.json else sys.stdout)
        if options.json:
            say(json.dumps(report.to_json(), indent=2))
    return 0


def destination(options: argparse.Namespace) -> Destination | None:
    """The upload destination, if there is one.

    Raises:
        InputError: a flag that means nothing without `--push-to-hub`.
    """
    if options.push_to_hub is None:
        flag = "--private" if options.private else "--hub-revision" if options.hub_revision else ""
        if flag:
            raise InputError(f"{flag} means nothing without --push-to-hub", "add --push-to-hub ORG/NAME")
        return None
    from llmprune.export.upload import Destination

    return Destination(options.push_to_hub, options.private, options.hub_revision)


def send(folder: Path, where: Destination, progress: Progress, quiet: bool) -> str:
    """Upload a finished folder; even an interruption says how to repeat that."""
    from huggingface_hub.utils import enable_progress_bars  # type: ignore[attr-defined]

    from llmprune.export.upload import upload

    if not quiet:
        enable_progress_bars()
    try:
        return upload(folder, where, progress)
    except KeyboardInterrupt as stop:
        raise Interrupted(
            "interrupted while uploading", f"nothing is lost; to repeat it: {where.command(folder)}"
        ) from stop


def run_push(options: argparse.Namespace) -> int:
    """`llmprune push`."""
    from llmprune.cli.terminal import TerminalProgress
    from llmprune.export.upload import Destination, check_destination, check_folder

    start_probe()
    silence_libraries(options.debug)
    where = Destination(options.repo, options.private, options.hub_revision)
    check_destination(where, check_folder(options.dir).model["name"])
    address = send(options.dir, where, TerminalProgress(quiet=options.quiet), options.quiet)
    if options.json:
        say(json.dumps({"repo": where.repo, "revision": where.revision or "main", "commit": address}, indent=2))
    elif not options.quiet:
        say(f"pushed to    {printable(address)}")
    return 0


def run_verify(options: argparse.Namespace) -> int:
    """`llmprune verify`."""
    silence_libraries(options.debug)
    from llmprune.export.verify import LayerSelection, verify_folder

    selection = LayerSelection(options.sparsity, options.scope, tuple(options.only), tuple(options.skip))
    result = verify_folder(options.dir, selection, options.trust_remote_code)
    if options.json:
        say(json.dumps(result.to_json(), indent=2))
    else:
        say(textwrap.dedent(result.text()).strip())
    return 1 if result.violations else 0


def run_pack(options: argparse.Namespace) -> int:
    """`llmprune pack`."""
    silence_libraries(options.debug)
    from llmprune.cli import terminal
    from llmprune.export.pack import pack

    report = pack(
        options.dir,
        options.out,
        sparsity=options.sparsity,
        only=tuple(options.only),
        skip=tuple(options.skip),
        trust_remote_code=options.trust_remote_code,
        progress=terminal.TerminalProgress(),
    )
    say(json.dumps(report.to_json(), indent=2) if options.json else report.text())
    return 0


def run_unpack(options: argparse.Namespace) -> int:
    """`llmprune unpack`."""
    silence_libraries(options.debug)
    from llmprune.cli import terminal
    from llmprune.export.pack import unpack

    out = unpack(options.dir, options.out, progress=terminal.TerminalProgress())
    say(json.dumps({"out": str(out)}, indent=2) if options.json else f"saved to {printable(out)}")
    return 0


def run_export(options: argparse.Namespace) -> int:
    """`llmprune export`."""
    silence_libraries(options.debug)
    from llmprune.cli import terminal
    from llmprune.export.gguf import export_gguf

    report = export_gguf(
        options.dir,
        options.out,
        kind=options.type,
        overwrite=options.overwrite,
        progress=terminal.TerminalProgress(),
    )
    say(json.dumps(report.to_json(), indent=2) if options.json else report.text())
    return 0


def run_report(options: argparse.Namespace) -> int:
    """`llmprune report`."""
    silence_libraries(options.debug)
    from llmprune.cli import terminal
    from llmprune.export.generations import PROMPTS, add_generations
    from llmprune.reporting.html_report import PAGE, report_page, write_report
    from llmprune.reporting.report import PruneReport

    report = PruneReport.read(options.dir)
    if options.generate:
        progress = terminal.TerminalProgress()
        add_generations(report, options.dir, options.generate, options.prompt or PROMPTS, options.dense, progress)
    with reading(f"the report in {options.dir} cannot be drawn", "prune again, or name another folder"):
        report_page(report)
    write_report(report, options.dir)
    say(f"saved to {printable(options.dir / PAGE)}")
    return 0
