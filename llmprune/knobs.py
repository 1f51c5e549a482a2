"""A knob: one setting of a run, described once, in the metadata of its dataclass field.

The flags of the command line, the checks of values, the words of reports and the reference tables are made from it.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from llmprune.errors import InputError

T = TypeVar("T")
REQUIRED: Any = MISSING
"""The default of a knob that must be set."""


@dataclass(frozen=True, slots=True)
class Kind:
    """The values that a knob takes.

    Args:
        metavar: stands for a value in the help; '' for a switch.
        range: the values in words.
        read: returns the value that a text or a Python object stands for; raises an `InputError` whose message goes on
            where the knob and the text have been named.
    """

    metavar: str
    range: str
    read: Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class Knob:
    """One setting of a run.

    Args:
        group: of settings that are listed together.
        help: one line.
        kind: the values it takes.
        name: of the field.
        default: of the field; `MISSING` where it must be set.
        flag: of the command line, where that is not `--` and the name; `--no-...` of a switch that is on.
        metavar: where it says more than the kind's.
        unit: of a value.
        default_text: the default in words, where the field's is None.
        applies_to: the patterns it is for, where that is not all.
        label: format of a value that is not the default, for reports.
        repeatable: whether the field is a tuple and the flag may be given more than once.
        earlier: names that the field had before, which are still taken.
        guesses: its names elsewhere, which are answered, not taken; `gpu=cuda` where the name implies a value.
    """

    group: str
    help: str
    kind: Kind
    name: str = ""
    default: Any = None
    flag: str = ""
    metavar: str = ""
    unit: str = ""
    default_text: str = ""
    applies_to: str = ""
    label: str = ""
    repeatable: bool = False
    earlier: tuple[str, ...] = ()
    guesses: tuple[str, ...] = ()

    @property
    def range(self) -> str:
        """The values in words."""
        return self.kind.range

    @property
    def is_switch(self) -> bool:
        """Whether the flag takes no value."""
        return not self.metavar

    def of_field(self, field: Field[Any]) -> Knob:
        """The knob with what its field says."""
        default = field.default
        return replace(
            self,
            name=field.name,
            default=default,
            flag=self.flag or flag_of(field.name),
            metavar=self.metavar or self.kind.metavar,
            default_text=self.default_text or ("" if default in (MISSING, None, ()) else spelled(default)),
        )

    def read(self, value: Any) -> Any:
        """The value that a text of the command line or a Python object stands for.

        Raises:
            InputError: the knob does not take it.
        """
        if value is None and self.default is None:
            return None
        if not self.repeatable:
            return self._read(value)
        if isinstance(value, str):
            value = [value]
        elif isinstance(value, Mapping):
            value = value.items()
        elif not isinstance(value, Iterable):
            raise InputError(f"{self.flag} {spelled(value)} is no list of values", f"give {self.name} as a tuple")
        return tuple(self._read(item) for item in value)

    def _read(self, value: Any) -> Any:
        try:
            return self.kind.read(value)
        except InputError as error:
            raise InputError(f"{self.flag} {spelled(value)} {error.message}", error.hint) from None


def knob(default: T, group: str, text: str, kind: Kind, **more: Any) -> T:
    """A dataclass field that is a knob; `more` are fields of `Knob`."""
    made: T = field(default=default, metadata={"knob": Knob(group, text, kind, **more)})
    return made


def optional(cls: type, name: str) -> Any:
    """The same knob as a field of another class, which may be left unset (None)."""
    (known,) = (each for each in fields(cls) if each.name == name)
    return field(default=None, metadata=known.metadata)


def same(cls: type, name: str, **more: Any) -> Any:
    """The same knob, with the same default, as a field of another class; `more` are fields of `Knob` that differ."""
    (known,) = (each for each in fields(cls) if each.name == name)
    return field(default=known.default, metadata={"knob": replace(known.metadata["knob"], **more)})


def knobs_of(cls: type) -> list[Knob]:
    """The knobs of a dataclass, in the order of its fields."""
    return [field.metadata["knob"].of_field(field) for field in fields(cls) if "knob" in field.metadata]


def spellings(knobs: Iterable[Knob]) -> dict[str, tuple[Knob, str]]:
    """The names of knobs, now, before and elsewhere, as flags: the knob, and the value that the name implies or ''."""
    found: dict[str, tuple[Knob, str]] = {}
    for each in knobs:
        for spelling in (each.name, each.flag, *each.earlier, *each.guesses):
            name, _, value = spelling.partition("=")
            found.setdefault(flag_of(name), (each, value))
    return found


def nearest(word: str, known: Mapping[str, T]) -> T | None:
    """What stands under the word written as a flag, or under the flag that is nearest; None if none is near."""
    flag = flag_of(word)
    close = [flag, *difflib.get_close_matches(flag, known, 1, 0.75)]
    return next((known[name] for name in close if name in known), None)


def flag_of(name: str) -> str:
    """`seq_len` -> `--seq-len`; `m` -> `-m`."""
    words = name.lstrip("-").replace("_", "-")
    return f"--{words}" if len(words) > 1 else f"-{words}"


def spelled(value: Any) -> str:
    """A value as a user would type it: `yes`, `128`, `c4`; in quotes where it would not be seen."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = str(value)
    return text if text.isprintable() and text.strip() else repr(value)


