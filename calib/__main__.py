"""`python -m calib TEXT --model MODEL --out tokens.safetensors`: cut a text into windows, once and for all."""

from __future__ import annotations

import argparse
from pathlib import Path

from llmprune.cli import Parser, hush_libraries, positive, run_command, seed, window
from llmprune.tokens import DATASETS


def build_parser() -> Parser:
    """The flags."""
    parser = Parser(
        prog="python -m calib",
        description="Draw calibration windows from a text and freeze them in a hashed token file, "
        "which `llmprune --calib FILE` uses without a network or a tokenizer.",
        allow_abbrev=False,
    )
    parser.add_argument("text", metavar="TEXT", help=f"text file or folder, or {', '.join(DATASETS)}")
    parser.add_argument("--model", required=True, help="whose tokenizer to use: folder, Hub id, .gguf file, or demo")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="token file to write (.safetensors)")
    parser.add_argument("--samples", type=positive, default=128, metavar="N", help="windows (default: 128)")
    parser.add_argument("--seq-len", type=window, default=512, metavar="N", help="tokens per window (default: 512)")
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="choice of windows (default: 0)")
    parser.add_argument("--cache-dir", type=Path, metavar="DIR", help="demo data (default: ~/.cache/llmprune)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def freeze(options: argparse.Namespace) -> int:
    """Make the file."""
    hush_libraries(options.debug)
    from llmprune.demo import default_cache
    from llmprune.errors import InputError
    from llmprune.source import load_tokenizer, open_source
    from llmprune.terminal import TerminalProgress
    from llmprune.tokens import calibration_tokens, save_tokens

    if options.out.suffix != ".safetensors":
        raise InputError(f"--out {options.out} must end in .safetensors", "llmprune knows token files by that ending")
    progress = TerminalProgress()
    cache = options.cache_dir or default_cache()
    trust = options.trust_remote_code
    source = open_source(options.model, revision=None, cache=cache, trust_remote_code=trust, progress=progress)
    batch = calibration_tokens(
        options.text,
        load_tokenizer(source, trust),
        samples=options.samples,
        seq_len=options.seq_len,
        seed=options.seed,
        cache=cache,
        progress=progress,
    )
    try:
        save_tokens(batch, options.out)
    except OSError as error:
        raise InputError(f"cannot write {options.out}: {error.strerror}", "choose another --out") from error
    print(f"{options.out}: {options.samples} x {options.seq_len} tokens, sha256 {batch.provenance.sha256}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(build_parser(), freeze, argv)


if __name__ == "__main__":
    raise SystemExit(main())
