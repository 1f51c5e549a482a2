"""`python -m calib RECIPE --model MODEL --out tokens.safetensors`: make a calibration set, once and for all."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune.cli.shell import Parser, run_command, say, silence_libraries
from llmprune.cli.values import positive, seed, window
from llmprune.job import BOS, DEFAULT_SAMPLES, DEFAULT_SEQ_LEN

if TYPE_CHECKING:
    from llmprune.cli.terminal import TerminalProgress
    from llmprune.sources.models import Source
    from llmprune.sources.tokens import TokenBatch


def build_parser() -> Parser:
    """The flags."""
    parser = Parser(
        prog="python -m calib",
        description="Make calibration windows by a recipe and freeze them in a hashed token file, "
        "which `llmprune --calib FILE` uses without a network or a tokenizer. See calib/README.md.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "recipe", metavar="RECIPE", help="a .toml file, the name of one in calib/recipes, or a text file or folder"
    )
    parser.add_argument("--model", required=True, help="whose tokenizer to use: folder, Hub id, .gguf file, or demo")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="token file to write (.safetensors)")
    own = "(default: the recipe's"
    parser.add_argument("--samples", type=positive, metavar="N", help=f"windows {own}; 128 for a text)")
    parser.add_argument("--seq-len", type=window, metavar="N", help=f"tokens per window {own}; 512 for a text)")
    parser.add_argument("--seed", type=seed, metavar="N", help=f"order and choice of windows {own}; 0 for a text)")
    parser.add_argument("--bos", choices=BOS, help=f"whether windows begin with BOS {own}; auto for a text)")
    parser.add_argument("--cache-dir", type=Path, metavar="DIR", help="demo data (default: ~/.cache/llmprune)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    parser.add_argument("--json", action="store_true", help="the provenance as JSON on stdout")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def freeze(options: argparse.Namespace) -> int:
    """Make the file."""
    silence_libraries(options.debug)
    from llmprune.cli.terminal import TerminalProgress
    from llmprune.errors import InputError
    from llmprune.sources.demo import default_cache
    from llmprune.sources.models import open_source
    from llmprune.sources.tokens import save_tokens

    if options.out.suffix != ".safetensors":
        raise InputError(f"--out {options.out} must end in .safetensors", "llmprune knows token files by that ending")
    progress = TerminalProgress()
    cache, trust = options.cache_dir or default_cache(), options.trust_remote_code
    source = open_source(options.model, revision=None, cache=cache, trust_remote_code=trust, progress=progress)
    batch, recipe = make(options, source, cache, progress)
    try:
        save_tokens(batch, options.out, recipe=recipe)
    except OSError as error:
        raise InputError(f"cannot write {options.out}: {error.strerror}", "choose another --out") from error
    facts = batch.provenance
    if options.json:
        say(json.dumps(asdict(facts), indent=2))
    else:
        say(f"{options.out}: {facts.samples} x {facts.seq_len} tokens of {facts.source}, sha256 {facts.sha256}")
    return 0


def make(
    options: argparse.Namespace, source: Source, cache: Path, progress: TerminalProgress
) -> tuple[TokenBatch, dict[str, Any]]:
    """The windows, and the recipe ({} for a plain text, which is cut as `llmprune --calib` would cut it)."""
    from calib.build import build
    from calib.recipe import known_recipes, read_recipe
    from llmprune.sources.models import load_tokenizer
    from llmprune.sources.texts import Reader
    from llmprune.sources.tokens import calibration_tokens

    named = options.recipe in known_recipes() and not Path(options.recipe).exists()
    settings = {name: getattr(options, name) for name in ("samples", "seq_len", "seed", "bos")}
    if named or options.recipe.endswith(".toml"):
        recipe = read_recipe(options.recipe, **settings)
        tokenizer = load_tokenizer(source, options.trust_remote_code)
        return build(recipe, tokenizer, cache, progress), asdict(recipe)
    defaults = {"samples": DEFAULT_SAMPLES, "seq_len": DEFAULT_SEQ_LEN, "seed": 0, "bos": BOS[0]}
    chosen = {name: defaults[name] if value is None else value for name, value in settings.items()}
    reader = Reader(load_tokenizer(source, options.trust_remote_code), cache, progress, chosen.pop("bos"))
    return calibration_tokens(options.recipe, reader, **chosen), {}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(build_parser(), freeze, argv)


if __name__ == "__main__":
    raise SystemExit(main())
