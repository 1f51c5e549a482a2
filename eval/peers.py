"""`python -m eval.peers`: our SparseGPT and LLM Compressor's, side by side on the same tokens, threads and evaluation.

One run makes (or takes) a frozen token file, prunes the model with both tools in turns, each in its own process and
its own environment, then judges the dense model and both results with one plain transformers computation. Both times
are set against the arithmetic no implementation avoids: one dense forward over the calibration tokens and the Grams.

The two whole-run times compare what each tool reports of itself, which excludes Python's imports. The peer's is its
`oneshot` call alone (model in memory, nothing written); ours includes reading and writing the weights, which is to our
disadvantage. Wall seconds of both processes, imports and all, stand beside them.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

REPO = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).with_name("llmcompressor_worker.py")
PEER = "LLM Compressor"
OURS = "llmprune"
PEER_VERSION = "0.14.0.1"
PEER_PACKAGES = (f"llmcompressor=={PEER_VERSION}", "torch==2.13.0")
OUR_PACKAGES = ("llmprune", "torch", "transformers", "safetensors", "numpy")
COMPARED = ("whole", "solve", "process", "peak_rss_mib")
OUR_SECONDS = {"whole": "total", "solve": "solve", "forward": "forward", "gram": "gram", "write": "write"}
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
LOG_TAIL = 12
QUIET = 0.1


class StudyError(Exception):
    """Something the user can put right; the hint says how. `code` is the process's exit status."""

    def __init__(self, message: str, hint: str, code: int = 2) -> None:
        super().__init__(message)
        self.hint = hint
        self.code = code


@dataclass(frozen=True, slots=True)
class Sparsity:
    """What is asked of both tools: `pruned` of every `group` weights, or with no group a share of each layer."""

    text: str
    share: float
    pruned: int = 0
    group: int = 0

    @property
    def for_worker(self) -> str:
        """The spelling the peer's worker reads."""
        return f"{self.pruned}:{self.group}" if self.group else repr(self.share)

    def holds(self, weight: torch.Tensor) -> bool:
        """Whether at least the wanted weights are exactly zero: in every group, or in the layer up to 0.1 point."""
        zeros = weight == 0
        if not self.group:
            return float(zeros.float().mean()) >= self.share - 1e-3
        if weight.shape[1] % self.group:
            return False
        counts = zeros.reshape(weight.shape[0], -1, self.group).sum(dim=-1)
        return bool((counts >= self.pruned).all())


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
    solve: float | None
    solves: int | None
    process: Usage
    details: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Quality:
    """Perplexity of one folder with its standard error, and how many of its decoder layers hold the pattern."""

    perplexity: float
    standard_error: float
    window_losses: list[float]
    layers: int
    layers_in_pattern: int
    sparsity: float


def parse_sparsity(text: str) -> Sparsity:
    """Read "2:4" (prunes 2 of every 4) or "50%"."""
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        pruned, group = int(match[1]), int(match[2])
        if 0 < pruned < group:
            return Sparsity(text, pruned / group, pruned, group)
    elif match := re.fullmatch(r"(\d+(?:\.\d+)?)%", text):
        share = float(match[1]) / 100
        if 0 < share < 1:
            return Sparsity(text, share)
    raise StudyError(
        f"--sparsity {text!r} is no pattern", "use N:M with 0 < N < M, such as 2:4, or a share such as 50%"
    )


# -- processes -------------------------------------------------------------------------------------------------------


def say(message: str) -> None:
    """Progress, on stderr, so that stdout stays the result."""
    print(message, file=sys.stderr, flush=True)


def environment(threads: int) -> dict[str, str]:
    """The variables both tools run under: so many CPU threads, no GPU, no network."""
    fixed = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **fixed, **dict.fromkeys(THREAD_VARIABLES, str(threads))}


def tail(path: Path) -> str:
    """The end of a log, indented; of a progress bar, which redraws itself after carriage returns, the last state."""
    lines = path.read_bytes().decode("utf-8", errors="replace").rstrip().split("\n")
    return "\n".join(f"    {line.rstrip().rsplit(chr(13), 1)[-1]}" for line in lines[-LOG_TAIL:])


