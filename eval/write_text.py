"""`python -m eval.write_text MODEL --out FILE`: text by a model itself, for one that knows one kind of text only."""

from __future__ import annotations

import argparse
from pathlib import Path

from eval.perplexity import open_model
from llmprune.cli.shell import Parser, run_command, silence_libraries
from llmprune.cli.values import positive, seed, window
from llmprune.errors import InputError
from llmprune.runtime.files import replacing


def build_parser() -> Parser:
    """The flags."""
    parser = Parser(prog="python -m eval.write_text", description=__doc__, allow_abbrev=False)
    parser.add_argument("model", help="model folder, Hub id, .gguf file, or demo")
    parser.add_argument("--windows", type=positive, default=64, metavar="N", help="texts (default: 64)")
    parser.add_argument("--length", type=window, default=512, metavar="N", help="tokens in each (default: 512)")
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of the draws (default: 0)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="text file to write")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def run(options: argparse.Namespace) -> int:
    """Let the model write, and keep it."""
    import torch

    from llmprune.sources.generated import generate, generation_batch_size

    silence_libraries(options.debug)
    skeleton, tokenizer = open_model(options.model)
    at_once = generation_batch_size(skeleton, options.length)
    if tokenizer.bos_token_id is None:
        raise InputError(f"the tokenizer of {options.model} has no token that begins a text", "choose another model")
    prompts = torch.full((options.windows, 1), tokenizer.bos_token_id)
    written = generate(skeleton, prompts, options.length, options.seed, at_once)
    texts = tokenizer.batch_decode(written, skip_special_tokens=True)
    with replacing(options.out) as partial:
        partial.write_text("\n\n".join(texts), encoding="utf-8")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(build_parser(), run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
