"""`python -m eval.peers`: our SparseGPT and another tool's, side by side on the same tokens, threads and evaluation.

One run makes (or takes) a frozen token file, prunes the model with both tools in turns, each in its own process and
its own environment, then evaluates the dense model and both results with one plain transformers computation. Both times
are set against the arithmetic no implementation avoids: one dense forward over the calibration tokens and the Grams.

The peers are LLM Compressor, and NVIDIA Model Optimizer (2:4 only).

The two whole-run times compare what each tool reports of itself, which excludes Python's imports. The peer's is its
pruning call alone (model in memory, nothing written); ours includes reading and writing the weights, which is to our
disadvantage. Wall seconds of both processes, imports and all, stand beside them.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eval import record
from llmprune.cli.shell import Parser, run_command, say, silence_libraries
from llmprune.cli.values import positive, seed, window
from llmprune.errors import InputError, PruneError

OURS = "llmprune"
OUR_PACKAGES = ("llmprune", "torch", "transformers", "safetensors", "numpy")
COMPARED = ("whole", "solve", "process", "peak_rss_mib")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
LOG_TAIL = 12
OUR_HINT = "see that `python -m llmprune --help` works in this environment"
QUIET = 0.1


@dataclass(frozen=True, slots=True)
class Peer:
    """Another tool: what it is called, the packages its environment needs, and the script that runs it there."""

    name: str
    packages: tuple[str, ...]
    script: str

    @property
    def worker(self) -> Path:
        """The script's path."""
        return Path(__file__).with_name(self.script)


PEERS = {
    "llmcompressor": Peer("LLM Compressor", ("llmcompressor==0.14.0.1", "torch==2.13.0"), "llmcompressor_worker.py"),
    "modelopt": Peer(
        "Model Optimizer",
        ("nvidia-modelopt==0.47.0", "torch==2.13.0", "transformers==5.23.0", "accelerate==1.15.0", "requests"),
        "modelopt_worker.py",
    ),
}


@dataclass(frozen=True, slots=True)
class Usage:
    """What a whole process took. `cores_elsewhere`: how many cores others kept busy meanwhile, 0 where it is quiet."""

    seconds: float
    cpu_seconds: float
    peak_rss_mib: float
    cores_elsewhere: float | None


@dataclass(frozen=True, slots=True)
class Run:
    """One pruning run of one tool: seconds it reports of itself, what its process used, the report's details."""

    tool: str
    whole: float
    solve: float
    solves: int
    process: Usage
    details: dict[str, Any]


def existing(text: str) -> Path:
    """A flag's value that names a file or folder, as an absolute path."""
    path = Path(text).expanduser().absolute()
    if not path.exists():
        raise argparse.ArgumentTypeError(f"{text} does not exist")
    return path


def build_parser() -> Parser:
    """The flags."""
    parser = Parser(
        prog="python -m eval.peers",
        description="Compare llmprune's SparseGPT with another tool's on the same tokens, threads and evaluation.",
        allow_abbrev=False,
    )
    add_shared(parser, samples=16, threads=2)
    add = parser.add_argument
    add("--eval", type=existing, required=True, help="text to measure perplexity on")
    add("--sparsity", default="2:4", help="2:4 prunes 2 of every 4 weights, 50%% half of each layer (default: 2:4)")
    add("--repeats", type=positive, default=1, help="runs of each tool, in turns; medians are reported (default: 1)")
    add("--tools", choices=("both", "peer", "ours"), default="both", help="which tools to run (default: both)")
    add("--peer", choices=tuple(PEERS), default="llmcompressor", help="the other tool (default: llmcompressor)")
    add("--peer-batch-size", type=positive, default=1, help="windows per forward of the peer (default: 1, its own)")
    add("--json", action="store_true", help="the whole result as JSON on stdout instead of the table")
    return parser


def add_shared(parser: Parser, *, samples: int, threads: int) -> None:
    """The flags of every comparison with a peer; `samples` and `threads` are defaults."""
    add = parser.add_argument
    add("--model", type=existing, required=True, help="folder of the dense model")
    add("--calib", type=existing, required=True, help="text to calibrate on, or a frozen token file (.safetensors)")
    add(
        "--samples", type=positive, default=samples, help="calibration windows taken from a text (default: %(default)s)"
    )
    add("--seq-len", type=window, default=512, help="tokens per calibration window (default: 512)")
    add("--seed", type=seed, default=0, help="choice of windows (default: 0)")
    add("--threads", type=positive, default=threads, help="CPU threads each tool may use (default: %(default)s)")
    add("--eval-context", type=window, default=1024, help="tokens per evaluation window (default: 1024)")
    add("--eval-windows", type=positive, default=12, help="windows, from the start of a text (default: 12)")
    add("--peer-python", type=existing, help="Python that has the peer (default: made once in the cache folder)")
    add("--out", type=Path, help="file that receives the whole result as JSON")
    add("--work", type=Path, help="folder for tokens, logs and models (default: a temporary one)")
    add("--debug", action="store_true", help="show the traceback of an error")