def run(command: Sequence[str], threads: int, log: Path, hint: str) -> tuple[str, Usage]:
    """Run a command from the repository root; returns its stdout and what it used."""
    output = log.with_suffix(".stdout")
    start, busy = time.perf_counter(), busy_seconds()
    with output.open("wb") as stdout, log.open("wb") as stderr:
        try:
            process = subprocess.Popen(command, cwd=REPO, env=environment(threads), stdout=stdout, stderr=stderr)
        except OSError as error:
            raise StudyError(f"cannot start {command[0]}: {error.strerror}", hint) from error
        usage = wait(process)
    seconds = time.perf_counter() - start
    if process.returncode:
        said = f"{shlex.join(command)}\nended with status {process.returncode}; the end of what it said:\n{tail(log)}"
        raise StudyError(said, hint, code=1)
    own = usage.ru_utime + usage.ru_stime
    others = None if busy is None else max(0.0, (busy_seconds() or 0.0) - busy - own) / seconds
    peak = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return output.read_text(encoding="utf-8"), Usage(seconds, own, peak, others)


def wait(process: subprocess.Popen[bytes]) -> Any:
    """Wait for a process and return its own resource usage; it does not outlive an interrupted study."""
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        process.kill()
        process.wait()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage


def busy_seconds() -> float | None:
    """CPU seconds this machine has worked since it started, those stolen by a hypervisor too; None off Linux."""
    try:
        ticks = [int(word) for word in Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = ticks
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


# -- calibration tokens ----------------------------------------------------------------------------------------------


def token_file(arguments: argparse.Namespace, work: Path) -> Path:
    """The frozen token file: the one given, or one made of the given text by `python -m calib`."""
    if arguments.calib.suffix == ".safetensors":
        return Path(arguments.calib)
    out = work / "tokens.safetensors"
    size = ["--samples", str(arguments.samples), "--seq-len", str(arguments.seq_len), "--seed", str(arguments.seed)]
    command = [sys.executable, "-m", "calib", str(arguments.calib), "--model", str(arguments.model), *size]
    say(f"tokens: {arguments.samples} windows of {arguments.seq_len} from {arguments.calib}")
    hint = "give --calib a frozen token file instead"
    run([*command, "--out", str(out)], arguments.threads, work / "calib.log", hint)
    return out


def describe_tokens(path: Path) -> dict[str, Any]:
    """Shape, hash and provenance of a token file, read without torch (safetensors: length, JSON header, bytes)."""
    raw = path.read_bytes()
    try:
        size = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + size])
        entry = header["tokens"]
        samples, length = entry["shape"]
        begin, end = entry["data_offsets"]
        dtype = entry["dtype"]
    except (ValueError, KeyError, TypeError) as error:
        raise StudyError(f"{path} is no frozen token file", "make one with `python -m calib`") from error
    if dtype != "I64":
        raise StudyError(f"{path} holds {dtype} tokens, not int64", "make one with `python -m calib`")
    data = raw[8 + size + begin : 8 + size + end]
    provenance = json.loads(header.get("__metadata__", {}).get("llmprune_tokens", "{}"))
    return {"samples": samples, "seq_len": length, "sha256": hashlib.sha256(data).hexdigest(), "provenance": provenance}


# -- the two tools ---------------------------------------------------------------------------------------------------


def peer_python(given: Path | None) -> Path:
    """The Python that has the peer: the one given, or that of an environment made once in the user's cache folder."""
    if given is not None:
        return given
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "llmprune" / f"llmcompressor-{PEER_VERSION}"
    python = folder / "bin" / "python"
    ready = folder / "ready"
    if not ready.exists():
        folder.mkdir(parents=True, exist_ok=True)
        log, hint = folder / "install.log", "make the environment yourself and name its Python with --peer-python"
        say(f"installing {' '.join(PEER_PACKAGES)} into {folder} (once)")
        run([sys.executable, "-m", "venv", str(folder)], 1, log, hint)
        run([str(python), "-m", "pip", "install", *PEER_PACKAGES], 1, log, hint)
        ready.touch()
    return python


