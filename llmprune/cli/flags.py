"""The flags of every command, those of the main one made from the fields of `Job`; no torch is imported for them."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmprune.cli.guesses import ANSWERS, answer
from llmprune.cli.shell import Parser, say
from llmprune.cli.values import positive
from llmprune.distill_job import GROUPS as DISTILL_GROUPS
from llmprune.distill_job import DistillJob
from llmprune.export import EXPORTS, GGUF_TYPES
from llmprune.job import GROUPS, Job, knobs
from llmprune.knobs import REQUIRED, Knob
from llmprune.pruning.criteria import CRITERIA
from llmprune.pruning.methods import METHODS, TableEntry

EXIT_CODES = """\
exit codes:
  0    done
  1    the run failed, or `verify` found a violation; --out is as it was. Or the upload
       failed: the pruned folder is whole, and `llmprune push` repeats the upload
  2    bad input; --out is as it was
  130  interrupted; --out is as it was, or complete where the message says so
After 1 and 130, finished blocks are kept: the same command goes on from there.
"""
AS_IT_WAS = "interrupted; the output folder is as it was"
EXAMPLES = """\
examples:
  llmprune --model demo --sparsity 2:4 --samples 32 --seq-len 512
  llmprune --model ./my-llama --sparsity 50% --method wanda --calib notes.txt --eval wikitext2
  llmprune --model org/name --sparsity 4:8 --dry-run
  llmprune --model demo --sparsity channels:25%+heads:33%
  llmprune verify demo-balanced-2of4
  llmprune push demo-balanced-2of4 you/demo-2of4 --private
  llmprune export demo-balanced-2of4 gguf --type q8_0
