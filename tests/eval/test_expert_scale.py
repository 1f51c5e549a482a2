"""Blocks of experts are timed beside dense blocks with as many parameters."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval import expert_scale


def test_the_dense_block_has_as_many_parameters_in_the_usual_form(tmp_path: Path) -> None:
    flags = ["--hidden", "128", "--experts", "16", "--inner", "128", "--work", str(tmp_path), "--out", "none"]
    options = expert_scale.build_parser().parse_args(flags)
    found = {kind: expert_scale.write_model(kind, 1, options, tmp_path / kind) for kind in ("mixture", "dense")}
    assert found["dense"] == pytest.approx(found["mixture"], rel=0.02)


def test_the_table_tells_the_ratio_of_the_medians() -> None:
    keys = ("hidden", "experts", "active", "inner", "samples", "seq_len", "sparsity", "threads", "repeat")
    result = {
        "settings": dict.fromkeys(keys, 1),
        "parameters": {"mixture": 2e6, "dense": 2e6},
        "beside_dense": [{"effort": "fast", "mixture": [1.0, 3.0, 9.0], "dense": [2.0, 2.0, 2.0]}],
        "deep": [{"effort": "fast", "blocks": 4, "memory": 2**20}],
    }
    text = expert_scale.table(result)
    assert "| fast | 3.0 (1.0-9.0) | 2.0 (2.0-2.0) | 1.50 |" in text
    assert "| fast | 4 | 1 |" in text