def run_peer(arguments: argparse.Namespace, tokens: Path, work: Path, python: Path) -> Run:
    """Prune with the peer, in its environment."""
    report = work / "peer.json"
    options = {
        "--model": arguments.model,
        "--tokens": tokens,
        "--sparsity": arguments.sparsity.for_worker,
        "--batch-size": arguments.peer_batch_size,
        "--threads": arguments.threads,
        "--out": work / "peer",
        "--report": report,
    }
    command = [str(python), "-I", str(WORKER), *flat(options)]
    hint = f"--peer-python must name a Python that has {' and '.join(PEER_PACKAGES)}"
    _, process = run(command, arguments.threads, work / "peer.log", hint)
    found = json.loads(report.read_text(encoding="utf-8"))
    seconds = found["seconds"]
    return Run(PEER, seconds["oneshot"], seconds["solve"], found["solves"], process, found)


def run_ours(arguments: argparse.Namespace, tokens: Path, work: Path) -> Run:
    """Prune with llmprune, in the environment this study runs in."""
    options = {
        "--model": arguments.model,
        "--calib": tokens,
        "--sparsity": arguments.sparsity.text,
        "--method": "sparsegpt",
        "--threads": arguments.threads,
        "--out": work / "ours",
    }
    command = [sys.executable, "-m", "llmprune", *flat(options), "--no-eval", "--overwrite", "--json"]
    hint = "see that `python -m llmprune --help` works in this environment"
    stdout, process = run(command, arguments.threads, work / "ours.log", hint)
    try:
        return our_run(json.loads(stdout), process)
    except (ValueError, KeyError, TypeError) as error:
        raise StudyError(
            f"llmprune's --json report reads differently: {error!r}", "adapt eval.peers.our_run", 1
        ) from error


def our_run(report: dict[str, Any], process: Usage) -> Run:
    """What llmprune's own JSON report says of a run; the one place that knows that report's keys."""
    reported: dict[str, float] = report["seconds"]
    seconds = {name: reported[key] for name, key in OUR_SECONDS.items() if key in reported}
    layers = report.get("layers")
    solves = len(layers) if layers is not None else None
    details = {"seconds": reported, "versions": report.get("versions", {})}
    return Run(OURS, seconds["whole"], seconds.get("solve"), solves, process, details)


def flat(options: dict[str, Any]) -> list[str]:
    """Flags and their values as one argument list."""
    return [str(word) for pair in options.items() for word in pair]


def take_turns(tools: dict[str, Callable[[], Run]], repeats: int) -> list[Run]:
    """Run every tool once a repeat, in turns, so that a slow spell of the machine falls on all of them."""
    runs = []
    for repeat in range(repeats):
        for name, tool in tools.items():
            say(f"{name}: run {repeat + 1} of {repeats}")
            done = tool()
            busy = f"others kept {number(done.process.cores_elsewhere)} cores busy meanwhile"
            say(f"{name}: {done.whole:.1f} s whole, {number(done.solve)} s of them in solves; {busy}")
            runs.append(done)
    return runs


# -- evaluation, the same few lines for every folder -----------------------------------------------------------------


