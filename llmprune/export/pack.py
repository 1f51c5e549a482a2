"""Compact storage of N:M folders and its inverse: `llmprune pack`, `llmprune unpack`, `load`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmprune.errors import InputError, PruneError, printable
from llmprune.export.packable import Packable, packable
from llmprune.export.packed import Layout, PackedFile, pack_file
from llmprune.export.verify import LayerSelection, open_pruned
from llmprune.model.auto_class import CAUSAL, auto_class
from llmprune.model.bounded import Stored
from llmprune.model.checkpoint import Checkpoint
from llmprune.model.reader import INDEX, PACKED, SINGLE, SafetensorsFolder, read_index
from llmprune.model.skeleton import build_on_meta
from llmprune.progress import Progress
from llmprune.runtime.files import appearing_folder
from llmprune.runtime.foreign import check_inside, reading, user_path
from llmprune.runtime.ownership import is_regular, regular_files
from llmprune.sources.models import read_config, stored_form

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SUFFIX = "-packed"


@dataclass(slots=True)
class PackReport:
    """The result of `llmprune pack`.

    Args:
        out: the folder that was written.
        pattern: of the packed layers.
        packed: number of packed layers.
        plainly: selected layers that are stored unpacked, and why.
        weights: number of weights in the packed layers.
        layer_bytes: size of the packed layers with their scales, before and after.
        total_bytes: size of all tensors, before and after.
    """

    out: str
    pattern: str
    packed: int = 0
    plainly: dict[str, str] = field(default_factory=dict)
    weights: int = 0
    layer_bytes: list[int] = field(default_factory=lambda: [0, 0])
    total_bytes: list[int] = field(default_factory=lambda: [0, 0])

    def add(self, layouts: Iterable[Layout], tensors: Mapping[str, Packable]) -> None:
        """Add files.

        Args:
            layouts: theirs.
            tensors: that were to be packed.
        """
        sizes: dict[str, tuple[int, int]] = {}
        of_layers: set[str] = set()
        for layout in layouts:
            sizes |= {name: layout.sizes(name) for name in layout.plain}
            self.packed += len(layout.forms)
            self.weights += sum(prod(layout.shape(name)) for name in layout.forms)
            of_layers.update(one for name in layout.forms for one in (name, *tensors[name].beside))
        for totals, names in ((self.total_bytes, sizes.keys()), (self.layer_bytes, of_layers)):
            totals[:] = (total + sum(sizes[name][at] for name in names) for at, total in enumerate(totals))

    @property
    def bits_per_weight(self) -> float:
        """Of the packed layers, scales and positions included."""
        return 8 * self.layer_bytes[1] / max(self.weights, 1)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def text(self) -> str:
        """A summary in a few lines."""
        bits = f", {self.bits_per_weight:.2f} bits a weight" if self.weights else ""
        lines = [f"{self.packed} layers of {self.pattern} packed: {_sizes(self.layer_bytes)}{bits}"]
        lines += [f"stored plainly: {name}, {reason}" for name, reason in self.plainly.items()]
        return "\n".join(map(printable, [*lines, f"all tensors: {_sizes(self.total_bytes)}", f"saved to {self.out}"]))


def _sizes(sizes: list[int]) -> str:
    before, after = sizes
    return f"{before / 2**20:.1f} MiB -> {after / 2**20:.1f} MiB ({after / max(before, 1):.1%})"


def pack(
    folder: Path,
    out: Path | None = None,
    *,
    sparsity: str | None = None,
    only: tuple[str, ...] = (),
    skip: tuple[str, ...] = (),
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> PackReport:
    """Write a compact copy of a pruned folder: of its N:M layers the kept values and their positions.

    A weight of b bits takes `(M − N)/M · (b + ⌈log2 M⌉)` bits: of 2:4, 9 in bfloat16, 5 in int8, 3 in int4; scales stay
    as they are. One tensor at a time is in memory. See docs/guides/packed-folders.md for the format.

    Args:
        folder: what `prune` wrote, or any model folder together with `sparsity`.
        out: folder to make; None for the name of `folder` with `-packed` behind it.
        sparsity: the pattern; None for that of the folder's report.
        only, skip: patterns of layer names, see `llmprune.model.selection.matches`.
        trust_remote_code: whether code that comes with the model may run.
        progress: notified of the steps.

    Raises:
        InputError: no such folder, no N:M pattern, weights in a form that cannot be packed, `out` exists.
        PruneError: it cannot be written; nothing is left at `out`.
    """
    skeleton, goal, layers = open_pruned(folder, LayerSelection(sparsity, only=only, skip=skip), trust_remote_code)
    pattern = goal.pattern
    if pattern is None or pattern.nm is None:
        raise InputError(f"{goal.name} cannot be packed", "only N:M patterns keep the same number in every group")
    raw = SafetensorsFolder(user_path(folder))
    tensors = packable(raw, stored_form(folder), skeleton.checkpoint, (ref for ref, _ in layers))
    forms = {name: tensor.form for name, tensor in tensors.items()}
    files = sorted({entry.file for entry in raw.entries.values()})
    out = out or beside(folder, folder.resolve().name + SUFFIX)
    report, layouts = PackReport(str(out), pattern.name), []
    progress = progress or Progress()
    check_regular(files)
    with new_folder(out, folder) as partial:
        copy_others(folder, partial, {file.name for file in files}, progress)
        progress.start("packing", len(files))
        for file in files:
            layout, plainly = pack_file(file, partial / packed_name(file.name), pattern, forms)
            layouts.append(layout)
            report.plainly.update(plainly)
            progress.step()
        progress.finish()
    report.add(layouts, tensors)
    return report


def unpack(folder: Path, out: Path | None = None, *, progress: Progress | None = None) -> Path:
    """Write the plain folder that was packed, byte by byte the same.

    Args:
        folder: what `pack` wrote.
        out: folder to make; None for the name of `folder` without `-packed`.
        progress: notified of the steps.

    Returns:
        The folder that was written.

    Raises:
        InputError: `folder` is not packed or damaged, a file is not what was packed, or `out` exists.
        PruneError: it cannot be written; nothing is left at `out`.
    """
    files = packed_files(folder)
    name = folder.resolve().name
    out = out or beside(folder, name.removesuffix(SUFFIX) if name.endswith(SUFFIX) else f"{name}-plain")
    progress = progress or Progress()
    check_regular(file.file.path for file in files.values())
    with new_folder(out, folder) as partial:
        copy_others(folder, partial, {packed_name(name) for name in files}, progress)
        progress.start("unpacking", len(files))
        for name, file in files.items():
            file.unpack(partial / name)
            progress.step()
        progress.finish()
    return out


def load(folder: str | Path, **options: Any) -> PreTrainedModel:
    """Load a plain or a packed folder as a transformers model; nothing is unpickled.

    Code that comes with the model runs only with `trust_remote_code=True`.

    Args:
        folder: of a language model, or of one inside of a wrapper for images.
        options: for `from_pretrained`, such as `dtype` or `device_map`.

    Raises:
        InputError: no folder, or damaged.
    """
    import transformers

    folder = user_path(folder)
    if not folder.is_dir():
        raise InputError(f"there is no folder {str(folder)!r}", "name a model folder")
    trust = bool(options.pop("trust_remote_code", False))
    own = read_config(folder, trust)
    config = options.pop("config", None) or own
    hint = "the folder is damaged; copy it again, or check the options"
    if not is_packed(folder):
        stored = SafetensorsFolder(folder)
        model = build_on_meta(deepcopy(config), torch.float32, trust, stored.stored)
        if not getattr(config, "quantization_config", None):
            Checkpoint(stored, model)  # transformers gives random values to what is missing
        with reading(f"transformers cannot load {folder}", hint):
            loaded: PreTrainedModel = getattr(transformers, auto_class(config) or CAUSAL).from_pretrained(
                folder, config=config, use_safetensors=True, trust_remote_code=trust, **options
            )
        return loaded
    files = packed_files(folder)
    # The automatic class asks for a folder of plain files; the class it stands for does not.
    kind = type(build_on_meta(deepcopy(config), torch.float32, trust, packed_size(files.values())))
    tensors = {name: file.tensor(name) for file in files.values() for name in file.layout.plain}
    with reading(f"transformers cannot load {folder}", hint):
        loaded, found = kind.from_pretrained(
            None, config=config, state_dict=tensors, output_loading_info=True, trust_remote_code=trust, **options
        )
        if found["missing_keys"]:
            raise ValueError(f"its files lack {min(found['missing_keys'])!r}")
        loaded.config.name_or_path = str(folder)
        if (folder / "generation_config.json").exists():
            loaded.generation_config = transformers.GenerationConfig.from_pretrained(folder, trust_remote_code=False)
    return loaded


def is_packed(folder: Path) -> bool:
    """Whether a folder holds packed files."""
    return next(folder.glob(f"*{PACKED}"), None) is not None


def packed_name(plain: str) -> str:
    """`model.safetensors` -> `model.packed.safetensors`, so that no stock loader reads it as a plain file."""
    return plain.removesuffix(".safetensors") + PACKED


def packed_files(folder: Path) -> dict[str, PackedFile]:
    """The packed files of a folder by the names of the plain ones.

    Raises:
        InputError: there are none, one is missing or damaged.
    """
    folder = user_path(folder)
    if not is_packed(folder):
        raise InputError(f"{folder} holds no packed model", "name a folder that `llmprune pack` wrote")
    index = folder / INDEX
    # An index beside a whole file is one that was left over.
    whole = (folder / packed_name(SINGLE)).exists() or not index.exists()
    wanted = {SINGLE} if whole else {file.name for file in read_index(index).values()}
    if missing := sorted(name for name in wanted if not (folder / packed_name(name)).exists()):
        raise InputError(f"{folder} lacks {packed_name(missing[0])}", "copy the whole folder again")
    for name in wanted:
        check_inside(folder / packed_name(name), folder)
    return {name: PackedFile(folder / packed_name(name)) for name in sorted(wanted)}


def packed_size(files: Iterable[PackedFile]) -> Stored:
    """What packed files hold: number of tensors, and of weights once unpacked."""
    fields = [field for file in files for field in file.layout.plain.values()]
    return Stored(len(fields), sum(prod(field.shape) for field in fields))


def copy_others(folder: Path, target: Path, excluded: set[str], progress: Progress) -> None:
    """Copy the regular files of a folder without those of the paths `excluded`."""
    regular, others = regular_files(folder)
    warn_of_left_out(others, folder, progress)
    for path in regular:
        local = path.relative_to(folder)
        if local.as_posix() not in excluded:
            (target / local).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / local)


def warn_of_left_out(others: Iterable[Path], folder: Path, progress: Progress) -> None:
    """Name what is neither copied nor uploaded: whatever a link leads to may lie outside of the folder."""
    for path in others:
        progress.warn(f"left out: {path.relative_to(folder)} is a link or no regular file")


def check_regular(files: Iterable[Path]) -> None:
    """Refuse links in place of weights, without which a folder is no model.

    Raises:
        InputError: a file is a link, or no regular file.
    """
    for path in files:
        if not is_regular(path):
            raise InputError(
                f"{path} is a link or no regular file", "only files of the folder itself are taken: copy it with cp -rL"
            )


def beside(folder: Path, name: str) -> Path:
    """A folder of another name beside `folder`."""
    return folder.resolve().with_name(name)


@contextmanager
def new_folder(out: Path, source: Path) -> Iterator[Path]:
    """A hidden folder to fill, renamed to `out` if nothing is raised, and removed otherwise.

    Raises:
        InputError: `out` exists, or lies in `source`.
        PruneError: it cannot be written.
    """
    out = Path(os.path.realpath(user_path(out)))
    if source.resolve() in out.parents:
        raise InputError(f"{out} lies inside {source}", "choose another --out")
    try:
        with appearing_folder(out) as partial:
            yield partial
    except OSError as error:
        raise PruneError(
            f"cannot write {out}: {error.strerror or error}", "free disk space or choose another --out"
        ) from error
