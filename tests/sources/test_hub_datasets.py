"""Data sets are read by the real `datasets` client from a Hub on the loopback, in a process of its own."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from helpers import ROOT
from hub_server import Hub

from llmprune.sources.texts import DATASETS
from llmprune.sources.tokens import load_tokens

RECIPE = """
samples = 8
seq_len = 16
[[source]]
repo = "me/docs"
"""
SCRIPT = """
import json, sys
from calib.__main__ import main as calib
from eval.perplexity import main as perplexity
for command in json.load(sys.stdin):
    assert {"calib": calib, "perplexity": perplexity}[command[0]](command[1:]) == 0
"""


def parquet(rows: list[str], column: str) -> bytes:
    target = io.BytesIO()
    pq.write_table(pa.table({column: rows}), target)
    return target.getvalue()


def test_texts_are_streamed_in_spite_of_failures(tiny: Path, tmp_path: Path) -> None:
    entry = DATASETS["ptb"]
    assert entry.revision
    splits = {split: parquet([f"w{n} w{n % 7}" for n in range(90)], "sentence") for split in ("train", "test")}
    rows = [{"text": " ".join(f"w{(start + n) % 90}" for n in range(40))} for start in range(60)]
    lines = "\n".join(map(json.dumps, rows)).encode()
    (tmp_path / "r.toml").write_text(RECIPE)
    flags = "perplexity MODEL --text ptb --windows 2 --context 16 --json"
    commands = [flags, *(f"calib r.toml --model MODEL --out {name}.safetensors" for name in ("whole", "broken"))]
    given = [[str(tiny) if word == "MODEL" else word for word in command.split()] for command in commands]
    with Hub() as hub:
        # As the Hub has it: a script in the main branch, what became of it in another.
        repository = hub.add(entry.repo, {"ptb_text_only.py": b"raise SystemExit"})
        repository.commit(entry.revision, {f"{entry.folder}/{name}/0.parquet": data for name, data in splits.items()})
        hub.add("me/docs", {"train.jsonl": lines})
        for status in (0, 500):
            hub.fail("GET /datasets/me/docs/resolve", status, after=1, times=1)
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        environment = os.environ | settings | {"NO_PROXY": "127.0.0.1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], input=json.dumps(given), capture_output=True, text=True, check=False,
            cwd=tmp_path, env=environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert any(f"{entry.folder}/test/" in request for request in hub.requests)
        assert [failure.times for failure in hub.failures] == [0, 0]
    (found,) = json.loads(done.stdout[: done.stdout.rindex("}") + 1])["results"]
    assert (found["text"], found["windows"], found["context"]) == ("ptb", 2, 16)
    one, other = (load_tokens(tmp_path / f"{name}.safetensors", None, None, 96) for name in ("whole", "broken"))
    assert one.tokens.shape == (8, 16)
    assert one.tokens.equal(other.tokens)