def evaluation_windows(arguments: argparse.Namespace) -> torch.Tensor:
    """The first windows of the text, tokenised once as a whole without special tokens: (windows, context)."""
    import torch
    from transformers import AutoTokenizer

    text = arguments.eval.read_text(encoding="utf-8")
    tokenizer: Any = AutoTokenizer.from_pretrained(arguments.model)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    count = min(arguments.eval_windows, len(ids) // arguments.eval_context)
    if count < 2:
        hint = "give a longer text or a smaller --eval-context; two windows are the least"
        raise StudyError(f"{arguments.eval} has {len(ids)} tokens, too few", hint)
    return torch.tensor(ids[: count * arguments.eval_context]).reshape(count, arguments.eval_context)


def load_model(folder: Path) -> Any:
    """The folder's model in float32, by stock transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def decoder_linears(model: Any) -> dict[str, torch.nn.Linear]:
    """Every linear layer but the output head."""
    import torch

    head = model.get_output_embeddings()
    modules = model.named_modules()
    return {name: module for name, module in modules if isinstance(module, torch.nn.Linear) and module is not head}


def window_losses(model: Any, windows: torch.Tensor) -> list[float]:
    """Mean next-token cross-entropy of each window, every window read alone."""
    import torch

    losses = []
    with torch.inference_mode():
        for window in windows:
            logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
            losses.append(float(torch.nn.functional.cross_entropy(logits, window[1:])))
    return losses


def judge(model: Any, windows: torch.Tensor, sparsity: Sparsity) -> Quality:
    """Perplexity, exp of the mean loss; its standard error by the delta method; the pattern of every layer."""
    losses = window_losses(model, windows)
    perplexity = math.exp(statistics.fmean(losses))
    error = perplexity * statistics.stdev(losses) / math.sqrt(len(losses))
    weights = [layer.weight.detach() for layer in decoder_linears(model).values()]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    held = sum(sparsity.holds(weight) for weight in weights)
    return Quality(perplexity, error, losses, len(weights), held, zeros / sum(weight.numel() for weight in weights))


# -- the floor: arithmetic no implementation avoids ------------------------------------------------------------------


def layer_inputs(model: Any) -> tuple[list[tuple[int, int]], list[int]]:
    """(in, out) of every decoder linear layer, and the width of every distinct tensor that feeds them."""
    import torch

    inputs: list[torch.Tensor] = []
    layers = decoder_linears(model).values()
    hooks = [layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0])) for layer in layers]
    with torch.inference_mode():
        model(input_ids=torch.zeros((1, 8), dtype=torch.int64), use_cache=False)
    for hook in hooks:
        hook.remove()
    distinct = {id(tensor): tensor.shape[-1] for tensor in inputs}
    return [(layer.in_features, layer.out_features) for layer in layers], list(distinct.values())


def flops(model: Any, samples: int, length: int) -> dict[str, float]:
    """Of one dense forward through the blocks (attention causal, so half), and of one symmetric Gram an input."""
    shapes, widths = layer_inputs(model)
    config = model.config
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    pairs = samples * length * (length + 1) / 2
    return {
        "linear": 2.0 * samples * length * sum(inputs * outputs for inputs, outputs in shapes),
        "attention": 4.0 * pairs * config.num_hidden_layers * heads * head_size,
        "gram": float(samples * length * sum(width * (width + 1) for width in widths)),
    }


def seconds_of(action: Callable[[], object], repeats: int = 7) -> float:
    """Median seconds of an action, after one warm-up."""
    action()
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def matmul_rate(shapes: set[tuple[int, int]], rows: int) -> float:
    """This machine's float32 FLOP a second: the median over the model's own layer shapes, `rows` tokens at a time."""
    import torch

    rates = []
    for inputs, outputs in sorted(shapes):
        left, right = torch.randn(rows, inputs), torch.randn(inputs, outputs)
        seconds = seconds_of(lambda left=left, right=right: left @ right)  # type: ignore[misc]
        rates.append(2.0 * rows * inputs * outputs / seconds)
    return statistics.median(rates)


def floor(model: Any, tokens: dict[str, Any]) -> dict[str, Any]:
    """Seconds that this machine's matrix products need for the unavoidable arithmetic."""
    counts = flops(model, tokens["samples"], tokens["seq_len"])
    shapes, _ = layer_inputs(model)
    rate = matmul_rate(set(shapes), min(4096, tokens["samples"] * tokens["seq_len"]))
    return {"flops": counts, "flops_per_second": rate, "seconds": sum(counts.values()) / rate}


# -- the report ------------------------------------------------------------------------------------------------------


def evaluate(arguments: argparse.Namespace, tokens: dict[str, Any], folders: dict[str, Path]) -> dict[str, Any]:
    """The floor and the quality of every folder, the dense model first; only now is torch imported."""
    import torch
    from transformers.utils import logging

    quiet: Any = logging
    quiet.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    windows = evaluation_windows(arguments)
    say(f"evaluating on {len(windows)} windows of {arguments.eval_context}")
    dense = load_model(arguments.model)
    quality = {"dense": judge(dense, windows, arguments.sparsity)}
    bound = floor(dense, tokens)
    del dense
    for name, folder in folders.items():
        quality[name] = judge(load_model(folder), windows, arguments.sparsity)
    return {"floor": bound, "quality": {name: asdict(found) for name, found in quality.items()}}


def medians(runs: Sequence[Run], tool: str) -> dict[str, float | None]:
    """The middle of each number over a tool's runs; None where it is not known of every run."""
    return {name: middle([measured(one)[name] for one in runs if one.tool == tool]) for name in COMPARED}


def measured(one: Run) -> dict[str, float | None]:
    """The numbers of a run that are compared: seconds reported, seconds of the process, peak memory."""
    process = one.process
    numbers = (one.whole, one.solve, process.seconds, process.peak_rss_mib)
    return dict(zip(COMPARED, numbers, strict=True))


def middle(values: Sequence[float | None]) -> float | None:
    """Median, or None if any value is missing."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known and len(known) == len(values) else None


def ratios(middles: dict[str, dict[str, float | None]], bound: float) -> dict[str, float | None]:
    """How many times faster (or smaller) we are than the peer, and how far each tool is above the floor."""
    peer, ours = middles.get(PEER, {}), middles.get(OURS, {})
    against = {f"{name}_peer_over_ours": over(peer.get(name), ours.get(name)) for name in COMPARED}
    floors = {f"{tool}_over_floor": over(mine.get("whole"), bound) for tool, mine in (("peer", peer), ("ours", ours))}
    return {**against, **floors}


def over(top: float | None, bottom: float | None) -> float | None:
    """A ratio, or None where a part of it is missing."""
    return top / bottom if top is not None and bottom else None


def commit() -> str | None:
    """The checkout's commit, marked where there are uncommitted changes; None where there is none."""

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *words], cwd=REPO, capture_output=True, text=True, check=False)

    try:
        head, changes = git("rev-parse", "--verify", "-q", "HEAD"), git("status", "--porcelain")
    except OSError:
        return None
    return head.stdout.strip() + ("+changes" if changes.stdout else "") if not head.returncode else None


