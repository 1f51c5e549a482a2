"""`python -m eval.int4_kernel`: torch's int4 kernel for CPUs beside dense products, layer by layer.

Random weights of the shapes given, one token (decoding) and many (prefill), in turns: the dense product in float32 and
in bfloat16, the kernel in bfloat16 and, where that is bearable, in float32. Told are medians, and the median ratio
within a turn over the dense product in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from eval import record
from llmprune.cli.shell import Parser, run_command, say
from llmprune.cli.values import positive
from llmprune.export.int4_kernels import Int4Linear, Quantized

SHAPES = ("576x576", "1536x576", "576x1536", "4096x4096", "14336x4096")
"""Outputs times inputs: of the demo model, and of models of 8 billion weights."""
SHORTEST = 0.01
"""Seconds of one timing; shorter products are repeated within it."""
SLOW = 10**9
"""Multiplications beyond which the kernel in float32 is not tried: it is slow."""


def build_parser() -> Parser:
    """The flags."""
    parser = Parser(prog="python -m eval.int4_kernel", description=__doc__, allow_abbrev=False)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="OUTxIN", help="of the weights")
    parser.add_argument("--tokens", nargs="+", type=positive, default=(1, 512), metavar="N", help="(default: 1 512)")
    parser.add_argument("--group", type=positive, default=64, metavar="N", help="inputs a scale (default: 64)")
    parser.add_argument("--repeats", type=positive, default=9, metavar="N", help="turns (default: 9)")
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="CPU threads (default: 1)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="file that receives the result as JSON")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def run(options: argparse.Namespace, given: Sequence[str]) -> int:
    """Measure, write and print."""
    stamp = record.stamp(["python", "-m", "eval.int4_kernel", *given], options.out)
    torch.set_num_threads(options.threads)
    found = []
    for tokens in options.tokens:
        for shape in options.shapes:
            rows, width = map(int, shape.split("x"))
            found.append({"shape": shape, "tokens": tokens, **measured(rows, width, tokens, options)})
            say(json.dumps(found[-1]), sys.stderr)
    settings = {key: getattr(options, key) for key in ("group", "repeats", "threads")}
    processor = torch.backends.cpu.get_cpu_capability()
    figures = {"products": found, "settings": settings, "processor": processor, "torch": torch.__version__}
    say(table(record.write(options.out, stamp, figures)))
    return 0


def measured(rows: int, width: int, tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    """Microseconds of every product, and how many times as fast as bfloat16 it is."""
    with torch.no_grad():
        products = products_of(rows, width, tokens, options.group)
        counts = {name: repeats_of(product) for name, product in products.items()}
        turns = [{name: timed(products[name], counts[name]) for name in products} for _ in range(options.repeats)]
    return {
        "us": {name: 1e6 * statistics.median(turn[name] for turn in turns) for name in products},
        "over_bfloat16": {
            name: statistics.median(turn["bfloat16"] / turn[name] for turn in turns) for name in products
        },
    }


def products_of(rows: int, width: int, tokens: int, group: int) -> dict[str, Callable[[], Tensor]]:
    """The products that are compared, of one weight."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (rows, width), generator=generator, dtype=torch.int8)
    scales = (torch.rand(rows, width // group, generator=generator) / 50 + 0.01).bfloat16()
    weight = Quantized(codes, scales)
    kernel, half = Int4Linear(weight, None), weight.dense()
    single, inputs = half.float(), torch.randn(tokens, width, generator=generator)
    rounded = inputs.bfloat16()
    made: dict[str, Callable[[], Tensor]] = {
        "float32": lambda: functional.linear(inputs, single),
        "bfloat16": lambda: functional.linear(rounded, half),
        "int4": lambda: kernel(rounded),
    }
    if rows * width * tokens < SLOW:
        exact = Int4Linear(weight, None).float()
        made["int4 in float32"] = lambda: exact(inputs)
    return made


def repeats_of(product: Callable[[], Tensor]) -> int:
    """How often a product is computed within one timing."""
    timed(product, 1)  # warm-up
    return max(1, int(SHORTEST / timed(product, 1)))


def timed(product: Callable[[], Tensor], count: int) -> float:
    """Seconds of a product."""
    start = time.perf_counter()
    for _ in range(count):
        product()
    return (time.perf_counter() - start) / count


def table(result: dict[str, Any]) -> str:
    """Microseconds in Markdown; in brackets how many times as fast as bfloat16."""
    names = ("float32", "bfloat16", "int4", "int4 in float32")
    lines = ["| outputs x inputs | tokens | " + " | ".join(f"{name}, µs" for name in names) + " |"]
    lines += ["|---|--:|" + "--:|" * len(names)]
    for row in result["products"]:
        cells = [f"{row['us'][n]:,.0f} ({row['over_bfloat16'][n]:.2f})" if n in row["us"] else "-" for n in names]
        lines.append(f"| {row['shape']} | {row['tokens']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    return run_command(build_parser(), lambda options: run(options, given), given)


if __name__ == "__main__":
    raise SystemExit(main())
