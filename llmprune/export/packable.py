"""Which tensors of a folder hold its N:M layers, and in which form."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from llmprune.errors import InputError
from llmprune.export.packed_forms import FORMS, Elements, Form
from llmprune.model.blocks import LayerRef
from llmprune.model.checkpoint import Checkpoint
from llmprune.model.dequantize import FLOAT8, find_groups
from llmprune.model.quantization import Quantization
from llmprune.model.reader import SafetensorsFolder
from llmprune.model.stored_forms import Group, Scaled, Words


@dataclass(frozen=True, slots=True)
class Packable:
    """How a tensor with weights lies in a folder.

    Args:
        form: of it.
        beside: the tensors that belong to it: scales, and what is said of its shape.
    """

    form: Form
    beside: tuple[str, ...] = ()


def packable(
    raw: SafetensorsFolder, stored: Quantization | None, checkpoint: Checkpoint, layers: Iterable[LayerRef]
) -> dict[str, Packable]:
    """The tensors of layers, by their names on disk.

    Args:
        raw: the folder as it stands.
        stored: how its weights are stored in fewer bits, if they are.
        checkpoint: of the model, in floating point.
        layers: of it.

    Raises:
        InputError: a weight is stored in a form that cannot be packed.
    """
    groups = find_groups(raw.entries, stored) if stored else {}
    found = {}
    for ref in layers:
        # Of experts that are stored one by one, every tensor has its inputs last.
        elements = Elements(ref.transposed and checkpoint.stored_as_is(ref.parameter))
        for name in checkpoint.disk_names([ref.parameter]):
            if (group := groups.get(name)) is None:
                found[name] = Packable(elements)
                continue
            disk, *beside = group.names
            found[disk] = Packable(_form(disk, group, raw, elements), tuple(beside))
    return found


def _form(disk: str, group: Group, raw: SafetensorsFolder, elements: Elements) -> Form:
    """The form of a weight that has scales.

    Raises:
        InputError: two values of four bits share a byte.
    """
    if isinstance(group, Words):
        return FORMS[f"int{group.bits}"]
    if isinstance(group, Scaled) and raw.entries[disk].field.dtype in FLOAT8:
        return elements
    raise InputError(
        f"{disk!r} is stored as two values of four bits a byte",
        "what can be packed is floating point, float8, and int4 or int8 of compressed-tensors",
    )
