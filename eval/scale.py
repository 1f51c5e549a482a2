"""`python -m eval.scale`: prune random Llamas of one shape with few and with more blocks, and tell what all would take.

The weights are written block by block, never whole in memory, and pruned by our own command in a process of its own.
What the longer run takes more than the shorter one is the price of a block; with that, and with what a dry run
estimates for a model that is there by name only (files without data), follows what the full model takes.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eval import record
from llmprune.cli.shell import Parser, run_command, say, silence_libraries
from llmprune.cli.values import positive, size
from llmprune.pruning.methods import METHODS
from llmprune.pruning.recipe import AUTO, DEFAULT_EFFORT

IO = ("rchar", "wchar", "read_bytes", "write_bytes")


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a Llama, and how many blocks the real one has."""

    hidden: int
    feed: int
    heads: int
    kv_heads: int
    vocabulary: int
    blocks: int

    def block(self) -> dict[str, tuple[int, ...]]:
        """Parameters of a block."""
        kv = self.hidden // self.heads * self.kv_heads
        rows = {"q": self.hidden, "k": kv, "v": kv, "o": self.hidden}
        shapes = {f"self_attn.{name}_proj": (out, self.hidden) for name, out in rows.items()}
        shapes |= {f"mlp.{name}_proj": (self.feed, self.hidden) for name in ("gate", "up")}
        shapes |= {"mlp.down_proj": (self.hidden, self.feed)}
        norms = {f"{name}_layernorm": (self.hidden,) for name in ("input", "post_attention")}
        return {f"{name}.weight": shape for name, shape in (shapes | norms).items()}

    def files(self, blocks: int) -> dict[str, dict[str, tuple[int, ...]]]:
        """Parameters by file: one for every block, one for the rest."""
        table = (self.vocabulary, self.hidden)
        rest = {"model.embed_tokens.weight": table, "model.norm.weight": (self.hidden,), "lm_head.weight": table}
        parts = [{f"model.layers.{at}.{name}": shape for name, shape in self.block().items()} for at in range(blocks)]
        return {f"model-{at:05d}.safetensors": part for at, part in enumerate([rest, *parts])}


SHAPES = {
    "tiny": Shape(256, 704, 8, 4, 1000, 4),
    "llama-3-1b": Shape(2048, 8192, 32, 8, 128256, 16),
    "llama-3-8b": Shape(4096, 14336, 32, 8, 128256, 32),
    "llama-3-70b": Shape(8192, 28672, 64, 8, 128256, 80),
}


def write_model(shape: Shape, blocks: int, folder: Path, data: bool = True) -> Path:
    """Write a random bfloat16 model file by file; without data the files take no space, but have their size."""
    from transformers import LlamaConfig

    folder.mkdir(parents=True)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.feed,
        num_hidden_layers=blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    index = {}
    for number, (file, parameters) in enumerate(shape.files(blocks).items()):
        (_write_random if data else _write_empty)(folder / file, parameters, number)
        index |= dict.fromkeys(parameters, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def _write_random(path: Path, parameters: dict[str, tuple[int, ...]], seed: int) -> None:
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, dims in parameters.items():
        tensor = torch.empty(dims, dtype=torch.bfloat16)
        tensors[name] = tensor.fill_(1) if len(dims) == 1 else tensor.normal_(0, 0.02, generator=generator)
    save_file(tensors, path, metadata={"format": "pt"})


def _write_empty(path: Path, parameters: dict[str, tuple[int, ...]], _: int) -> None:
    header, end = {}, 0
    for name, dims in parameters.items():
        start, end = end, end + 2 * math.prod(dims)
        header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)


def run(model: Path, tokens: Path, options: argparse.Namespace, how: Sequence[str]) -> dict[str, Any]:
    """Prune a model in a process of its own; its figures.

    Args:
        model: its folder.
        tokens: calibration windows.
        options: sparsity, threads, memory for activations.
        how: the flags that name a method or an effort.
    """
    out = model.with_name(f"{model.name}-pruned")
    command = [sys.executable, "-m", "llmprune", "--model", str(model), "--sparsity", options.sparsity]
    command += [*how, "--calib", str(tokens), "--no-eval", "--json", "--out", str(out)]
    command += ["--device", "cpu", "--threads", str(options.threads)]
    command += ["--activation-memory", str(options.activation_memory)]
    begun = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        counted: dict[str, int] = {}
        watcher = threading.Thread(target=_watch, args=(process, counted), daemon=True)
        watcher.start()
        text = process.stdout.read()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"llmprune ended with {process.returncode}")
    shutil.rmtree(out)
    report = json.loads(text)
    memory = {key: report[key] for key in ("peak_memory", "baseline_memory")}
    layers = len(report["layers"])
    return {**memory, "layers": layers, "seconds": report["seconds"], "wall": time.monotonic() - begun, "io": counted}


