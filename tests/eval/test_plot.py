"""The picture of a grid has a line for every combination of settings but the last."""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from eval import plot, speed, sweep
from llmprune.errors import InputError
from llmprune.pruning.recipe import EFFORTS

CELLS: plot.Cells = [
    (
        {"method": method, "sparsity": sparsity},
        {
            "mean_layer_error": 0.1,
            "evaluation": {"source": "a/b.txt", "dense": {"value": 9.0}, "pruned": {"value": value, "error": 0.5}},
            "texts": {"other": {"value": 2 * value, "error": 1.0}},
        },
    )
    for method, sparsity, value in (("x", "2:4", 20.0), ("x", "4:8", 15.0), ("y", "2:4", 18.0), ("y", "4:8", 12.0))
]


def test_lines_run_over_the_last_setting() -> None:
    found = plot.series(CELLS, "evaluation")
    assert found == {"x": [("2:4", 20, 0.5), ("4:8", 15, 0.5)], "y": [("2:4", 18, 0.5), ("4:8", 12, 0.5)]}
    assert plot.series(CELLS, "other")["y"][1] == ("4:8", 24, 1)
    assert plot.series(CELLS, None)["x"][0] == ("2:4", 0.1, 0)
    alone = [({"effort": "fast"}, CELLS[0][1])]
    assert plot.series(alone, "other") == {"pruned": [("fast", 40, 1)]}


@pytest.mark.parametrize("evaluated", [True, False])
def test_a_picture_is_drawn(tmp_path: Path, evaluated: bool) -> None:
    pytest.importorskip("matplotlib")
    bare: dict[str, Any] = {} if evaluated else {"evaluation": None, "texts": {}}
    cells = [(settings, result | bare) for settings, result in CELLS]
    plot.draw(cells, {"other": {"value": 9.0}}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_sweep_of_a_tiny_grid_gives_a_table_and_is_resumed(
    tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "g.toml").write_text(
        f'[grid]\nmethod = ["magnitude"]\n[fixed]\nmodel = "{tiny}"\nsparsity = "2:4"\ncalib = "{text}"\n'
        "samples = 2\nseq_len = 16\nno_eval = true\n"
    )
    flags = [str(tmp_path / "g.toml"), "--out", str(tmp_path / "out")]
    assert sweep.main(flags) == 0
    first = capsys.readouterr()
    assert first.out.splitlines()[0] == "| method | layer error | pruning, s |"
    assert "running" in first.err
    assert sweep.main(flags) == 0
    again = capsys.readouterr()
    assert again.out == first.out
    assert "running" not in again.err
    assert "g.png" in again.err or "no plot" in again.err


def test_a_cell_is_a_line_and_a_larger_grid_goes_on_from_the_cells_that_are_there(
    tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = (
        f'[grid]\nmethod = [METHODS]\n[fixed]\nmodel = "{tiny}"\nsparsity = "2:4"\ncalib = "{text}"\nsamples = 2\n'
        f'seq_len = 16\nno_eval = true\n[also]\ntexts = ["{text}"]\nwindows = 2\ncontext = 16\n'
    )
    flags = [str(tmp_path / "g.toml"), "--out", str(tmp_path)]
    (tmp_path / "g.toml").write_text(grid.replace("METHODS", '"wanda"'))
    assert sweep.main(flags) == 0
    first = (tmp_path / "g.jsonl").read_text()
    (tmp_path / "g.toml").write_text(grid.replace("METHODS", '"magnitude", "wanda"'))
    capsys.readouterr()
    assert sweep.main(flags) == 0
    said = capsys.readouterr()
    assert said.err.count("running") == 1
    assert [line.split(" | ")[0] for line in said.out.splitlines()[2:]] == ["| magnitude", "| wanda"]
    whole = (tmp_path / "g.jsonl").read_text()
    assert whole.startswith(first)
    dense, *rows = map(json.loads, whole.splitlines())
    assert dense["dense"].keys() == {text.name}
    assert [row["settings"] for row in rows] == [{"method": "wanda"}, {"method": "magnitude"}]
    assert rows[0]["command"].startswith(f"llmprune --model {tiny.name} --sparsity 2:4 --calib {text.name} ")
    assert not any(str(path.parent) in whole for path in (tiny, text, tmp_path))


def test_speeds_are_asked_for_by_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, len(asked) // 3, json.dumps({"speedup": len(asked)}), "too slow")

    monkeypatch.setattr(subprocess, "run", run)
    assert sweep.speeds("a", "b", ["transformers", "llama.cpp"], repeats=3) == {"transformers": 1, "llama.cpp": 2}
    parsed = [speed.build_parser().parse_args(command[3:]) for command in asked]
    assert [(one.dense, one.pruned, one.engine, one.repeats) for one in parsed] == [
        ("a", "b", "transformers", 3),
        ("a", "b", "llama.cpp", 3),
    ]
    with pytest.raises(InputError, match="too slow"):
        sweep.speeds("a", "b", ["transformers"])


def test_a_key_that_a_cell_lacks_stays_empty() -> None:
    result = {"mean_layer_error": 0.1, "evaluation": None, "texts": {}, "seconds": {"prune": 2.0}}
    rows = sweep.table([({"method": "wanda"}, result), ({"effort": "best"}, result)], {}).splitlines()
    assert rows[0] == "| method | effort | layer error | pruning, s |"
    assert rows[2:] == ["| wanda |  | 0.1000 | 2 |", "|  | best | 0.1000 | 2 |"]


def test_what_is_recovered_is_of_sparsegpt_on_the_same_settings() -> None:
    dense = {"text": {"value": 10.0}}
    values = {("2:4", "fast"): 1000.0, ("2:4", "best"): 100.0, ("50%", "fast"): 40.0, ("50%", "best"): 10.0}

    def result(sparsity: str, effort: str, tokens: str = "some") -> dict[str, Any]:
        return {
            "texts": {"text": {"value": values[sparsity, effort]}},
            "recipe": asdict(EFFORTS[effort]),
            "sparsity": {"pattern": sparsity},
            "calibration": {"sha256": tokens},
        }

    cells: sweep.Cells = [
        ({"sparsity": sparsity, "effort": effort}, result(sparsity, effort)) for sparsity, effort in values
    ]
    found = [sweep.recovered_fraction("text", settings, cells, dense) for settings, _ in cells]
    assert found == [0, pytest.approx(0.5), 0, 1]
    assert sweep.recovered_fraction("text", cells[1][0], cells[1:], dense) is None
    assert sweep.recovered_fraction("text", cells[1][0], cells, {}) is None
    other = ({"sparsity": "2:4", "effort": "best", "samples": 4}, result("2:4", "best", "others"))
    assert sweep.recovered_fraction("text", other[0], [*cells, other], dense) is None
