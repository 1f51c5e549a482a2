"""What users try that there is not: flags that are no field of `Job`, and words where a flag is expected."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

COMMANDS = ("quantize", "verify", "push", "pack", "unpack", "export", "distill", "report")
PRUNE = "llmprune --model MODEL --sparsity 2:4"
_PROGRESS = "progress is shown already, unless --quiet is given; --debug adds the traceback of an error"
ANSWERS = {
    "-v": _PROGRESS,
    "--verbose": _PROGRESS,
    "--evaluate": "leave it out: perplexity is measured anyway; --eval TEXT says on what",
    "--progress": _PROGRESS,
    "--log-level": _PROGRESS,
    "-V": "use --version",
    "-q": "use --quiet",
    "--silent": "use --quiet",
    "-n": "use --dry-run",
    "--plan": "use --dry-run",
    "--estimate": "use --dry-run",
    "--info": "use --dry-run",
    "--resume": "leave it out: the same command goes on from the blocks that are finished; --restart drops them",
    "--token": "log in once with `hf auth login`, or set HF_TOKEN",
    "--hf-token": "log in once with `hf auth login`, or set HF_TOKEN",
    "--push": "use --push-to-hub ORG/NAME",
    "--upload": "use --push-to-hub ORG/NAME",
    "--repo-id": "use --push-to-hub ORG/NAME",
    "--hub-model-id": "use --push-to-hub ORG/NAME",
    "--batch-size": "leave it out: windows are batched as memory allows",
    "--damping": "use --option damping=0.03, an option of sparsegpt",
    "--dampening-frac": "use --option damping=0.03, an option of sparsegpt",
    "--percdamp": "use --option damping=0.03, an option of sparsegpt",
}
"""Flags that are no field of `Job`, and what to do instead."""
_WORDS = {
    **dict.fromkeys(("help", "usage"), "llmprune --help"),
    "version": "llmprune --version",
    **dict.fromkeys(
        ("info", "inspect", "plan", "show", "estimate"),
        f"{PRUNE} --dry-run shows the plan; llmprune verify DIR a result",
    ),
    **dict.fromkeys(
        ("eval", "evaluate", "perplexity", "benchmark"), f"{PRUNE} --eval TEXT measures perplexity before and after"
    ),
    **dict.fromkeys(("quantise", "quantization"), "llmprune quantize DIR int4"),
    **dict.fromkeys(("gguf", "convert", "to-gguf"), "llmprune export DIR gguf"),
    **dict.fromkeys(
        ("finetune", "train"), f"{PRUNE} --reconstruct EPOCHS trains each block; llmprune distill DIR the whole model"
    ),
    **dict.fromkeys(("distil", "kd", "heal", "recover"), "llmprune distill DIR --teacher MODEL"),
    "check": "llmprune verify DIR",
    "upload": "llmprune push DIR ORG/NAME",
}
_SAME = ("prune", "run", "sparsify", "compress", "oneshot", "start")


def answer(word: str, rest: Sequence[str] = ()) -> str:
    """What to type in place of a word that is neither a flag, nor a flag's value, nor a command.

    Args:
        word: what the user typed.
        rest: what follows it.
    """
    more = shlex.join(rest)
    if word.lower() in _SAME:
        return f"pruning needs no such word: {f'llmprune {more}' if more else PRUNE}"
    if known := _WORDS.get(word.lower()) or _as_value(word):
        return known
    if close := difflib.get_close_matches(word.lower(), COMMANDS, 1):
        return f"did you mean llmprune {close[0]} {more or 'DIR'}?"
    return f"to prune: {PRUNE}; other commands are {', '.join(COMMANDS)}; see llmprune --help"


def _as_value(word: str) -> str:
    """The command for a word that is a folder, a pattern or a model; '' if it is none of them."""
    if Path(word).is_dir():
        pruned = (Path(word) / "prune_report.json").exists()
        return f"llmprune verify {shlex.quote(word)}" if pruned else PRUNE.replace("MODEL", shlex.quote(word))
    if re.fullmatch(r"\d+:\d+|\d*\.?\d+%?|(channels|heads):.*", word):
        return f"use --sparsity {word}"
    if word == "demo" or re.fullmatch(r"[\w.-]+/[\w.-]+|.*\.gguf", word):
        return PRUNE.replace("MODEL", shlex.quote(word))
    return ""