def _watch(process: subprocess.Popen[str], counted: dict[str, int]) -> None:
    """What the system counts of a process's reading and writing, until it ends."""
    while process.poll() is None:
        try:
            lines = Path(f"/proc/{process.pid}/io").read_text().splitlines()
            counted.update((key, int(value)) for key, value in (line.split(": ") for line in lines) if key in IO)
        except (OSError, ValueError):
            return
        time.sleep(0.2)


def estimate(model: Path, options: argparse.Namespace) -> dict[str, float]:
    """The estimates of a dry run for a model: seconds, and bytes above the libraries' own."""
    from transformers import AutoConfig

    from llmprune.model.reader import SafetensorsFolder
    from llmprune.model.selection import make_plan
    from llmprune.model.skeleton import Skeleton
    from llmprune.pipeline.estimate_memory import memory
    from llmprune.pipeline.estimate_time import product_rate, seconds
    from llmprune.pipeline.task import Task
    from llmprune.pruning.methods import load_method
    from llmprune.pruning.pattern import parse_pattern
    from llmprune.pruning.recipe import make_recipe

    skeleton = Skeleton(AutoConfig.from_pretrained(model, trust_remote_code=False), SafetensorsFolder(model))
    recipe = make_recipe(options.method, DEFAULT_EFFORT, {})
    plan = make_plan(skeleton, parse_pattern(options.sparsity, load_method(recipe.method).scope), (), ())
    tokens = options.samples * options.seq_len
    task = Task(skeleton, plan, recipe, tokens, options.seq_len, 0, options.activation_memory)
    return {"seconds": seconds(task, product_rate()), "memory": memory(task)}


def build_parser() -> Parser:
    """The flags."""
    parser = Parser(prog="python -m eval.scale", description="Prune random models of a shape.", allow_abbrev=False)
    parser.add_argument("--shape", choices=SHAPES, required=True, help=", ".join(SHAPES))
    parser.add_argument("--larger", choices=SHAPES, default="llama-3-70b", help="shape to estimate from it")
    parser.add_argument("--blocks", type=positive, nargs="+", default=[4, 8], metavar="N", help="of each run")
    parser.add_argument("--method", choices=(AUTO, *METHODS), default="sparsegpt", help="of pruning")
    parser.add_argument("--sparsity", default="2:4", help="pattern")
    parser.add_argument("--samples", type=positive, default=8, help="calibration windows")
    parser.add_argument("--seq-len", type=positive, default=512, help="tokens in each")
    parser.add_argument("--activation-memory", type=size, default="2GiB", help="see llmprune --help")
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="new folder for the models; removed")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON to write")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The runs, and what follows from them."""
    import torch

    from llmprune.sources.tokens import save_tokens, token_batch

    shape, larger = SHAPES[options.shape], SHAPES[options.larger]
    ids = torch.randint(
        shape.vocabulary, (options.samples, options.seq_len), generator=torch.Generator().manual_seed(0)
    )
    tokens = options.work / "tokens.safetensors"
    save_tokens(token_batch(ids, "random ids", 0), tokens)
    runs = {}
    for blocks in sorted(options.blocks):
        model = write_model(shape, blocks, options.work / f"blocks-{blocks}")
        runs[blocks] = {
            **run(model, tokens, options, ["--method", options.method]),
            "estimate": estimate(model, options),
        }
        shutil.rmtree(model)
    full = estimate(write_model(shape, shape.blocks, options.work / "full", data=False), options)
    other = estimate(write_model(larger, larger.blocks, options.work / "larger", data=False), options)
    return {
        "shape": asdict(shape),
        "larger": asdict(larger),
        "settings": {key: str(value) for key, value in vars(options).items() if key not in {"work", "out", "debug"}},
        "runs": runs,
        "full": {"memory": full["memory"]},
        "larger_full": {"memory": other["memory"]},
        **(whole(runs, shape, full, other) if len(runs) > 1 else {}),
    }


