"""The page says what the report says, stands on its own, and is whole."""

from __future__ import annotations

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers import ROOT
from hypothesis import given
from hypothesis import strategies as st

from eval import compare
from llmprune import Job, PruneReport, prune
from llmprune.cli.main import main
from llmprune.reporting import charts as chart
from llmprune.reporting.html_report import PAGE, by_kind, report_page
from llmprune.reporting.report import Generation, split_name

EMPTY = {"meta", "rect", "line", "polyline", "circle"}


class Checked(HTMLParser):
    """Every tag that is opened is closed, and nothing comes from elsewhere."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []
        self.text = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        names = dict(attributes)
        assert not {"src", "href", "onload", "onclick"} & names.keys()
        assert tag not in {"script", "link", "iframe", "img"}
        if tag == "rect":
            self.cells.append(names["class"] or "")
        if tag not in EMPTY - {"rect", "circle"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag in EMPTY

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def pruned(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A refined model, with some layers left dense."""
    out = tmp_path_factory.mktemp("out") / "pruned"
    job = Job(
        str(tiny), "2:4", effort="best", calib=str(text), eval_text=str(text), out=out, skip=("*.1.*.v_proj",),
        samples=4, seq_len=32, eval_windows=3, eval_context=32, command="llmprune --model <tiny> & more",
    )  # fmt: skip
    prune(job)
    return out


def test_a_run_leaves_its_page(pruned: Path) -> None:
    report = PruneReport.read(pruned)
    page = (pruned / PAGE).read_text(encoding="utf-8")
    assert page == report_page(report)
    shown = Checked(page)
    assert report.evaluation
    for key in ("dense", "pruned"):
        value = report.evaluation[key]
        assert f"{value['value']:.2f} ± {value['error']:.2f}" in shown.text
    assert all(layer.name in shown.text for layer in report.layers)
    assert report.command in shown.text
    assert report.calibration["sha256"] in shown.text
    assert "Block-wise reconstruction" in shown.text
    # The errors of all layers; the inputs of four groups in two blocks, and of q and k where v is left dense.
    assert shown.cells.count("cell") == len(report.layers) + 9
    assert shown.cells.count("none") == 2
    assert not re.search(r"https?://|url\(|@import", page)
    assert not list(pruned.glob("*.tmp")) + list(pruned.glob(".*"))


def test_every_block_has_its_time_and_memory(pruned: Path) -> None:
    report = PruneReport.read(pruned)
    assert [block.name for block in report.blocks] == ["model.layers.0", "model.layers.1"]
    assert all(block.seconds > 0 for block in report.blocks)
    assert sum(block.seconds for block in report.blocks) <= report.seconds["prune"] + 0.01
    peaks = [block.peak_memory for block in report.blocks]
    assert 2**20 < peaks[0] <= peaks[1] <= report.peak_memory


def test_whatever_is_written_in_a_report_is_only_text(pruned: Path) -> None:
    report = PruneReport.read(pruned)
    evil = "</td><script>alert('x')</script>&amp;\x00"
    report.generations = [Generation(evil, evil, evil)]
    report.warnings, report.command = [evil], evil
    report.model = report.model | {"name": evil}
    shown = Checked(report_page(report))
    assert shown.text.count("alert('x')") >= 6


def test_a_report_without_blocks_or_evaluation_has_a_page(pruned: Path) -> None:
    value = json.loads((pruned / "prune_report.json").read_text())
    del value["blocks"], value["generations"]
    value |= {"evaluation": None, "reconstructions": [], "seconds": {}, "peak_memory": 0, "layers": []}
    Checked(report_page(PruneReport.from_json(value)))


def test_the_page_is_drawn_anew_with_generated_text(
    pruned: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(pruned, tmp_path / "copy"))
    (folder / PAGE).unlink()
    assert main(["report", str(folder)]) == 0
    assert (folder / PAGE).read_text() == (pruned / PAGE).read_text()
    generate = ["report", str(folder), "--generate", "5", "--prompt", "w1 w2", "--prompt", "w3"]
    assert main(generate) == 2
    assert "hint: add --dense MODEL" in capsys.readouterr().err
    assert main([*generate, "--dense", str(tiny)]) == 0
    generations = PruneReport.read(folder).generations
    assert [item.prompt for item in generations] == ["w1 w2", "w3"]
    assert all(1 <= len(text.split()) <= 5 for item in generations for text in (item.dense, item.pruned))
    assert generations[0].dense in Checked((folder / PAGE).read_text()).text
    assert main(["pack", str(folder)]) == 0
    packed = tmp_path / "copy-packed"
    assert main(["report", str(packed), *generate[2:], "--dense", str(tiny)]) == 0
    assert PruneReport.read(packed).generations == generations
    assert main(["report", str(tiny)]) == 2
    assert main(["report", str(folder), "--generate", "5", "--dense", str(tmp_path / "nothing")]) == 2
    assert "there is no folder" in capsys.readouterr().err


