"""What a run leaves when it is stopped, and how the same command goes on from there.

The work lies in `.NAME.partial`: the model so far, the hidden states on their way (of several processes, each has a
folder of its own), and `state.json`, which is replaced after every block and names all other files with their hashes.
What it does not name is of no use and goes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmprune.errors import InputError
from llmprune.model.writer import Shard, ShardWriter, write_json
from llmprune.pipeline.context import Prepared
from llmprune.progress import Progress
from llmprune.pruning.pattern import Scope, SparsityPattern, parse_pattern
from llmprune.reporting.report import PruneReport
from llmprune.runtime.files import sha256
from llmprune.streaming.cross_block_state import CannotBeSavedError
from llmprune.streaming.perplexity import Perplexity
from llmprune.streaming.stream import BlockStream

STATE, LOCK, MODEL, OWN, RANK = "state.json", "lock", "model", "own.safetensors", "rank-"
AGAIN = "free disk space and run the same command again, or choose another --out"


class Journal:
    """The finished blocks of a run, as they can be found again.

    Args:
        run: the job; its working folder exists and is locked.
        progress: told what is found.

    Attributes:
        dense: the perplexity of the source, once it is known.
        patterns: every block's pattern, once they are known.
    """

    def __init__(self, run: Prepared, progress: Progress) -> None:
        self.folder, self.model = run.partial, run.unfinished
        self.facts: dict[str, str] = {}
        self.progress = progress
        self._scope: Scope = getattr(run.pattern, "scope", "layer")
        self.state: dict[str, Any] = {}
        self.resumed = False
        self.dense: Perplexity | None = None
        self.patterns: Sequence[SparsityPattern | None] = ()

    @property
    def blocks(self) -> int:
        """How many are finished."""
        return int(self.streams[0]["done"]) if self.state else 0

    @property
    def streams(self) -> list[dict[str, Any]]:
        """Where every process goes on; nothing at the start."""
        return list(self.state.get("streams", ()))

    def open(self, facts: dict[str, str], restart: bool) -> None:
        """Take up what an earlier run left, or make room.

        Args:
            facts: what the result depends on, see `facts_of`.
            restart: whether to drop it.

        Raises:
            InputError: it is of a run with another result.
        """
        self.state = {} if restart else read_state(self.folder / STATE)
        self.resumed = bool(self.state)
        self.agree(facts)
        if self.state and (bad := self._damaged()):
            self.progress.warn(f"{bad} is damaged or missing: starting over")
            self.state, self.resumed = {}, False
        if self.resumed:
            self.dense = Perplexity(**self.state["dense"]) if self.state["dense"] else None
            self.patterns = parsed(self.state["patterns"], self._scope)
            self.writer().unseal()
            for number in range(len(self.streams)):
                _tidy(rank_folder(self.folder, number), self._files())
            self.progress.note(f"{self.blocks} blocks were finished before, in {self.folder}; going on from there")
        else:
            self._clear()

    def agree(self, facts: dict[str, str]) -> None:
        """Note what the result depends on.

        Raises:
            InputError: the finished blocks were made otherwise.
        """
        self.facts |= facts
        before = self.state.get("run", facts)
        for name, now in facts.items():
            if before.get(name, now) != now:
                raise InputError(
                    f"{self.folder} holds {self.blocks} finished blocks of another run: "
                    f"{name} was {before[name]}, now {now}",
                    "repeat that command to go on from there, drop its work with --restart, or choose another --out",
                )

    def writer(self) -> ShardWriter:
        """Goes on with the shards."""
        return ShardWriter(self.model, [Shard(**shard) for shard in self.state.get("shards", [])])

    def fill(self, report: PruneReport) -> None:
        """Put what was reported of the finished blocks into a report."""
        nothing: dict[str, Any] = {"layers": [], "refinements": [], "blocks": []}
        found = PruneReport.from_json({**report.to_json(), **self.state.get("report", nothing)})
        report.layers, report.refinements, report.blocks = found.layers, found.refinements, found.blocks

    @property
    def seconds(self) -> dict[str, float]:
        """How long the finished blocks took, stage by stage."""
        found: dict[str, float] = self.state["report"]["seconds"] if self.state else {}
        return found

    def save(self, stream: BlockStream, report: PruneReport, writer: ShardWriter) -> None:
        """Make a finished block durable: the shards are already, now come the hidden states and then the new state."""

        def write(streams: list[dict[str, Any]]) -> None:
            whole = report.to_json()
            self.state = {
                "run": self.facts,
                "shards": [asdict(shard) for shard in writer.shards],
                "dense": asdict(self.dense) if self.dense else None,
                "patterns": names_of(self.patterns),
                "report": {key: whole[key] for key in ("layers", "refinements", "blocks", "seconds")},
                "streams": streams,
            }
            write_json(self.folder / STATE, {"sha256": _digest(self.state), "state": self.state})

        if reason := keep(stream, self.folder, write):
            self.progress.note(f"{reason}, which cannot be saved: this run could not be resumed if it were stopped")

    def _files(self) -> dict[Path, str]:
        """All files that the state names, with their hashes."""
        files = {self.model / shard["file"]: str(shard["sha256"]) for shard in self.state["shards"]}
        for number, stream in enumerate(self.streams):
            files |= _files_of(stream, rank_folder(self.folder, number))
        return files

    def _damaged(self) -> Path | None:
        """The first file that is not what the state says."""
        writer = self.writer()
        sealed = dict(zip((shard.file for shard in writer.shards), writer.final_names(), strict=True))
        files = self._files()
        self.progress.start("checking finished blocks", len(files))
        for path, wanted in files.items():
            found = path if path.exists() else path.with_name(sealed.get(path.name, path.name))
            if not found.is_file() or sha256(found) != wanted:
                return path
            self.progress.step()
        self.progress.finish()
        return None

    def _clear(self) -> None:
        for path in set(self.folder.iterdir()) - {self.folder / LOCK}:
            _remove(path)
        self.model.mkdir()


def keep(stream: BlockStream, folder: Path, write: Callable[[list[dict[str, Any]]], None]) -> str:
    """Make what the blocks behind the one at hand need durable, in every process, and then drop what older ones needed.

    Args:
        stream: at the block.
        folder: of this process's files.
        write: names what all processes left, when all of it is durable; the first process's counts.

    Returns:
        why that cannot be done; empty if it is done.
    """
    try:
        own = stream.save()
    except CannotBeSavedError as error:
        own = {"reason": str(error)}
    streams = stream.group.all_gather_object(own)
    if reasons := [one["reason"] for one in streams if "reason" in one]:
        return str(reasons[0])
    write(streams)
    stream.group.barrier()
    _tidy(folder, _files_of(own, folder))
    return ""


def rank_folder(folder: Path, number: int) -> Path:
    """Where a process's hidden states rest."""
    return folder / f"{RANK}{number}" if number else folder


def _files_of(stream: Mapping[str, Any], folder: Path) -> dict[Path, str]:
    """The files that hold a stream, with their hashes."""
    return {folder / item["file"]: item["sha256"] for item in (*stream["hidden"], stream["carried"])}


def _tidy(folder: Path, files: Mapping[Path, str]) -> None:
    """Remove what nobody names."""
    for path in folder.iterdir():
        if path not in files and path.name not in {STATE, LOCK, MODEL, OWN} and not path.name.startswith(RANK):
            _remove(path)


def names_of(patterns: Sequence[SparsityPattern | None]) -> list[str]:
    """Patterns as JSON."""
    return [pattern.name if pattern else "" for pattern in patterns]


def parsed(names: Sequence[str], scope: Scope) -> list[SparsityPattern | None]:
    """The inverse of `names_of`."""
    return [parse_pattern(name, scope) if name else None for name in names]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def read_state(path: Path) -> dict[str, Any]:
    """What `Journal.save` wrote; nothing if it is not there or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        state: dict[str, Any] = found["state"]
        return state if found["sha256"] == _digest(state) else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def _digest(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()