"""


def version() -> str:
    """The installed version."""
    from importlib.metadata import version as installed

    return installed("llmprune")


class Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        say(f"llmprune {version()}")
        parser.exit()


def table(title: str, entries: Mapping[str, TableEntry]) -> str:
    """Names and their lines of help."""
    return "\n".join([f"{title}:", *(f"  {name:<12}{entry.help}" for name, entry in entries.items()), ""])


def build_parser(job: type[Job] = Job) -> Parser:
    """The main command's parser.

    Args:
        job: its fields become flags; what is not set is left out of the parsed options.
    """
    methods = table("methods for weights", METHODS) + "\n" + table("criteria for channels and heads", CRITERIA)
    parser = Parser(
        prog="llmprune",
        usage="llmprune --model MODEL --sparsity PATTERN [options]\n"
        "       llmprune quantize DIR GRID [options]\n       llmprune verify DIR [--sparsity PATTERN]\n"
        "       llmprune push DIR ORG/NAME [--private]\n"
        "       llmprune pack DIR [--out DIR]\n       llmprune unpack DIR [--out DIR]\n"
        "       llmprune export DIR gguf [--type TYPE]\n"
        "       llmprune distill DIR [--teacher MODEL] [--tokens N]\n"
        "       llmprune report DIR [--generate N]",
        description="Prune a Hugging Face language model block by block, after training, on one machine;\n"
        "measure its perplexity before and after; leave a folder that plain transformers loads.",
        epilog=f"{methods}\n{EXAMPLES}\n{EXIT_CODES}",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=28, width=100),
        allow_abbrev=False,
        add_help=False,
    )
    parser.knobs, parser.answers, parser.stray, parser.stopped = knobs(job), ANSWERS, answer, AS_IT_WAS
    groups = {name: parser.add_argument_group(title) for name, title in GROUPS.items()}
    for each in parser.knobs:
        add_knob(groups[each.group], each)
    _add_output(groups["output"])
    _add_hub(parser.add_argument_group("Hugging Face Hub"))
    _add_other(parser.add_argument_group("other"))
    return parser


def add_knob(group: argparse._ArgumentGroup, each: Knob) -> None:
    """Add the flag of a knob; its value stays text, which `Job` reads."""
    told: dict[str, Any] = {"dest": each.name, "default": argparse.SUPPRESS, "help": help_of(each).replace("%", "%%")}
    if not each.is_switch:
        told |= {"metavar": each.metavar, "required": each.default is REQUIRED}
        group.add_argument(each.flag, action="append" if each.repeatable else "store", **told)
    elif each.default is None:
        group.add_argument(each.flag, action=argparse.BooleanOptionalAction, **told)
    else:
        group.add_argument(each.flag, action="store_const", const=not each.default, **told)


def help_of(each: Knob) -> str:
    """The help line of a knob: meaning, patterns that it applies to, default."""
    notes = [f"{each.applies_to} only"] if each.applies_to else []
    notes += ["repeatable"] if each.repeatable else []
    notes += [f"default: {each.default_text}"] if each.default_text and not each.is_switch else []
    negation = "do not " if each.flag.startswith("--no-") else ""
    return negation + each.help + (f" ({'; '.join(notes)})" if notes else "")


def make_job(options: argparse.Namespace, arguments: Sequence[str], job: type[Job] = Job) -> Job:
    """The job that the parsed flags describe.

    Args:
        options: what `build_parser` has parsed.
        arguments: the words of the command line, for the report.
        job: the class that the parser was built for.

    Raises:
        InputError: a value is outside its range.
    """
    given = {each.name: getattr(options, each.name) for each in knobs(job) if hasattr(options, each.name)}
    return job(**given, command=shlex.join(["llmprune", *arguments]))


def _add_output(output: argparse._ArgumentGroup) -> None:
    output.add_argument(
        "--dry-run", action="store_true", help="show plan, sizes, and an estimate of memory and time; write nothing"
    )
    output.add_argument("--json", action="store_true", help="the result as JSON on stdout; words go to stderr")
    output.add_argument("--quiet", action="store_true", help="only warnings and errors")


def _add_hub(hub: argparse._ArgumentGroup) -> None:
    hub.add_argument(
        "--push-to-hub", metavar="ORG/NAME", help="upload the result; checked before the run (needs `hf auth login`)"
    )
    _add_destination(hub)


def _add_destination(hub: argparse._ActionsContainer) -> None:
    hub.add_argument("--private", action="store_true", help="make a repository that only its owners see")
    hub.add_argument("--hub-revision", metavar="BRANCH", help="branch to upload to (default: main)")


def _add_other(other: argparse._ArgumentGroup) -> None:
    other.add_argument("--debug", action="store_true", help="show the traceback of an error")
    other.add_argument("--version", action=Version, nargs=0, help="print the version")
    other.add_argument("-h", "--help", action="help", help="print this help")


def _command(name: str, description: str, folder: str = "a pruned folder") -> Parser:
    """A parser for `llmprune NAME DIR`."""
    parser = Parser(prog=f"llmprune {name}", description=description, allow_abbrev=False)
    parser.add_argument("dir", type=Path, metavar="DIR", help=folder)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def verify_parser() -> Parser:
    """Flags of `llmprune verify`."""
    parser = _command("verify", "Re-open a folder's files and check that every pruned layer holds the pattern.")
    _add_layers(parser)
    parser.add_argument("--scope", choices=("row", "layer"), help="of an unstructured pattern (default: layer)")
    parser.add_argument("--json", action="store_true", help="the result as JSON on stdout")
    return parser


def pack_parser() -> Parser:
    """Flags of `llmprune pack`."""
    parser = _command(
        "pack", "Write a compact copy of a pruned folder: of N:M layers the kept values and their positions."
    )
    parser.stopped = AS_IT_WAS
    _add_layers(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to make (default: DIR-packed)")
    parser.add_argument("--json", action="store_true", help="the result as JSON on stdout")
    return parser


def unpack_parser() -> Parser:
    """Flags of `llmprune unpack`."""
    parser = _command("unpack", "Write the plain folder that was packed, byte for byte.", "a packed folder")
    parser.stopped = AS_IT_WAS
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to make (default: DIR without -packed)")
    parser.add_argument("--json", action="store_true", help="the result as JSON on stdout")
    return parser


def export_parser() -> Parser:
    """Flags of `llmprune export`."""
    parser = _command("export", "Write a model as a file for another program: gguf for llama.cpp.", "a model folder")
    parser.stopped = "interrupted; the output file is as it was"
    parser.add_argument("format", choices=EXPORTS, help="format of the file")
    parser.add_argument(
        "--type", choices=GGUF_TYPES, help="type of the matrices (default: that of the weights, without loss)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="file to make (default: DIR-TYPE.gguf)")
    parser.add_argument("--overwrite", action="store_true", help="replace the file, if there is one")
    parser.add_argument("--json", action="store_true", help="the result as JSON on stdout")
    return parser


def report_parser() -> Parser:
    """Flags of `llmprune report`."""
    parser = _command("report", "Draw prune_report.html of a pruned folder anew, with generated text if asked for.")
    parser.add_argument(
        "--generate", type=positive, metavar="N",
        help="let the dense and the pruned model continue a few texts by N tokens; each is loaded whole",
    )  # fmt: skip
    parser.add_argument("--prompt", metavar="TEXT", action="append", help="text to continue; repeatable")
    parser.add_argument("--dense", metavar="MODEL", help="the dense model (default: what the report names)")
    return parser


def distill_parser() -> Parser:
    """Flags of `llmprune distill`, made from the fields of `DistillJob`."""
    parser = Parser(
        prog="llmprune distill",
        description="Train a pruned folder on the dense model's next-token distributions; zeros and sizes stay.",
        allow_abbrev=False,
    )
    parser.stopped, parser.knobs = AS_IT_WAS, knobs(DistillJob)
    parser.add_argument("folder", metavar="DIR", help="pruned folder, which stays as it is")
    groups = {name: parser.add_argument_group(title) for name, title in DISTILL_GROUPS.items()}
    for each in parser.knobs:
        if each.name != "folder":
            add_knob(groups[each.group], each)
    other = parser.add_argument_group("other")
    other.add_argument("--quiet", action="store_true", help="only warnings and errors")
    other.add_argument("--json", action="store_true", help="the report as JSON on stdout, all else on stderr")
    other.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def make_distill_job(options: argparse.Namespace, arguments: Sequence[str]) -> DistillJob:
    """The distillation that the parsed flags describe; arguments as of `make_job`."""
    given = {each.name: getattr(options, each.name) for each in knobs(DistillJob) if hasattr(options, each.name)}
    return DistillJob(**given, command=shlex.join(["llmprune", *arguments]))


def _add_layers(parser: Parser) -> None:
    """Add the flags that select layers and their pattern."""
    parser.add_argument(
        "--sparsity", metavar="PATTERN", help="pattern of its layers (default: what its prune_report.json says)"
    )
    parser.add_argument("--only", metavar="GLOB", action="append", default=[], help="take only layers that match")
    parser.add_argument("--skip", metavar="GLOB", action="append", default=[], help="leave out layers that match")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


def push_parser() -> Parser:
    """Flags of `llmprune push`."""
    parser = _command("push", "Upload a folder that llmprune wrote to the Hugging Face Hub; the folder stays as it is.")
    parser.add_argument("repo", metavar="ORG/NAME", help="repository; made if it is not there")
    _add_destination(parser)
    parser.add_argument("--json", action="store_true", help="the result as JSON on stdout")
    parser.add_argument("--quiet", action="store_true", help="only warnings and errors")
    return parser