def whole(least: int = 1, metavar: str = "N", below: int = 2**31) -> Kind:
    """Whole numbers from `least` to `below` exclusive."""

    def read(value: Any) -> int:
        if isinstance(value, str) and value.isdecimal() and value.isascii() and len(value) <= len(str(below)):
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < below:
            limit = f" and below {below}" if isinstance(value, int) and value >= below else ""
            raise InputError(f"is not a whole number of at least {least}{limit}", f"use {least} or more")
        return value

    return Kind(metavar, f"whole number, at least {least}", read)


def choice(*tables: Iterable[str], metavar: str = "NAME", also: Mapping[str, str] | None = None) -> Kind:
    """Names of tables, looked up when a value is read.

    Args:
        tables: of names.
        metavar: stands for a value in the help.
        also: other spellings, and the names that they stand for.
    """

    def read(value: Any) -> str:
        names = list(dict.fromkeys(chain(*tables)))
        name = (also or {}).get(str(value).lower(), str(value))
        if name not in names:
            close = difflib.get_close_matches(name.lower(), names, 1)
            hint = f"choose from {', '.join(names)}" + (f"; did you mean {close[0]}?" if close else "")
            raise InputError("is unknown", hint)
        return name

    return Kind(metavar, ", ".join(dict.fromkeys(chain(*tables))), read)


def _read_text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | Path | int | float):
        raise InputError("is no text", "give a text")
    return str(value)


def _read_path(value: Any) -> Path:
    if not isinstance(value, str | Path):
        raise InputError("is no path", "give a path")
    return Path(value)


def _read_ratio(value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise InputError("is not a number of at least 0", "use a number such as 0.3")
    return number


def _read_above_zero(value: Any) -> float:
    if not (number := _read_ratio(value)):
        raise InputError("is not above 0", "use a number such as 1")
    return number


def _read_fraction(value: Any) -> float:
    if (number := _read_ratio(value)) > 1:
        raise InputError("is more than 1", "use a number from 0 to 1")
    return number


def _read_size(value: Any) -> int:
    pattern = r"(\d{1,15}(?:\.\d{1,9})?)\s*([KMGT]?)(i?)B?"
    match = re.fullmatch(pattern, "" if isinstance(value, bool) else str(value), re.ASCII | re.IGNORECASE)
    if not match:
        raise InputError("is no size", "use a size such as 512MiB or 2GiB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " "))


def _read_pair(value: Any) -> tuple[str, str]:
    key, text = value.partition("=")[::2] if isinstance(value, str) else map(str, value)
    if not (key and text):
        raise InputError("is not of the form KEY=VALUE", "use a pair such as damping=0.03")
    return key, text


def _read_device(value: Any) -> str:
    name, colon, number = str(value).partition(":")
    return ("cuda" if name.lower() == "gpu" else name) + colon + number


def _read_dtype(value: Any) -> str:
    name: str = _DTYPE.read(str(value).removeprefix("torch."))
    return name


def _read_switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise InputError("is neither True nor False", "use True or False")
    return value


_SHORT = {
    **dict.fromkeys(("fp32", "f32", "float", "single"), "float32"),
    **dict.fromkeys(("fp16", "f16", "half"), "float16"),
    **dict.fromkeys(("bf16", "bfloat"), "bfloat16"),
}
_DTYPE = choice(("float32", "float16", "bfloat16"), also=_SHORT)

TEXT = Kind("TEXT", "text", _read_text)
PATH = Kind("DIR", "path", _read_path)
RATIO = Kind("RATIO", "number, at least 0", _read_ratio)
ABOVE_ZERO = Kind("NUMBER", "number above 0", _read_above_zero)
FRACTION = Kind("RATIO", "number from 0 to 1", _read_fraction)
SIZE = Kind("SIZE", "bytes, or a size such as 512MiB", _read_size)
PAIR = Kind("KEY=VALUE", "KEY=VALUE", _read_pair)
DEVICE = Kind("DEVICE", "auto, cpu, cuda, cuda:1", _read_device)
DTYPE = replace(_DTYPE, metavar="TYPE", read=_read_dtype)
PRECISION = choice(("float32", "bfloat16"), metavar="TYPE", also=_SHORT)
SWITCH = Kind("", "yes or no", _read_switch)
COUNT = whole()
WINDOW = whole(2)
SEED = whole(0, below=2**63)
