"""The state of a run, from which the same command resumes after a stop.

The work lies in `.NAME.partial`: the model so far, the hidden states on their way (every process but the first has a
folder of its own), and `state.json`, which is replaced after every block and names all other files with their hashes.
Files that it does not name are of no use and are removed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from llmprune.errors import InputError
from llmprune.model.writer import Shard, ShardWriter
from llmprune.pipeline.context import RANK, RunContext, rank_folder
from llmprune.progress import Progress
from llmprune.pruning.pattern import PatternScope, SparsityPattern, parse_pattern
from llmprune.reporting.report import PruneReport
from llmprune.runtime.files import sha256, write_json
from llmprune.runtime.ownership import OWN, clear, delete
from llmprune.streaming.block import Block
from llmprune.streaming.cross_block_state import CannotBeSavedError
from llmprune.streaming.perplexity import Perplexity
from llmprune.streaming.stream import BlockStream

STATE, MODEL, GENERATED = "state.json", "model", "generated.safetensors"
FORMAT, VERSION = "the format of the finished blocks", "2"
RESUME_HINT = "free disk space and run the same command again, or choose another --out"


class WorkerState:
    """The state of a process other than rank 0: it saves the hidden states of its own windows and nothing else.

    Args:
        run: the job.
        progress: told what is found.

    Attributes:
        fingerprint: what the result depends on, as far as it is known; here nothing.
        dense: the perplexity of the dense model, once it is known; here never.
        patterns: every block's pattern, once they are known.
        block_choice: numbers of the blocks that are removed, and names of the layers that compensate, once they are
            known.
    """

    def __init__(self, run: RunContext, progress: Progress) -> None:
        self.folder, self.progress = run.rank_workdir, progress
        self.rows = run.procedure.sharding.rows
        self.state: dict[str, Any] = {}
        self.fingerprint: dict[str, str] = {}
        self.dense: Perplexity | None = None
        self.patterns: Sequence[SparsityPattern | None] = ()
        self.block_choice: dict[str, Any] = {}

    @property
    def streams(self) -> list[dict[str, Any]]:
        """The last saved streams of all processes; empty at the start."""
        return list(self.state.get("streams", ()))

    @property
    def saved_rows(self) -> list[int]:
        """Number of rows that every process had solved then."""
        return list(self.state.get("rows", ()))

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds that the finished blocks took, by stage."""
        found: dict[str, float] = self.state["report"]["seconds"] if self.state else {}
        return found

    def begin(self, run: RunContext, report: PruneReport) -> None:
        """Start behind the last finished block: put what was reported of the finished ones into the report."""
        nothing: dict[str, Any] = {"layers": [], "reconstructions": [], "mixtures": [], "blocks": []}
        found = PruneReport.from_json({**report.to_json(), **self.state.get("report", nothing)})
        report.layers, report.reconstructions, report.blocks = found.layers, found.reconstructions, found.blocks
        report.mixtures = found.mixtures

    def check_compatible(self, fingerprint: Mapping[str, str]) -> None:
        """Rank 0 compares the fingerprint with that of an earlier run."""

    def write(self, block: Block) -> None:
        """Rank 0 writes the block's shard."""

    def commit(self, stream: BlockStream, report: PruneReport) -> None:
        """Make durable, in every process, what later blocks need of the current one; then drop what older ones needed.

        Args:
            stream: at the block.
            report: of the run so far.
        """
        try:
            own = stream.save()
        except CannotBeSavedError as error:
            own = {"reason": str(error)}
        streams = stream.group.all_gather_object(own)
        if reasons := [one["reason"] for one in streams if "reason" in one]:
            self.progress.note(f"{reasons[0]}, which cannot be saved: this run could not be resumed if it were stopped")
            return
        self._replace(streams, report)
        stream.group.barrier()
        _tidy(self.folder, _files_of(own, self.folder))

    def finish(self) -> None:
        """Rank 0 writes the index of the shards."""

    def _replace(self, streams: list[dict[str, Any]], report: PruneReport) -> None:
        """Rank 0 replaces the state file, when the files of all processes are durable."""


