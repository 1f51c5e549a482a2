"""`python -m eval.expert_scale`: what a block of experts costs beside a dense block with as many parameters and tokens.

Random mixtures (Qwen3-MoE) and dense models (Qwen3) are pruned by our own command, each run in a process of its own and
in turns. The price of a block is what a run with more blocks takes of the processor beyond one with fewer.
"""

from __future__ import annotations

import argparse
import resource
import sys
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from eval import scale
from llmprune.cli.shell import Parser, run_command, say
from llmprune.cli.values import positive, size
from llmprune.pruning.recipe import EFFORTS

VOCABULARY, HEAD = 1000, 64
FEED = 3.5
"""Inner width of the dense model, by its hidden size: the usual form."""


def build_parser() -> Parser:
    """The flags."""
    parser = Parser(prog="python -m eval.expert_scale", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--hidden", type=positive, default=256, metavar="N", help="width of the mixture (default: 256)")
    parser.add_argument("--experts", type=positive, default=32, metavar="N", help="in a block (default: 32)")
    parser.add_argument("--active", type=positive, default=4, metavar="N", help="experts of a token (default: 4)")
    parser.add_argument("--inner", type=positive, default=128, metavar="N", help="width of an expert (default: 128)")
    parser.add_argument("--samples", type=positive, default=8, metavar="N", help="calibration windows (default: 8)")
    parser.add_argument("--seq-len", type=positive, default=512, metavar="N", help="tokens in each (default: 512)")
    parser.add_argument("--efforts", nargs="+", choices=EFFORTS, default=["fast", "balanced"], help="to be compared")
    parser.add_argument("--blocks", type=positive, nargs=2, default=[1, 3], metavar="N", help="of the runs for time")
    parser.add_argument("--deep", type=positive, nargs="*", default=[4, 16], metavar="N", help="of those for memory")
    parser.add_argument("--repeat", type=positive, default=3, metavar="N", help="runs of each kind (default: 3)")
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="CPU threads (default: 1)")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="new folder for the models; removed")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON to write")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(sparsity="2:4", activation_memory=size("2GiB"))
    return parser


def write_model(kind: str, blocks: int, options: argparse.Namespace, folder: Path) -> int:
    """Write a random bfloat16 model; returns the parameters of a block.

    The dense one has the form of dense models: its width is such that blocks have the same number of parameters.
    """
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

    shape = {"vocab_size": VOCABULARY, "num_hidden_layers": blocks, "head_dim": HEAD, "tie_word_embeddings": False}
    if kind == "mixture":
        config = Qwen3MoeConfig(
            **_attention(options.hidden),
            **shape,
            intermediate_size=options.inner,
            moe_intermediate_size=options.inner,
            num_experts=options.experts,
            num_experts_per_tok=options.active,
        )
    else:
        wanted = _attention_weights(options.hidden) + 3 * options.hidden * options.inner * options.experts
        hidden = 128
        while _attention_weights(hidden + 128) + 3 * FEED * (hidden + 128) ** 2 <= wanted:
            hidden += 128
        feed = round((wanted - _attention_weights(hidden)) / (3 * hidden) / 8) * 8
        config = Qwen3Config(**_attention(hidden), **shape, intermediate_size=feed)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.model.layers[0].parameters())


def _attention(hidden: int) -> dict[str, int]:
    heads = hidden // HEAD
    return {"hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": heads // 2}


def _attention_weights(hidden: int) -> int:
    return 3 * hidden * hidden


def prune(kind: str, blocks: int, effort: str, options: argparse.Namespace) -> dict[str, Any]:
    """Prune a model; seconds of the processor, bytes above the libraries' own, parameters of a block."""
    model = options.work / f"{kind}-{blocks}"
    if not model.is_dir():
        write_model(kind, blocks, options, model)
    begun = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = scale.run(model, options.work / "tokens.safetensors", options, ["--effort", effort])
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = sum(getattr(ended, key) - getattr(begun, key) for key in ("ru_utime", "ru_stime"))
    return {"processor": used, "memory": found["peak_memory"] - found["baseline_memory"]}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All runs: of both kinds in turns, and of the deep mixtures."""
    import torch

    from llmprune.sources.tokens import save_tokens, token_batch

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (options.samples, options.seq_len), generator=generator)
    save_tokens(token_batch(ids, "random ids", 0), options.work / "tokens.safetensors")
    few, many = sorted(options.blocks)
    kinds = ("mixture", "dense")
    parameters = {kind: write_model(kind, few, options, options.work / f"{kind}-{few}") for kind in kinds}
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    for _ in range(options.repeat):
        for effort in options.efforts:
            for kind in kinds:
                spent = {blocks: prune(kind, blocks, effort, options)["processor"] for blocks in (few, many)}
                seconds[effort, kind].append((spent[many] - spent[few]) / (many - few))
                say(f"{effort} {kind} {seconds[effort, kind][-1]:.2f} s a block", sys.stderr)
    deep = [
        {"effort": effort, "blocks": blocks, **prune("mixture", blocks, effort, options)}
        for effort in options.efforts
        for blocks in options.deep
    ]
    settings = {key: getattr(options, key) for key in ("hidden", "experts", "active", "inner", "samples", "seq_len")}
    return {
        "settings": {**settings, "sparsity": options.sparsity, "threads": options.threads, "repeat": options.repeat},
        "parameters": parameters,
        "beside_dense": [
            {"effort": effort, **{kind: [round(one, 3) for one in seconds[effort, kind]] for kind in kinds}}
            for effort in options.efforts
        ],
        "deep": deep,
    }


def table(result: dict[str, Any]) -> str:
    """Markdown: seconds a block of both kinds, and memory by the number of blocks."""
    settings, parameters = result["settings"], result["parameters"]
    lines = ["| effort | block of experts, s | dense block, s | ratio |", "|---|--:|--:|--:|"]
    for row in result["beside_dense"]:
        ours, dense = median(row["mixture"]), median(row["dense"])
        spread = [
            f"{median(row[kind]):.1f} ({min(row[kind]):.1f}-{max(row[kind]):.1f})" for kind in ("mixture", "dense")
        ]
        lines.append(f"| {row['effort']} | {spread[0]} | {spread[1]} | {ours / dense:.2f} |")
    lines += ["", "| effort | blocks | peak above the libraries', MiB |", "|---|--:|--:|"]
    lines += [f"| {row['effort']} | {row['blocks']} | {row['memory'] / 2**20:.0f} |" for row in result["deep"]]
    experts = (
        f"{settings['experts']} experts of {settings['hidden']} x {settings['inner']}, {settings['active']} active"
    )
    sizes = f"{parameters['mixture'] / 1e6:.2f} M parameters a block, the dense one {parameters['dense'] / 1e6:.2f} M"
    return "\n".join(
        [
            *lines,
            "",
            f"Seconds of the processor, median of {settings['repeat']} (least and most); {experts}, {sizes}; "
            f"{settings['sparsity']}, {settings['samples']} x {settings['seq_len']} random tokens, "
            f"{settings['threads']} thread.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    study = partial(scale.run_study, "eval.expert_scale", measure, table, given=given)
    return run_command(build_parser(), study, given)


if __name__ == "__main__":
    raise SystemExit(main())