def report(message: str) -> None:
    """Progress, on stderr, so that stdout stays the result."""
    say(message, sys.stderr)


# Processes


def execute(command: Sequence[object], threads: int, log: Path, hint: str) -> tuple[str, Usage]:
    """Run a command from the repository root, without GPU or network; returns its stdout and what it used."""
    words = [str(word) for word in command]
    fixed = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment = {**os.environ, **fixed, **dict.fromkeys(THREAD_VARIABLES, str(threads))}
    output = log.with_suffix(".stdout")
    start, busy = time.perf_counter(), busy_seconds()
    with output.open("wb") as stdout, log.open("wb") as stderr:
        usage, code = wait(subprocess.Popen(words, cwd=record.ROOT, env=environment, stdout=stdout, stderr=stderr))
    seconds = time.perf_counter() - start
    if code:
        raise PruneError(f"{shlex.join(words)}\nended with status {code}; the end of what it said:\n{tail(log)}", hint)
    own = usage.ru_utime + usage.ru_stime
    others = None if busy is None else max(0.0, (busy_seconds() or 0.0) - busy - own) / seconds
    peak = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return output.read_text(encoding="utf-8"), Usage(seconds, own, peak, others)


def wait(process: subprocess.Popen[bytes]) -> tuple[Any, int]:
    """A process's own resource usage and its status; it does not outlive an interrupted study."""
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        process.kill()
        process.wait()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage, process.returncode


def busy_seconds() -> float | None:
    """CPU seconds this machine has worked since it started, those stolen by a hypervisor too; None off Linux."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, stat.read_text(encoding="ascii").split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def tail(log: Path) -> str:
    """The end of a log, indented; of a progress bar, which redraws itself after carriage returns, the last state."""
    lines = log.read_bytes().decode("utf-8", errors="replace").rstrip().split("\n")
    return "\n".join(f"    {line.rstrip().rsplit(chr(13), 1)[-1]}" for line in lines[-LOG_TAIL:])


# Tokens


def token_file(options: argparse.Namespace, work: Path) -> Path:
    """The frozen token file: the one given, or one made of the given text by `python -m calib`."""
    given: Path = options.calib
    if given.suffix == ".safetensors":
        return given
    report(f"tokens: {options.samples} windows of {options.seq_len} from {given}")
    out = work / "tokens.safetensors"
    command = [sys.executable, "-m", "calib", given, "--model", options.model, "--out", out]
    # As the peers calibrate, and as `judge` measures.
    command += ["--samples", options.samples, "--seq-len", options.seq_len, "--seed", options.seed, "--bos", "no"]
    execute(command, options.threads, work / "calib.log", "give --calib a frozen token file instead")
    return out


def describe_tokens(path: Path) -> dict[str, Any]:
    """Shape, hash and provenance of a token file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            tokens, metadata = file.get_tensor("tokens").astype("<i8"), file.metadata() or {}
        samples, length = tokens.shape
    except (SafetensorError, ValueError) as error:
        raise InputError(f"{path} is no frozen token file: {error}", "make one with `python -m calib`") from error
    digest = hashlib.sha256(tokens.tobytes()).hexdigest()
    provenance = json.loads(metadata.get("llmprune_tokens", "{}"))
    return {"samples": samples, "seq_len": length, "sha256": digest, "provenance": provenance}


# The two tools


def peer_python(peer: Peer, given: Path | None) -> Path:
    """The Python that has the peer: the one given, or that of an environment made once in the user's cache folder."""
    from llmprune.sources.demo import default_cache

    folder = default_cache() / peer.packages[0].replace("==", "-")
    python, ready = given or folder / "bin" / "python", folder / "ready"
    if given is None and not ready.exists():
        folder.mkdir(parents=True, exist_ok=True)
        log, hint = folder / "install.log", "make the environment yourself and name its Python with --peer-python"
        report(f"installing {' '.join(peer.packages)} into {folder} (once)")
        execute([sys.executable, "-m", "venv", folder], 1, log, hint)
        execute([python, "-m", "pip", "install", *peer.packages], 1, log, hint)
        ready.touch()
    return python