def version(package: str) -> str | None:
    """An installed package's version."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def study(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The whole comparison: tokens, runs in turns, one evaluation, and what follows from them."""
    path = token_file(arguments, work)
    tokens = describe_tokens(path)
    tools: dict[str, Callable[[], Run]] = {}
    if arguments.tools != "ours":
        python = peer_python(arguments.peer_python)
        tools[PEER] = lambda: run_peer(arguments, path, work, python)
    if arguments.tools != "peer":
        tools[OURS] = lambda: run_ours(arguments, path, work)
    runs = take_turns(tools, arguments.repeats)
    folders = {name: work / {PEER: "peer", OURS: "ours"}[name] for name in tools}
    found = evaluate(arguments, tokens, folders)
    middles = {name: medians(runs, name) for name in tools}
    return {
        "command": shlex.join(["python", "-m", "eval.peers", *arguments.given]),
        "commit": commit(),
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "threads": arguments.threads,
        "sparsity": arguments.sparsity.text,
        "versions": {name: version(name) for name in OUR_PACKAGES},
        "tokens": tokens,
        "runs": [asdict(one) for one in runs],
        "medians": middles,
        "ratios": ratios(middles, found["floor"]["seconds"]),
        **found,
    }


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
    ratio, bound = result["ratios"], result["floor"]
    lines += [
        "",
        f"{PEER} over {OURS}: whole run {number(ratio.get('whole_peer_over_ours'), 2)}, "
        f"solves {number(ratio.get('solve_peer_over_ours'), 2)}.",
        f"Floor (dense forward and Grams at {bound['flops_per_second'] / 1e9:.0f} GFLOP/s): {bound['seconds']:.1f} s; "
        f"{OURS} {number(ratio['ours_over_floor'], 2)} times that, {PEER} {number(ratio['peer_over_floor'], 2)} times.",
    ]
    busy = max((one["process"]["cores_elsewhere"] or 0.0 for one in result["runs"]), default=0.0)
    if busy > QUIET:
        lines.append(
            f"Not a quiet machine: others kept up to {busy:.1f} cores busy during a run, so times are inflated."
        )
    return "\n".join(lines)


