"""`python -m eval.speed DENSE PRUNED`: how fast is a pruned model beside the dense one, in prefill and in decoding?

Each model runs in a process of its own, through plain transformers or, with `--engine llama.cpp`, exported to GGUF and
through llama.cpp. The processes live side by side and take turns, so that whatever else the machine does meets all of
them; what is told is the ratio within a turn, its median and its spread. Where the GPU has sparse kernels, 2:4 layers
are measured with them, too (`llmprune.accelerate`, in bfloat16). `--accelerate` does the same on the CPU with a PRUNED
in int4, and measures DENSE in bfloat16 beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from eval import record
from eval.models import find_model, load_stock
from llmprune.cli.shell import Parser, run_command, say
from llmprune.cli.values import positive
from llmprune.errors import InputError, PruneError
from llmprune.export import GGUF_TYPES
from llmprune.runtime.memory import peak_memory

MEASURES = {"prefill": "tokens/s", "decode": "tokens/s"}
SETTINGS = ("prompt", "new", "batch", "threads", "device", "dtype", "engine", "gguf_type")
ENGINES = ("transformers", "llama.cpp")
SPEEDUPS = {"pruned": "speedup", "sparse": "sparse_speedup", "bfloat16": "bfloat16_speedup", "int4": "int4_speedup"}
"""Models beside the dense one (`bfloat16` is the dense one once more), and where their ratios stand."""
OVER_HALF = "int4_over_bfloat16"


def build_parser() -> Parser:
    """The flags."""
    parser = Parser(prog="python -m eval.speed", description=__doc__, allow_abbrev=False)
    parser.add_argument("dense", metavar="DENSE", help="model: a folder, a name on the Hub, or demo")
    parser.add_argument("pruned", metavar="PRUNED", help="model, likewise")
    parser.add_argument("--repeats", type=positive, default=9, metavar="N", help="turns of each model (default: 9)")
    parser.add_argument("--prompt", type=positive, default=512, metavar="N", help="tokens of the prompt (default: 512)")
    parser.add_argument("--new", type=positive, default=32, metavar="N", help="tokens to generate (default: 32)")
    parser.add_argument("--batch", type=positive, default=1, metavar="N", help="sequences at a time (default: 1)")
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: all)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps (default: cpu)")
    parser.add_argument("--dtype", help="such as bfloat16 (default: the folder's own; bfloat16 with sparse kernels)")
    parser.add_argument("--engine", choices=ENGINES, default=ENGINES[0], help="what runs them (default: transformers)")
    parser.add_argument("--accelerate", action="store_true", help="PRUNED is in int4: on torch's int4 CPU kernel, too")
    parser.add_argument("--gguf-type", choices=GGUF_TYPES, help="of --engine llama.cpp (default: that of the weights)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="file that receives the result as JSON")
    parser.add_argument("--json", action="store_true", help="the result as JSON on stdout instead of the table")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["--worker"]:
        serve(json.loads(given[1]))
        return 0
    return run_command(build_parser(), lambda options: run(options, given), given)


def run(options: argparse.Namespace, given: Sequence[str]) -> int:
    """Measure two models, write and print what was found."""
    check_engine(options)
    stamp = record.stamp(["python", "-m", "eval.speed", *given], options.out)
    options.dense, options.pruned = (find_model(name).folder for name in (options.dense, options.pruned))
    if options.accelerate:
        check_int4(options)
    figures = record.write(options.out, stamp, compare(options))
    say(json.dumps(figures, indent=2) if options.json else text(figures))
    return 0


def check_engine(options: argparse.Namespace) -> None:
    """Refuse what llama.cpp is not measured with, and its settings without it.

    Raises:
        InputError: naming the flag.
    """
    if options.engine == "transformers":
        if options.gguf_type:
            raise InputError("--gguf-type means nothing without --engine llama.cpp", "leave it out, or add the engine")
    elif options.batch != 1 or options.device != "cpu" or options.dtype:
        raise InputError(
            "--engine llama.cpp is measured on the CPU, one sequence at a time",
            "leave out --batch and --device; --gguf-type takes the place of --dtype",
        )
    elif not find_spec("xllamacpp"):
        raise InputError("--engine llama.cpp needs xllamacpp, which is not installed", "pip install xllamacpp")


def check_int4(options: argparse.Namespace) -> None:
    """Refuse `--accelerate` where there is no kernel for the pruned model.

    Raises:
        InputError: naming what disagrees.
    """
    from llmprune.export.int4_kernels import BITS, processor_obstacle
    from llmprune.sources.models import stored_form

    form = stored_form(options.pruned)
    if form is None or form.bits != BITS:
        found = form.form if form else "floating point"
        raise InputError(f"--accelerate needs a model in int4, {options.pruned} is stored as {found}", "leave it out")
    where = "" if options.device == "cpu" and options.engine == "transformers" else "is of transformers on the CPU"
    if reason := where or processor_obstacle():
        raise InputError(f"--accelerate: {reason}", "leave it out")


def variants(options: argparse.Namespace, sparse: bool) -> dict[str, tuple[Path, dict[str, Any]]]:
    """The models by name: folder, and settings of their own."""
    found: dict[str, tuple[Path, dict[str, Any]]] = {"dense": (options.dense, {}), "pruned": (options.pruned, {})}
    half = {"dtype": "bfloat16"}
    if sparse:
        found["sparse"] = (options.pruned, {"kernels": "sparse"})
    if options.accelerate:
        found |= {"bfloat16": (options.dense, half), "int4": (options.pruned, {**half, "kernels": "int4"})}
    return found


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """All figures, with the ratios over dense."""
    sparse = has_kernels(options.device)
    settings = {key: getattr(options, key) for key in SETTINGS}
    settings["dtype"] = settings["dtype"] or ("bfloat16" if sparse else None)
    models_of = variants(options, sparse)
    folders = {name: folder for name, (folder, _) in models_of.items()}
    with ExitStack() as stack:
        made = exported(folders, options.gguf_type, stack) if options.engine == "llama.cpp" else folders
        workers = {
            name: stack.enter_context(Worker(made[name], {**settings, "kernels": "", **own}))
            for name, (_, own) in models_of.items()
        }
        for worker in workers.values():
            worker.turn()  # warm-up
        turns = [{name: worker.turn() for name, worker in workers.items()} for _ in range(options.repeats)]
        ends = {name: worker.end() for name, worker in workers.items()}
    models = {
        name: {
            "folder": str(folder),
            **{measure: statistics.median(turn[name][measure] for turn in turns) for measure in MEASURES},
            "size": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
            **ends[name],  # of a GGUF file the size, too
        }
        for name, folder in folders.items()
    }
    ratios = {SPEEDUPS[name]: over(turns, name) for name in folders if name != "dense"}
    if options.accelerate:
        ratios[OVER_HALF] = over(turns, "int4", "bfloat16")
    counted = [models[name]["flops"] for name in ("dense", "pruned")]
    promised = counted[0] / counted[1] if all(counted) else None
    return {
        **models,
        **ratios,
        "promised": promised,
        "kept": (ratios["speedup"]["prefill"]["median"] - 1) / (promised - 1) if promised not in (None, 1) else None,
        "settings": {**settings, "repeats": options.repeats},
        "machine": {"processor": platform.machine(), "cpus": os.cpu_count()},
    }


def exported(folders: dict[str, Path], kind: str | None, stack: ExitStack) -> dict[str, Path]:
    """The models as GGUF files, which are gone when the stack is left."""
    from llmprune.export.gguf import export_gguf

    place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    return {name: Path(export_gguf(folder, place / f"{name}.gguf", kind=kind).out) for name, folder in folders.items()}


def has_kernels(device: str) -> bool:
    """Whether torch has sparse kernels for 2:4 there."""
    if not device.startswith("cuda"):
        return False
    import torch

    from llmprune.export.semistructured import device_obstacle

    return not device_obstacle(torch.device(device))


def over(turns: list[dict[str, dict[str, float]]], name: str, base: str = "dense") -> dict[str, dict[str, float]]:
    """Within each turn, how many times as fast as another model."""
    return {measure: spread([turn[name][measure] / turn[base][measure] for turn in turns]) for measure in MEASURES}


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": middle, "low": low, "high": high}


def rows(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    """What is measured, of every model, and the ratios over the dense one."""
    names = [name for name in ("dense", *SPEEDUPS) if name in figures]
    models = [figures[name] for name in names]
    found: list[tuple[str, ...]] = [("", *names, "over dense")]
    for measure, unit in MEASURES.items():
        ratios = [figures[key][measure] for key in SPEEDUPS.values() if key in figures]
        told = "; ".join(map(told_spread, ratios))
        found.append((f"{measure}, {unit}", *(f"{model[measure]:.1f}" for model in models), told))
    for key, name in (("size", "size, MiB"), ("memory", "peak memory, MiB")):
        told = "; ".join(f"{model[key] / models[0][key]:.3f}" for model in models[1:])
        found.append((name, *(f"{model[key] / 2**20:.0f}" for model in models), told))
    flops = [f"{model['flops'] / 1e9:.1f}" if model["flops"] else "-" for model in models]
    return [*found, ("prefill, GFLOP", *flops, "")]


def told_spread(ratio: dict[str, float]) -> str:
    """Median and quartiles as text."""
    return f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"


def remarks(figures: dict[str, Any]) -> list[str]:
    """What the operations promise and how much of it is there, where that is another speed; int4 over bfloat16."""
    found = []
    if figures["promised"] is not None and figures["promised"] != 1:
        kept = f"; {figures['kept']:.0%} of that gain was measured"
        found.append(f"by its operations, prefill should be {figures['promised']:.3f} times as fast{kept}")
    if ratios := figures.get(OVER_HALF):
        told = ", ".join(f"{measure} {told_spread(ratios[measure])}" for measure in MEASURES)
        found.append(f"int4 over bfloat16: {told}")
    return found


def text(figures: dict[str, Any]) -> str:
    """A table for people."""
    table = rows(figures)
    lines = [f"{first:<20}" + "".join(f"{cell:>11}" for cell in cells) + f"  {last}" for first, *cells, last in table]
    return "\n".join(line.rstrip() for line in [*lines, *remarks(figures)])


def table(figures: dict[str, Any]) -> str:
    """The same in Markdown."""
    head, *rest = ("| " + " | ".join(row) + " |" for row in rows(figures))
    said = [f"{line[0].upper()}{line[1:]}." for line in remarks(figures)]
    return "\n".join([head, "|---|" + "--:|" * (head.count("|") - 2), *rest, *([""] if said else []), *said])


class Worker:
    """A process that holds one model and times it when asked.

    Args:
        folder: the model.
        settings: what to time.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        task = json.dumps({"folder": str(folder), **settings})
        command = [sys.executable, "-m", "eval.speed", "--worker", task]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def turn(self) -> dict[str, Any]:
        """Time it once: tokens per second."""
        return self._ask("turn")

    def end(self) -> dict[str, Any]:
        """Peak memory (bytes) and operations of a prefill."""
        return self._ask("end")

    def _ask(self, what: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise PruneError(
                f"the process of {self.folder} ended with code {self.process.wait()}",
                "see above; perhaps two or three models do not fit into memory together",
            )
        figures: dict[str, Any] = json.loads(answer)
        return figures


def serve(task: dict[str, Any]) -> None:
    """The worker's side: answer every line of stdin with a line of JSON."""
    if task["engine"] == "llama.cpp":
        from eval.speed_llama_cpp import serve_gguf

        serve_gguf(task)
        return
    import torch
    from transformers import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if task["threads"]:
        torch.set_num_threads(task["threads"])
    dtype = {"dtype": task["dtype"]} if task["dtype"] else {}
    model = load_stock(task["folder"], **dtype).to(task["device"])
    if task["kernels"]:
        from llmprune import accelerate

        if not (done := accelerate(model)).switched and task["kernels"] == "int4":
            raise PruneError(str(done), "leave out --accelerate")
    generator = torch.Generator().manual_seed(0)
    size = (task["batch"], task["prompt"])
    prompt = torch.randint(3, model.config.get_text_config().vocab_size, size, generator=generator).to(task["device"])
    for line in sys.stdin:
        with torch.no_grad():
            if line.strip() == "turn":
                answer: dict[str, Any] = timed(model, prompt, task["new"])
            else:
                answer = measured(model, prompt, bool(task["kernels"]))
        say(json.dumps(answer))


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


def measured(model: Any, prompt: Any, accelerated: bool) -> dict[str, float | None]:
    """Peak memory (of the GPU, else of the process), and a prefill's operations (not counted where accelerated)."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    if prompt.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = peak_memory()
    if accelerated:
        return {"memory": peak, "flops": None}
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
