"""`python -m eval.zeros DIR`: which quantisers keep the zeros of a pruned folder, counted in its pruned layers.

Every scheme quantises the weights of all pruned layers and dequantises them again; what is told is the ratio of the
zeros that are still zero, and the number of layers that still hold the pattern of the folder's report. Schemes of
packages that are not installed are left out: `pip install gguf torchao optimum-quanto bitsandbytes`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from eval import record
from llmprune import PruneReport
from llmprune.cli.shell import Parser, run_command, say, silence_libraries
from llmprune.pruning.pattern import parse_pattern

GGUF = ("Q8_0", "Q5_0", "Q4_0", "Q5_1", "Q4_1")


def build_parser() -> Parser:
    """The flags."""
    parser = Parser(
        prog="python -m eval.zeros",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="a folder pruned by a pattern, such as 2:4")
    parser.add_argument("--out", type=Path, metavar="FILE", help="file that receives the result as JSON")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def run(options: argparse.Namespace, given: Sequence[str]) -> int:
    """Count, write and print."""
    silence_libraries(options.debug)
    stamp = record.stamp(["python", "-m", "eval.zeros", *given], options.out)
    say(json.dumps(record.write(options.out, stamp, count(options.folder)), indent=2))
    return 0


def count(folder: Path) -> dict[str, Any]:
    """Ratio of the zeros kept, and layers that hold their pattern, by scheme.

    Args:
        folder: with `prune_report.json`.
    """
    report = PruneReport.read(folder)
    layers = {layer.name: parse_pattern(layer.pattern) for layer in report.layers}
    zeros, schemes = 0, available()
    kept, holding = dict.fromkeys(schemes, 0), dict.fromkeys(schemes, 0)
    for name, weight in weights(folder, set(layers)):
        zero = weight == 0
        zeros += int(zero.sum())
        for scheme, rounded in schemes.items():
            found = rounded(weight)
            kept[scheme] += int((zero & (found == 0)).sum())
            holding[scheme] += layers[name].check(found).violations == 0
    results = {scheme: {"zeros_kept": kept[scheme] / zeros, "layers_holding": holding[scheme]} for scheme in schemes}
    packages = ("gguf", "torchao", "optimum-quanto", "bitsandbytes")
    versions = {name: importlib.metadata.version(name) for name in packages if _is_installed(name)}
    return {
        "pattern": report.sparsity["pattern"],
        "layers": len(layers),
        "zeros": zeros,
        "versions": versions,
        "schemes": results,
    }


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    rows = [
        f"| {name} | {found['zeros_kept']:.2%} | {found['layers_holding']} of {result['layers']} |"
        for name, found in result["schemes"].items()
    ]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    head = f"| scheme | zeros kept | layers that hold {result['pattern']} |\n|---|--:|--:|"
    return "\n".join([head, *rows, "", f"Of {result['zeros'] / 1e6:.1f} M zeros; {versions}."])


def weights(folder: Path, names: set[str]) -> Iterator[tuple[str, Tensor]]:
    """Name and weight, float32 `(out, in)`, of every layer."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                if (name := key.removesuffix(".weight")) in names:
                    yield name, file.get_tensor(key).float()


def available() -> dict[str, Callable[[Tensor], Tensor]]:
    """Name of a scheme -> what it makes of a weight, dequantised."""
    found: dict[str, Callable[[Tensor], Tensor]] = {}
    if _is_installed("gguf"):
        found |= {f"{kind} (gguf)": partial(_gguf, kind=kind) for kind in GGUF}
    if _is_installed("torchao"):
        found |= {"int8 weight-only (torchao)": _torchao}
    if _is_installed("optimum-quanto"):
        found |= {f"{kind} (quanto)": partial(_quanto, kind=kind) for kind in ("qint8", "qint4")}
    if _is_installed("bitsandbytes"):
        found |= {f"{kind} (bitsandbytes)": partial(_bitsandbytes, kind=kind) for kind in ("nf4", "fp4")}
    return found


def _is_installed(package: str) -> bool:
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


def _gguf(weight: Tensor, kind: str) -> Tensor:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    return torch.from_numpy(
        dequantize(quantize(weight.numpy(), GGMLQuantizationType[kind]), GGMLQuantizationType[kind])
    )


def _torchao(weight: Tensor) -> Tensor:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    layer = _linear(weight)
    quantize_(layer, Int8WeightOnlyConfig())
    return layer[0].weight.dequantize()


def _quanto(weight: Tensor, kind: str) -> Tensor:
    from optimum import quanto

    layer = _linear(weight)
    quanto.quantize(layer, weights=getattr(quanto, kind))
    quanto.freeze(layer)
    return layer[0].weight.dequantize()


def _bitsandbytes(weight: Tensor, kind: str) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(weight, quant_type=kind)
    return dequantize_4bit(packed, state)


def _linear(weight: Tensor) -> nn.Sequential:
    """A model of one linear layer, as quantisers take it."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return nn.Sequential(layer)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    return run_command(build_parser(), lambda options: run(options, given), given)


if __name__ == "__main__":
    raise SystemExit(main())