# -- command line ----------------------------------------------------------------------------------------------------


def positive(text: str) -> int:
    """An argument type: a whole number above zero."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above zero")
    return value


def parser() -> argparse.ArgumentParser:
    """The study's flags."""
    flags = argparse.ArgumentParser(
        prog="python -m eval.peers",
        description="Compare llmprune's SparseGPT with LLM Compressor's on the same tokens, threads and evaluation.",
    )
    add = flags.add_argument
    add("--model", type=Path, required=True, help="Folder of the dense model in Hugging Face form.")
    add("--calib", type=Path, required=True, help="Text to calibrate on, or a frozen token file (.safetensors).")
    add("--eval", type=Path, required=True, help="Text to measure perplexity on.")
    add("--sparsity", default="2:4", help="Pattern: 2:4 prunes 2 of every 4 weights, 50%% half of each layer.")
    add("--samples", type=positive, default=16, help="Calibration windows taken from a text.")
    add("--seq-len", type=positive, default=512, help="Tokens a calibration window.")
    add("--seed", type=int, default=0, help="Seed that picks the calibration windows.")
    add("--threads", type=positive, default=2, help="CPU threads each tool may use.")
    add("--repeats", type=positive, default=1, help="Runs of each tool, taken in turns; medians are reported.")
    add("--eval-context", type=positive, default=1024, help="Tokens an evaluation window.")
    add("--eval-windows", type=positive, default=12, help="Evaluation windows, from the start of the text.")
    add("--tools", choices=("both", "peer", "ours"), default="both", help="Which tools to run.")
    add("--peer-python", type=Path, help="Python that has LLM Compressor; by default made in your cache folder.")
    add("--peer-batch-size", type=positive, default=1, help="Windows a forward pass of the peer; 1 is its own default.")
    add("--out", type=Path, help="File that receives the whole result as JSON.")
    add("--work", type=Path, help="Folder for the token file, logs and pruned models; by default a temporary one.")
    add("--json", action="store_true", help="Print the whole result as JSON instead of the table.")
    return flags


def check(arguments: argparse.Namespace) -> None:
    """Everything that can be refused before the first minute is spent; paths become absolute."""
    arguments.sparsity = parse_sparsity(arguments.sparsity)
    if not (arguments.model / "config.json").is_file():
        raise StudyError(f"--model {arguments.model} is no model folder", "name a folder that holds a config.json")
    for name in ("calib", "eval"):
        if not getattr(arguments, name).is_file():
            raise StudyError(f"--{name} {getattr(arguments, name)} does not exist", "name an existing file")
    if arguments.peer_python is not None and not arguments.peer_python.is_file():
        raise StudyError(f"--peer-python {arguments.peer_python} does not exist", "name its environment's bin/python")
    for name in ("model", "calib", "eval", "out", "work", "peer_python"):
        if (path := getattr(arguments, name)) is not None:
            setattr(arguments, name, path.absolute())


@contextmanager
def work_folder(given: Path | None) -> Iterator[Path]:
    """The folder given, or a temporary one that is removed at the end."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given
    else:
        with tempfile.TemporaryDirectory(prefix="llmprune-peers-") as folder:
            yield Path(folder)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study; returns the exit status: 0, 2 for bad input, 1 for a tool that failed."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = parser().parse_args(given)
    arguments.given = given
    try:
        check(arguments)
        with work_folder(arguments.work) as work:
            result = study(arguments, work)
    except StudyError as error:
        say(f"error: {error}\nhint: {error.hint}")
        return error.code
    text = json.dumps(result, indent=2)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text + "\n", encoding="utf-8")
    print(text if arguments.json else table(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
