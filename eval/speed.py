"""How fast is a pruned model beside the dense one? `python -m eval.speed DENSE PRUNED [--json FILE]`

Each model runs in a process of its own, through plain transformers. The processes live side by side and take turns, so
that whatever else the machine does meets both; what is told is the ratio within a turn, its median and its spread.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.sweep import commit

MEASURES = {
    "prefill": "tokens/s",
    "decode": "tokens/s",
}


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(prog="python -m eval.speed", description=__doc__.split("\n\n")[0])
    parser.add_argument("dense", type=Path, metavar="DENSE", help="model folder")
    parser.add_argument("pruned", type=Path, metavar="PRUNED", help="model folder")
    parser.add_argument("--repeats", type=int, default=9, metavar="N", help="turns of each model (default: 9)")
    parser.add_argument("--prompt", type=int, default=512, metavar="N", help="tokens of the prompt (default: 512)")
    parser.add_argument("--new", type=int, default=32, metavar="N", help="tokens to generate (default: 32)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="sequences at a time (default: 1)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps (default: cpu)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure two folders in turns."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--worker"]:
        serve(json.loads(arguments[1]))
        return 0
    options = build_parser().parse_args(arguments)
    for folder in (options.dense, options.pruned):
        if not (folder / "config.json").exists():
            print(f"error: {folder} has no config.json\nhint: name two model folders", file=sys.stderr)
            return 2
    figures = compare(options)
    print(text(figures))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """All figures, with the ratios of pruned over dense."""
    settings = {key: getattr(options, key) for key in ("prompt", "new", "batch", "threads", "device")}
    with Worker(options.dense, settings) as dense, Worker(options.pruned, settings) as pruned:
        for worker in (dense, pruned):
            worker.turn()  # warm-up
        turns = [(dense.turn(), pruned.turn()) for _ in range(options.repeats)]
        ends = {"dense": dense.end(), "pruned": pruned.end()}
    models = {
        name: {
            "folder": str(folder),
            **{measure: statistics.median(turn[at][measure] for turn in turns) for measure in MEASURES},
            "size": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
            **ends[name],
        }
        for at, (name, folder) in enumerate((("dense", options.dense), ("pruned", options.pruned)))
    }
    ratios = {measure: spread([pruned[measure] / dense[measure] for dense, pruned in turns]) for measure in MEASURES}
    promised = models["dense"]["flops"] / models["pruned"]["flops"]
    return {
        **models,
        "speedup": ratios,
        "promised": promised,
        "kept": (ratios["prefill"]["median"] - 1) / (promised - 1) if promised != 1 else None,
        "settings": {**settings, "repeats": options.repeats},
        "commit": commit(),
        "command": shlex.join(["python", "-m", "eval.speed", *sys.argv[1:]]),
        "machine": {"processor": platform.machine(), "cpus": os.cpu_count()},
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": middle, "low": low, "high": high}


def rows(figures: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """What is measured, of the dense model, of the pruned one, and the ratio."""
    dense, pruned = figures["dense"], figures["pruned"]
    found = [("", "dense", "pruned", "pruned / dense")]
    for measure, unit in MEASURES.items():
        ratio = figures["speedup"][measure]
        told = f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"
        found.append((f"{measure}, {unit}", f"{dense[measure]:.1f}", f"{pruned[measure]:.1f}", told))
    for key, name in (("size", "size, MiB"), ("memory", "peak memory, MiB")):
        told = f"{pruned[key] / dense[key]:.3f}"
        found.append((name, f"{dense[key] / 2**20:.0f}", f"{pruned[key] / 2**20:.0f}", told))
    found.append(("prefill, GFLOP", f"{dense['flops'] / 1e9:.1f}", f"{pruned['flops'] / 1e9:.1f}", ""))
    return found


def promise(figures: dict[str, Any]) -> str:
    """What the operations promise, and how much of it is there."""
    kept = "" if figures["kept"] is None else f"; {figures['kept']:.0%} of that gain was measured"
    return f"by its operations, prefill should be {figures['promised']:.3f} times as fast{kept}"


def text(figures: dict[str, Any]) -> str:
    """A table for people."""
    return "\n".join([*(f"{a:<20} {b:>10} {c:>10}  {d}" for a, b, c, d in rows(figures)), promise(figures)])


def table(figures: dict[str, Any]) -> str:
    """The same in Markdown."""
    head, *rest = ("| " + " | ".join(row) + " |" for row in rows(figures))
    said = promise(figures)
    return "\n".join([head, "|---|--:|--:|--:|", *rest, "", f"{said[0].upper()}{said[1:]}."])


class Worker:
    """A process that holds one model and times it when asked.

    Args:
        folder: the model.
        settings: what to time.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        task = json.dumps({"folder": str(folder), **settings})
        command = [sys.executable, "-m", "eval.speed", "--worker", task]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def turn(self) -> dict[str, float]:
        """Time it once: tokens per second."""
        return self._ask("turn")

    def end(self) -> dict[str, float]:
        """Peak memory (bytes) and operations of a prefill."""
        return self._ask("end")

    def _ask(self, what: str) -> dict[str, float]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"error: the model's process ended with code {self.process.wait()}")
        figures: dict[str, float] = json.loads(answer)
        return figures


def serve(task: dict[str, Any]) -> None:
    """The worker's side: answer every line of stdin with a line of JSON."""
    import torch
    from transformers import AutoModelForCausalLM, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if task["threads"]:
        torch.set_num_threads(task["threads"])
    model = AutoModelForCausalLM.from_pretrained(task["folder"]).eval().to(task["device"])
    generator = torch.Generator().manual_seed(0)
    size = (task["batch"], task["prompt"])
    prompt = torch.randint(3, model.config.vocab_size, size, generator=generator).to(task["device"])
    for line in sys.stdin:
        with torch.no_grad():
            answer = timed(model, prompt, task["new"]) if line.strip() == "turn" else measured(model, prompt)
        print(json.dumps(answer), flush=True)


def timed(model: Any, prompt: Any, new: int) -> dict[str, float]:
    """Tokens per second of a prefill, and of greedy decoding after it."""
    start = clock(prompt)
    output = model(prompt, use_cache=True, logits_to_keep=1)
    filled = clock(prompt)
    for _ in range(new):
        token = output.logits[:, -1].argmax(-1, keepdim=True)
        output = model(token, past_key_values=output.past_key_values, use_cache=True)
    done = clock(prompt)
    return {"prefill": prompt.numel() / (filled - start), "decode": new * len(prompt) / (done - filled)}


def measured(model: Any, prompt: Any) -> dict[str, float]:
    """Peak memory of the process, and the operations of a prefill."""
    from torch.utils.flop_counter import FlopCounterMode

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = peak if sys.platform == "darwin" else peak * 1024
    # The counter does not know the fused attention of CPUs.
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(prompt, use_cache=False, logits_to_keep=1)
    return {"memory": peak, "flops": counter.get_total_flops()}


def clock(tensor: Any) -> float:
    """The time when all that was asked of the device is done."""
    if tensor.device.type == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    raise SystemExit(main())