# Charts


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=200), st.integers(1, 6))
def test_any_series_can_be_drawn(values: list[float], count: int) -> None:
    shown = Checked(chart.lines({f"<{number}>": values for number in range(count)}))
    assert ("<0>" in shown.text) == (count > 1) or f"<0>, block 0: {values[0]:.3g}" in shown.text
    for y in map(float, re.findall(r'cy="(.*?)"', chart.lines({"x": values}))):
        assert 7 <= y <= chart.HEIGHT + 9


@given(st.floats(1e-9, 1e9))
def test_the_axis_is_round_and_reaches_the_top(top: float) -> None:
    steps = chart._steps(top)
    assert steps[0] == 0
    assert top <= steps[-1] * (1 + 1e-6)
    assert steps[-1] < top * 2 + 1e-12
    assert 2 <= len(steps) <= 7


def test_a_heat_map_has_a_cell_a_value() -> None:
    svg = chart.heat_map({"a<b": [0.0, 0.5, 1.0, math.nan], "c": [2.0, 0.1, 0.2, 0.3]}, 1.0)
    shown = Checked(svg)
    assert shown.cells == ["cell"] * 3 + ["none"] + ["cell"] * 4
    assert re.findall(r"--v:([\d.]+)%", svg) == ["0.0", "50.0", "100.0", "100.0", "10.0", "20.0", "30.0"]
    assert "a<b, block 3: left dense" in shown.text


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("model.layers.12.mlp.up_proj", (12, "mlp.up_proj")),
        ("transformer.h.0.attn.c_attn", (0, "attn.c_attn")),
        ("model.layers.3.mlp.experts.5.w1", (3, "mlp.experts.5.w1")),
        ("layers.1.up", (1, "up")),
        ("head", (0, "head")),
    ],
)
def test_a_layer_has_a_block_and_a_name_in_it(name: str, parts: tuple[int, str]) -> None:
    assert split_name(name) == parts


def test_layers_that_only_some_blocks_have_leave_gaps() -> None:
    rows = by_kind([("h.0.a", 1.0), ("h.2.a", 3.0), ("h.1.b", 2.0)])
    assert rows["a"][::2] == [1.0, 3.0]
    assert [math.isnan(value) for value in rows["a"] + rows["b"]] == [False, True, False, True, False, True]


# Several runs


def test_runs_are_shown_side_by_side(pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(pruned), str(ROOT / "eval" / "results" / "demo.jsonl")]
    assert compare.main([*runs, "--out", str(tmp_path / "runs.html")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 6
    shown = Checked((tmp_path / "runs.html").read_text())
    assert "wanda" in shown.text
    assert "admm (effort best)" in shown.text
    assert shown.cells.count("cell") == 13 + 3 * 210
    assert compare.main([*runs, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    report = PruneReport.read(pruned)
    assert rows[0]["layer error"] == pytest.approx(report.mean_error)
    assert report.evaluation
    assert rows[0]["perplexity, pruned"].startswith(f"{report.evaluation['pruned']['value']:.2f}")


def test_runs_are_drawn_as_a_picture(pruned: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert compare.main([str(pruned), str(pruned), "--out", str(tmp_path / "new" / "runs.png")]) == 0
    assert (tmp_path / "new" / "runs.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_no_run_is_refused(
    pruned: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list.json").write_text("[]")
    for path in (tiny, tmp_path / "none", tmp_path / "list.json", tmp_path / "none.jsonl"):
        assert compare.main([str(path)]) == 2
        assert "is no run" in capsys.readouterr().err
    assert compare.main([str(pruned), "--out", str(tmp_path / "runs.gif")]) == 2
    assert "neither .png nor .html" in capsys.readouterr().err