def whole(
    runs: dict[int, dict[str, Any]], shape: Shape, full: dict[str, float], other: dict[str, float]
) -> dict[str, Any]:
    """The price of a block from the shortest and the longest run, and what the full models would take."""
    few, many = min(runs), max(runs)
    block = {key: (runs[many]["seconds"][key] - runs[few]["seconds"][key]) / (many - few) for key in ("total", "prune")}
    io = {key: (runs[many]["io"][key] - runs[few]["io"][key]) // (many - few) for key in IO}
    total = runs[few]["seconds"]["total"] + block["total"] * (shape.blocks - few)
    return {
        "block": {"seconds": block, "io": io, "stored_bytes": _stored_bytes(shape)},
        "full": {"seconds": total, "memory": full["memory"]},
        # A dry run's seconds leave out what is no product; the runs tell by how much.
        "larger_full": {"seconds": total * other["seconds"] / full["seconds"], "memory": other["memory"]},
    }


def table(result: dict[str, Any]) -> str:
    """Markdown: the runs, and where there are two, what a block took and what the full models would take."""
    gib, few_many = 2**30, sorted(result["runs"].items(), key=lambda item: int(item[0]))
    lines = [
        "| blocks | peak above the libraries', GiB | estimated, GiB | whole run, s | read, GB | written, GB |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    for blocks, run in few_many:
        peak = (run["peak_memory"] - run["baseline_memory"]) / gib
        io = [run["io"][key] / 1e9 for key in ("rchar", "wchar")]
        estimated = run["estimate"]["memory"] / gib
        lines.append(f"| {blocks} | {peak:.2f} | {estimated:.2f} | {run['wall']:.0f} | {io[0]:.1f} | {io[1]:.1f} |")
    settings = result["settings"]
    full, larger = result["full"], result["larger_full"]
    sizes = ((full, "shape"), (larger, "larger"))
    used = f"{settings['method']}, {settings['samples']} x {settings['seq_len']} tokens"
    if "block" not in result:
        this, other = (f"{part['memory'] / gib:.1f} GiB for {settings[key]}" for part, key in sizes)
        return "\n".join([*lines, "", f"A dry run ({used}) estimates {this} whole, {other}."])
    block = result["block"]
    disk, read, written = (block["io"][key] / 1e9 for key in ("read_bytes", "rchar", "wchar"))
    lines += [
        "",
        f"A block takes {block['seconds']['total']:.0f} s and holds {block['stored_bytes'] / 1e9:.2f} GB: "
        f"{disk:.2f} GB come from the disk (the source is mapped), {written:.2f} GB are written, and {read:.2f} GB "
        f"read again to hash what was written. From this ({used}), {settings['shape']} whole: "
        f"{full['seconds'] / 3600:.1f} h, {full['memory'] / gib:.1f} GiB; {settings['larger']}: "
        f"{larger['seconds'] / 3600:.1f} h, {larger['memory'] / gib:.1f} GiB.",
    ]
    return "\n".join(lines)


def _stored_bytes(shape: Shape) -> int:
    return sum(2 * math.prod(dims) for dims in shape.block().values())


def run_study(
    name: str,
    measure: Callable[[argparse.Namespace], dict[str, Any]],
    shown: Callable[[dict[str, Any]], str],
    options: argparse.Namespace,
    given: Sequence[str],
) -> int:
    """Measure with models in a new folder, which is removed; record the result, and print it.

    Args:
        name: of the script.
        measure: gives the result.
        shown: the result as it is printed.
        options: of the command line, `work` and `out` among them.
        given: the command line.
    """
    silence_libraries(options.debug)
    stamp = record.stamp(["python", "-m", name, *given], options.out)
    options.work.mkdir(parents=True)
    try:
        result = record.write(options.out, stamp, measure(options))
    finally:
        shutil.rmtree(options.work)
    say(shown(result))
    return 0


def _shown(result: dict[str, Any]) -> str:
    keys = ("runs", "block", "full", "larger_full")
    return json.dumps({key: result[key] for key in keys if key in result}, indent=2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    return run_command(build_parser(), lambda options: run_study("eval.scale", measure, _shown, options, given), given)


if __name__ == "__main__":
    raise SystemExit(main())
