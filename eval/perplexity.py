"""`python -m eval.perplexity MODEL --text SRC [SRC ...]`: measure a model on texts, one block in memory at a time."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from llmprune.cli import Parser, hush_libraries, positive, run_command, window


def build_parser() -> Parser:
    """The flags."""
    parser = Parser(prog="python -m eval.perplexity", description=__doc__, allow_abbrev=False)
    parser.add_argument("model", help="model folder, Hub id, .gguf file, or demo")
    parser.add_argument("--text", nargs="+", required=True, metavar="SRC", help="text files, folders or data set names")
    parser.add_argument("--windows", type=positive, default=20, metavar="N", help="windows per text (default: 20)")
    parser.add_argument("--context", type=window, default=1024, metavar="N", help="tokens per window (default: 1024)")
    parser.add_argument("--json", action="store_true", help="the result as JSON on stdout")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def measure(model: str, texts: list[str], windows: int, context: int) -> dict[str, dict[str, float]]:
    """The perplexity of a model on each text, with its standard error."""
    from dataclasses import asdict

    from llmprune.checkpoint import SafetensorsFolder
    from llmprune.demo import default_cache
    from llmprune.perplexity import perplexity
    from llmprune.progress import Progress
    from llmprune.skeleton import Skeleton
    from llmprune.source import load_tokenizer, open_source
    from llmprune.tokens import evaluation_tokens

    quiet = Progress()
    source = open_source(model, revision=None, cache=default_cache(), trust_remote_code=False, progress=quiet)
    tokenizer = load_tokenizer(source, False)
    skeleton = Skeleton(source.config, SafetensorsFolder(source.folder))
    result = {}
    for text in texts:
        batch = evaluation_tokens(
            text, tokenizer, windows=windows, context=context, cache=default_cache(), progress=quiet
        )
        result[Path(text).name] = {
            **asdict(perplexity(skeleton, batch.tokens)),
            "sha256": batch.provenance.sha256,
        }
    return result


def run(options: argparse.Namespace) -> int:
    """Measure and print."""
    hush_libraries(options.debug)
    result = measure(options.model, options.text, options.windows, options.context)
    if options.json:
        print(json.dumps(result, indent=2))
        return 0
    for text, found in result.items():
        print(f"{text:<24} {found['value']:10.3f} ± {found['error']:.3f}  ({found['windows']} x {found['context']})")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(build_parser(), run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
