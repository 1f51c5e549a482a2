"""The comparison of int4 weights says what the figures say."""

from __future__ import annotations

import math

from eval.quantizers import OURS, PEER, build_parser, table


def test_the_table_says_what_fraction_of_the_damage_is_undone() -> None:
    perplexity = {"dense": {"a.txt": 20.0}, PEER: {"a.txt": 25.0}, "llmprune, balanced": {"a.txt": 22.0}}
    lines = table({"grid": "int4:g64", "perplexity": perplexity}).splitlines()
    undone = math.log(25 / 22) / math.log(25 / 20)
    assert lines[0] == "| int4:g64 | a.txt |"
    assert lines[-3:] == ["| dense | 20.00 |", f"| {PEER} | 25.00 |", f"| llmprune, balanced | 22.00 ({undone:.2f}) |"]


def test_the_settings_are_flags_of_the_command_line() -> None:
    from llmprune.cli.flags import build_parser as main_parser

    for flags in OURS.values():
        main_parser().parse_args(["--model", "demo", "--sparsity", "none", "--quantize", "int4", *flags])
    assert build_parser().prog == "python -m eval.quantizers"