class RunState(WorkerState):
    """The finished blocks of a run, as rank 0 keeps them.

    Args:
        run: the job; its working directory exists and is locked.
        progress: told what is found.

    Attributes:
        resumed: number of blocks that an earlier process finished.
        sealed: whether the shards have their final names.
    """

    def __init__(self, run: RunContext, progress: Progress) -> None:
        super().__init__(run, progress)
        self.model, self._limit = run.unfinished, run.job.max_shard_size
        self.state = read_state(self.folder / STATE)
        self.resumed, self.sealed = self.blocks, False
        self._scope: PatternScope = run.pattern.scope if run.pattern else "layer"
        self._writer = ShardWriter(self.model, self._limit)
        self._total = len(run.skeleton.blocks)
        self._renumbered: Callable[[str], str] = str

    @property
    def blocks(self) -> int:
        """Number of finished blocks."""
        return int(self.streams[0]["done"]) if self.state else 0

    def open(self, fingerprint: Mapping[str, str], restart: bool) -> None:
        """Resume what an earlier run left, or clear the folder.

        Args:
            fingerprint: what the result depends on, see `workdir.fingerprint_of`.
            restart: whether to drop it.

        Raises:
            InputError: it is of a run with another result.
        """
        if restart:
            self.state = {}
        self.check_compatible(fingerprint)
        if self.state and (bad := self._damaged()):
            self.progress.warn(f"{bad} is damaged or missing: starting over")
            self.state = {}
        if self.state:
            self.dense = Perplexity(**self.state["dense"]) if self.state["dense"] else None
            self.patterns = parsed(self.state["patterns"], self._scope)
            self.block_choice = self.state.get("block_choice", {})
            self._shards().unseal()
            for number in range(len(self.streams)):
                _tidy(rank_folder(self.folder, number), self._files())
            self.progress.note(f"{self.blocks} blocks were finished before, in {self.folder}; going on from there")
        else:
            clear(self.folder)
            self.model.mkdir()
        self.resumed = self.blocks

    def check_compatible(self, fingerprint: Mapping[str, str]) -> None:
        """Add to the fingerprint, and compare it with that of the finished blocks.

        Raises:
            InputError: the finished blocks were made otherwise.
        """
        self.fingerprint |= fingerprint
        before = self.state.get("run", fingerprint)
        for name, now in fingerprint.items():
            # The first format did not name itself.
            was = before.get(name, "1" if name == FORMAT else now)
            if was != now:
                again = "" if name == FORMAT else "repeat that command to go on from there, "
                raise InputError(
                    f"{self.folder} holds {self.blocks} finished blocks of another run: {name} was {was}, now {now}",
                    f"{again}drop its work with --restart, or choose another --out",
                )

    def begin(self, run: RunContext, report: PruneReport) -> None:
        """Start behind the last finished block; write what lies outside of the blocks if nothing is written yet."""
        super().begin(run, report)
        self._writer, self._renumbered = self._shards(), run.renumbered
        if not self._writer.shards:
            self._write(run.skeleton.export_outside())

    def write(self, block: Block) -> None:
        """Write the block's shard."""
        self._write(block.export())

    def _write(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        self._writer.write((self._renumbered(name), tensor) for name, tensor in tensors)

    def finish(self) -> None:
        """Join the shards of the blocks to few files, give those their final names, and write their index."""
        writer = self._writer
        self.progress.start("joining shards", len(writer.shards))
        for replaced in writer.join():
            if self.blocks == self._total:
                self._save(shards=[asdict(shard) for shard in writer.shards])
            for file in replaced:
                delete(self.model / file)
            self.progress.step(len(replaced))
        self.progress.finish()
        writer.seal()
        self.sealed = True

    def _replace(self, streams: list[dict[str, Any]], report: PruneReport) -> None:
        whole = report.to_json()
        self._save(
            run=self.fingerprint,
            shards=[asdict(shard) for shard in self._writer.shards],
            dense=asdict(self.dense) if self.dense else None,
            patterns=names_of(self.patterns),
            block_choice=self.block_choice,
            report={key: whole[key] for key in ("layers", "reconstructions", "mixtures", "blocks", "seconds")},
            streams=streams,
            rows=list(self.rows),
        )

    def _save(self, **changes: Any) -> None:
        """Replace the state file by one with other values."""
        self.state = {**self.state, **changes}
        write_json(self.folder / STATE, {"sha256": _digest(self.state), "state": self.state})

    def _shards(self) -> ShardWriter:
        """Continues the shards that the state names."""
        return ShardWriter(self.model, self._limit, [Shard(**shard) for shard in self.state.get("shards", [])])

    def _files(self) -> dict[Path, str]:
        """All files that the state names, with their hashes."""
        files = {self.model / shard["file"]: str(shard["sha256"]) for shard in self.state["shards"]}
        for number, stream in enumerate(self.streams):
            files |= _files_of(stream, rank_folder(self.folder, number))
        return files

    def _damaged(self) -> Path | None:
        """The first file whose hash differs from the state's."""
        writer = self._shards()
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


def _files_of(stream: Mapping[str, Any], folder: Path) -> dict[Path, str]:
    """The files that hold a stream, with their hashes."""
    return {folder / item["file"]: item["sha256"] for item in (*stream["hidden"], stream["cross_block_state"])}


def _tidy(folder: Path, files: Mapping[Path, str]) -> None:
    """Remove files that nothing names."""
    for path in folder.iterdir():
        if path not in files and path.name not in {STATE, MODEL, GENERATED, *OWN} and not path.name.startswith(RANK):
            delete(path)


def names_of(patterns: Sequence[SparsityPattern | None]) -> list[str]:
    """Patterns as JSON."""
    return [pattern.name if pattern else "" for pattern in patterns]


def parsed(names: Sequence[str], scope: PatternScope) -> list[SparsityPattern | None]:
    """The inverse of `names_of`."""
    return [parse_pattern(name, scope) if name else None for name in names]


def read_state(path: Path) -> dict[str, Any]:
    """The state that `RunState.commit` wrote; empty if it is not there or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        state: dict[str, Any] = found["state"]
        return state if found["sha256"] == _digest(state) else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def _digest(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()
