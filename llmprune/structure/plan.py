"""Which inputs of which layers go, worked out before the run: what the blocks allow, and what the config can say."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from llmprune.errors import InputError
from llmprune.model.skeleton import Skeleton
from llmprune.pruning.pattern import NM, SparsityPattern
from llmprune.pruning.sparsity import WORDS, Kind, Removal
from llmprune.structure.coupling import Coupling
from llmprune.structure.cut import Cut, Structure
from llmprune.structure.heads import check_share, head_options, head_text, head_units
from llmprune.structure.slicing import changed_config, channel_settings, find_settings, head_settings, shapes_after


@dataclass(frozen=True, slots=True)
class BlockCouplings:
    """The coupled channels of a model.

    Args:
        of: the couplings of every block.
        opaque: why some block could not be analysed, or ''.
    """

    of: Sequence[Sequence[Coupling]]
    opaque: str = ""


ROUND_TO = 64
COARSE = 16
"""Multiples of more than this part of the width are too coarse."""


def plan_structure(
    skeleton: Skeleton,
    removals: Iterable[Removal],
    couplings: BlockCouplings,
    round_to: int | None = None,
    pattern: SparsityPattern | None = None,
    trust_remote_code: bool = False,
) -> Structure:
    """Find what can be removed, and a config that says so.

    Args:
        skeleton: the model.
        removals: what is asked for.
        couplings: the coupled channels of every block.
        round_to: numbers of channels are multiples of this; None for 64, or less where that is too coarse.
        pattern: what the weights that stay are to hold; its groups must fit.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        InputError: the blocks have no such channels or heads, or the config cannot say so few of them.
    """
    planner = _Planner(skeleton, couplings, pattern, trust_remote_code)
    cuts: list[Cut] = []
    changes: dict[str, int] = {}
    said = []
    for removal in removals:
        if removal.kind == "channels":
            found, new, text = planner.channels(removal, round_to)
        else:
            found, new, text = planner.heads(removal)
        cuts, changes = cuts + found, changes | new
        said.append(text)
    config = changed_config(skeleton.config, changes)
    _, reason = planner.settings(iter([changes]), cuts)
    if reason:
        raise InputError(
            f"the config cannot say both removals at once: {reason}", "remove only channels, or only heads"
        )
    return Structure(tuple(cuts), changes, config, tuple(said))


class _Planner:
    """Looks for the inputs to remove.

    Args:
        skeleton: the model.
        couplings: of every block.
        pattern: of the weights that stay, or None.
        trust: whether code that comes with the model may run.
    """

    def __init__(
        self, skeleton: Skeleton, couplings: BlockCouplings, pattern: SparsityPattern | None, trust: bool
    ) -> None:
        self.skeleton, self.pattern, self.trust = skeleton, pattern, trust
        self.couplings, self.opaque = couplings.of, couplings.opaque
        self.tensors = dict(skeleton.model.state_dict())

    def channels(self, removal: Removal, round_to: int | None) -> tuple[list[Cut], dict[str, int], str]:
        """Cuts of the MLP channels, new settings, and what is said of them."""
        found = list(self._sinks("channels"))
        widths = {}
        texts = []
        for old in dict.fromkeys(coupling.width for _, coupling in found):
            new, step, note = self._rounded(removal, old, round_to)
            widths[old] = new
            texts.append(f"{old} -> {new} ({1 - new / old:.1%} of them, multiples of {step}{note})")
        cuts = [
            Cut("channels", block, coupling, coupling.classes[0].T[None], coupling.width - widths[coupling.width])
            for block, coupling in found
        ]
        for cut in cuts:
            self._check(cut)
        changes, reason = self.settings(channel_settings(self.skeleton.config, widths), cuts)
        if not changes:
            raise InputError(
                f"the config of {self.skeleton.config.model_type!r} cannot say a width of "
                f"{', '.join(map(str, widths.values()))} for the inputs of {cuts[0].name!r}: {reason}",
                "this model cannot lose MLP channels; remove weights instead, e.g. --sparsity 2:4",
            )
        return cuts, changes, f"{removal.name}: MLP channels {'; '.join(texts)}"

    def _rounded(self, removal: Removal, old: int, round_to: int | None) -> tuple[int, int, str]:
        """The number of channels that stay, of what it is a multiple, and why that is less than 64."""
        step, note = round_to or ROUND_TO, ""
        if round_to is None and step * COARSE > old:
            step = 1 << max(int(math.log2(max(old // COARSE, 1))), 0)
            note = f", {ROUND_TO} being coarse for {old}"
        if isinstance(self.pattern, NM):
            step = math.lcm(step, self.pattern.m)
        wanted = old * (1 - removal.ratio)
        new = int(wanted / step + Fraction(1, 2)) * step
        if not 0 < new < old:
            raise InputError(
                f"{removal.name} of {old} channels is {float(wanted):.1f} left, which rounds to {min(new, old)} "
                f"at multiples of {step}",
                f"choose another share, or finer steps: --round-to {max(step // 4, 1)}",
            )
        return new, step, note

    def heads(self, removal: Removal) -> tuple[list[Cut], dict[str, int], str]:
        """Cuts of the attention heads, new settings, and what is said of them."""
        found = list(self._sinks("heads"))
        forms = {(len(c.classes), *c.classes[0].shape, c.width) for _, c in found}
        if len(forms) > 1 or any(len({s.shape for s in c.classes}) > 1 for _, c in found):
            raise InputError("the blocks differ in their heads", "a config says one number of heads for all")
        groups, queries, width, _ = forms.pop()
        options = list(head_options(groups, queries, removal.ratio))
        if not options:
            raise InputError(f"{removal.name} would leave no head: there is one", "remove channels instead")
        reasons: list[str] = []
        for pools, count in options:
            kept_groups = groups - count if pools == 1 and groups > 1 else groups
            kept_heads = kept_groups * queries if kept_groups < groups else groups * (queries - count)
            units = [head_units(coupling, pools) for _, coupling in found]
            cuts = [Cut("heads", b, c, u, count) for (b, c), u in zip(found, units, strict=True)]
            for cut in cuts:
                self._check(cut)
            settings = head_settings(self.skeleton.config, kept_heads, kept_groups, width)
            changes, reason = self.settings(settings, cuts)
            if changes:
                check_share(removal, groups * queries, kept_heads)
                text = head_text(removal, groups, queries, kept_groups, kept_heads)
                return cuts, changes, f"{text}; nearer numbers cannot be said: {reasons[0]}" if reasons else text
            reasons.append(reason)
        raise InputError(
            f"the config of {self.skeleton.config.model_type!r} cannot say fewer heads: {reasons[0]}",
            "this model cannot lose heads; remove channels (channels:25%) or weights (2:4) instead",
        )

    def _sinks(self, kind: Kind) -> Iterator[tuple[str, Coupling]]:
        """The block's name and the coupling of every layer that is fed by channels, or by heads."""
        found = 0
        for index, couplings in enumerate(self.couplings):
            inner = {feed.local for coupling in couplings for feed in coupling.feeds}
            for coupling in couplings:
                if _kind(coupling) == kind and coupling.sink not in inner:
                    found += 1
                    yield self.skeleton.block_name(index), coupling
        if not found:
            opaque = f"{type(self.skeleton.blocks[0]).__name__} {self.opaque}" if self.opaque else ""
            mixed = f"the inputs of {self._suspect()!r} do not each come from rows of other layers"
            raise InputError(
                f"no {WORDS[kind]} could be traced: {opaque or mixed}",
                "this model can lose weights only, e.g. --sparsity 2:4",
            )

    def _suspect(self) -> str:
        """The last layer of the first block whose inputs hang together with no rows."""
        known = {coupling.sink for coupling in self.couplings[0]}
        fed = {feed.local for coupling in self.couplings[0] for feed in coupling.feeds}
        layers = [name for name, module in self.skeleton.blocks[0].named_modules() if hasattr(module, "weight")]
        matrices = [n for n in layers if self.skeleton.blocks[0].get_parameter(f"{n}.weight").dim() == 2]
        left = [name for name in matrices if name not in known | fed] or matrices or [""]
        return f"{self.skeleton.block_name(0)}.{left[-1]}"

    def _check(self, cut: Cut) -> None:
        """Refuse a cut that would change what stays, or cannot be written, or leaves groups that do not fit."""
        if not cut.coupling.severable:
            raise InputError(
                f"removing inputs of {cut.name!r} would change the others: a norm goes over all of them",
                "this model cannot lose them; remove weights instead, e.g. --sparsity 2:4",
            )
        checkpoint = self.skeleton.checkpoint
        for local in cut.coupling.fed(self.skeleton.model.get_submodule(cut.block)):
            name = f"{cut.block}.{local}"
            if not checkpoint.writable(name) or len(checkpoint.users(checkpoint.disk_names([name])[0])) > 1:
                raise InputError(
                    f"{name!r} cannot get smaller: it is shared between blocks, or stored in another form",
                    "remove weights instead, e.g. --sparsity 2:4",
                )
        rows = self.tensors[f"{cut.name}.weight"].numel() // cut.coupling.width
        if self.pattern is not None and (problem := self.pattern.divides(rows, cut.width)):
            raise InputError(f"{self.pattern.name} does not fit {cut.name!r}: {problem}", "choose another --round-to")

    def settings(self, candidates: Iterator[dict[str, int]], cuts: list[Cut]) -> tuple[dict[str, int], str]:
        """The first settings that give the shapes that the cuts leave."""
        shapes = shapes_after([cut.example for cut in cuts], self.tensors)
        return find_settings(self.skeleton.config, candidates, shapes, self.skeleton.compute, self.trust)


def _kind(coupling: Coupling) -> Kind | None:
    """Heads have rows that feed all of their inputs; channels are all alike and each on its own."""
    if any(len(feed.several) for feed in coupling.feeds):
        return "heads"
    alike = len(coupling.classes) == 1 and coupling.classes[0].shape == (1, coupling.width)
    return "channels" if alike else None