def run_peer(options: argparse.Namespace, wanted: str, tokens: Path, work: Path, python: Path) -> Run:
    """Prune with the peer, in its environment."""
    report, peer = work / "peer.json", PEERS[options.peer]
    command = [python, "-I", peer.worker, "--model", options.model, "--tokens", tokens, "--sparsity", wanted]
    command += ["--batch-size", options.peer_batch_size, "--threads", options.threads]
    command += ["--out", work / "peer", "--report", report]
    hint = f"--peer-python must name a Python that has {' and '.join(peer.packages)}"
    _, process = execute(command, options.threads, work / "peer.log", hint)
    found = json.loads(report.read_text(encoding="utf-8"))
    return Run(peer.name, found["seconds"]["oneshot"], found["seconds"]["solve"], found["solves"], process, found)


def run_ours(options: argparse.Namespace, wanted: str, tokens: Path, work: Path) -> Run:
    """Prune with llmprune, in the environment this study runs in."""
    command = [sys.executable, "-m", "llmprune", "--model", options.model, "--calib", tokens, "--sparsity", wanted]
    command += ["--method", "sparsegpt", "--threads", options.threads, "--out", work / "ours"]
    command += ["--no-eval", "--overwrite", "--json"]
    stdout, process = execute(command, options.threads, work / "ours.log", OUR_HINT)
    report = json.loads(stdout)
    details = {"seconds": report["seconds"], "versions": report["versions"]}
    whole, solve = (report["seconds"][stage] for stage in ("total", "solve"))
    return Run(OURS, whole, solve, len(report["layers"]), process, details)


def take_turns(tools: dict[str, Callable[[], Run]], repeats: int) -> list[Run]:
    """Run every tool once a repeat, in turns, so that a slow spell of the machine falls on all of them."""
    runs = []
    for repeat in range(repeats):
        for name, tool in tools.items():
            report(f"{name}: run {repeat + 1} of {repeats}")
            done = tool()
            busy = f"others kept {number(done.process.cores_elsewhere)} cores busy meanwhile"
            report(f"{name}: {done.whole:.1f} s whole, {done.solve:.1f} s of them in solves; {busy}")
            runs.append(done)
    return runs


# The report


