"""The comparison of int4 weights says what the figures say."""

from __future__ import annotations

import math

from eval.quantizers import AFTER, JOINT, OURS, PEER, PRUNED, build_parser, table


def test_the_table_says_what_fraction_of_the_damage_is_undone() -> None:
    perplexity = {"dense": {"a.txt": 20.0}, PEER: {"a.txt": 25.0}, "llmprune, balanced": {"a.txt": 22.0}}
    lines = table({"grid": "int4:g64", "perplexity": perplexity}).splitlines()
    undone = math.log(25 / 22) / math.log(25 / 20)
    assert lines[0] == "| int4:g64 | a.txt |"
    assert lines[-3:] == ["| dense | 20.00 |", f"| {PEER} | 25.00 |", f"| llmprune, balanced | 22.00 ({undone:.2f}) |"]


def test_damage_is_that_of_quantisation_alone() -> None:
    values = {"dense": 20.0, PRUNED: 40.0, PEER: 80.0, f"{JOINT}balanced": 40.0, f"{AFTER}GPTQ": 60.0}
    result = {"grid": "int4:g64", "sparsity": "2:4", "perplexity": {name: {"a": v} for name, v in values.items()}}
    lines = table(result).splitlines()
    assert lines[0] == "| 2:4, int4:g64 | a |"
    assert lines[-2] == f"| {JOINT}balanced | 40.00 (1.00) |"
    assert lines[-1] == f"| {AFTER}GPTQ | 60.00 ({math.log(80 / 60) / math.log(2):.2f}) |"


def test_the_settings_are_flags_of_the_command_line() -> None:
    from llmprune.cli.flags import build_parser as main_parser

    for flags in OURS.values():
        main_parser().parse_args(["--model", "demo", "--sparsity", "none", "--quantize", "int4", *flags])
    assert build_parser().prog == "python -m eval.quantizers"