def study(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The whole comparison: tokens, runs in turns, one evaluation, and what follows from them."""
    wanted = spelling(options.sparsity)
    if not (options.model / "config.json").is_file():
        raise InputError(f"--model {options.model} is no model folder", "name a folder that holds a config.json")
    path = token_file(options, work)
    tokens = describe_tokens(path)
    tools: dict[str, Callable[[], Run]] = {}
    peer = PEERS[options.peer]
    if options.tools != "ours":
        python = peer_python(peer, options.peer_python)
        tools[peer.name] = lambda: run_peer(options, wanted, path, work, python)
    if options.tools != "peer":
        tools[OURS] = lambda: run_ours(options, wanted, path, work)
    runs = take_turns(tools, options.repeats)
    folders = {"dense": options.model} | {name: work / {peer.name: "peer", OURS: "ours"}[name] for name in tools}
    found = evaluate(options, wanted, tokens, folders)
    middles = {name: medians([one for one in runs if one.tool == name]) for name in tools}
    return {
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "threads": options.threads,
        "sparsity": options.sparsity,
        "versions": {name: version(name) for name in OUR_PACKAGES},
        "tokens": tokens,
        "runs": [asdict(one) for one in runs],
        "medians": middles,
        "ratios": ratios(middles.get(peer.name), middles.get(OURS), found["floor"]["seconds"]),
        **found,
    }


def spelling(sparsity: str) -> str:
    """The pattern as both tools and `eval.judge` read it: `2:4`, or a share such as `0.5`."""
    from llmprune.pruning.pattern import parse_pattern

    pattern = parse_pattern(sparsity)
    return pattern.name if pattern.nm else str(float(pattern.sparsity))


def evaluate(
    options: argparse.Namespace, wanted: str, tokens: dict[str, Any], folders: dict[str, Path]
) -> dict[str, Any]:
    """The floor and the quality of every folder; only now is torch imported."""
    import torch

    from eval import judge

    torch.set_num_threads(options.threads)
    text = options.eval.read_text(encoding="utf-8")
    windows = judge.first_windows(text, options.model, options.eval_windows, options.eval_context)
    if len(windows) < 2:
        hint = "give a longer text or a smaller --eval-context; two windows are the least"
        raise InputError(f"{options.eval} has {len(windows)} windows of {options.eval_context} tokens", hint)
    report(f"evaluating on {len(windows)} windows of {options.eval_context}")
    quality = {name: asdict(judge.quality(judge.load_model(path), windows, wanted)) for name, path in folders.items()}
    floor = judge.floor(judge.load_model(options.model), tokens["samples"], tokens["seq_len"])
    return {"floor": floor, "quality": quality}


def medians(runs: list[Run]) -> dict[str, float]:
    """The middle of each compared number over the runs of one tool."""
    numbers = [(one.whole, one.solve, one.process.seconds, one.process.peak_rss_mib) for one in runs]
    return dict(zip(COMPARED, map(statistics.median, zip(*numbers, strict=True)), strict=True))


def ratios(peer: dict[str, float] | None, ours: dict[str, float] | None, floor: float) -> dict[str, float | None]:
    """How many times faster (or smaller) we are than the peer, and how far each tool is above the floor."""
    against = {f"{name}_peer_over_ours": peer[name] / ours[name] if peer and ours else None for name in COMPARED}
    floors = {
        "peer_over_floor": peer["whole"] / floor if peer else None,
        "ours_over_floor": ours["whole"] / floor if ours else None,
    }
    return {**against, **floors}


def version(package: str) -> str | None:
    """An installed package's version."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def number(value: float | None, digits: int = 1) -> str:
    """A number for the table, or a dash."""
    return "-" if value is None else f"{value:,.{digits}f}"


def table(result: dict[str, Any]) -> str:
    """The result as a small Markdown table and a sentence on each ratio."""
    lines = [
        "| | whole, s | in solves, s | process, s | peak MiB | perplexity | layers in pattern |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, quality in result["quality"].items():
        middles = result["medians"].get(name, {})
        times = [number(middles.get(key)) for key in ("whole", "solve", "process")]
        memory = number(middles.get("peak_rss_mib"), 0)
        perplexity = f"{number(quality['perplexity'], 2)} ± {number(quality['standard_error'], 2)}"
        cells = [name, *times, memory, perplexity, f"{quality['layers_in_pattern']}/{quality['layers']}"]
        lines.append(f"| {' | '.join(cells)} |")
    ratio, floor = result["ratios"], result["floor"]
    peer = next((name for name in result["quality"] if name not in ("dense", OURS)), "the peer")
    lines += [
        "",
        f"{peer} over {OURS}: whole run {number(ratio['whole_peer_over_ours'], 2)}, "
        f"solves {number(ratio['solve_peer_over_ours'], 2)}.",
        f"Floor (dense forward and Grams at {floor['flops_per_second'] / 1e9:.0f} GFLOP/s): {floor['seconds']:.1f} s; "
        f"{OURS} {number(ratio['ours_over_floor'], 2)} times that, {peer} {number(ratio['peer_over_floor'], 2)} times.",
    ]
    busy = max((one["process"]["cores_elsewhere"] or 0.0 for one in result["runs"]), default=0.0)
    if busy > QUIET:
        lines.append(
            f"Not a quiet machine: others kept up to {busy:.1f} cores busy during a run, so times are inflated."
        )
    return "\n".join(lines)


def recorded(
    program: str,
    options: argparse.Namespace,
    given: Sequence[str],
    study: Callable[[argparse.Namespace, Path], dict[str, Any]],
) -> dict[str, Any]:
    """The result of a study, run in a folder of its own and written where `--out` says."""
    silence_libraries(options.debug)
    stamp = record.stamp(["python", "-m", program, *given], options.out)
    with tempfile.TemporaryDirectory(prefix="llmprune-peers-") as scratch:
        work = (options.work or Path(scratch)).absolute()
        work.mkdir(parents=True, exist_ok=True)
        return record.write(options.out, stamp, study(options, work))


def compare(options: argparse.Namespace, given: Sequence[str]) -> int:
    """Run the study; write and print its result."""
    result = recorded("eval.peers", options, given, study)
    say(json.dumps(result, indent=2) if options.json else table(result))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    return run_command(build_parser(), lambda options: compare(options, given), given)


if __name__ == "__main__":
    raise SystemExit(main())
