"""Plan of a structured removal: which inputs the blocks can lose, and which sizes the config can express."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import Tensor

from llmprune.errors import InputError
from llmprune.model.blocks import FUSED, expert_counts, find_layers, find_other_weights
from llmprune.model.skeleton import Skeleton
from llmprune.pruning.pattern import SparsityPattern
from llmprune.pruning.sparsity import WORDS, Kind, Removal
from llmprune.structure.config_search import changed_config, channel_settings, find_settings, head_settings
from llmprune.structure.coupling import Coupling
from llmprune.structure.cut import Cut, Structure, removed_ratio, smaller_shapes
from llmprune.structure.expert_coupling import expert_couplings, has_experts
from llmprune.structure.expert_cut import Mixtures
from llmprune.structure.expert_plan import BlockRuns, plan_experts
from llmprune.structure.fewer_blocks import plan_blocks
from llmprune.structure.heads import check_share, head_options, head_text, head_units
from llmprune.structure.slicing import Shapes


@dataclass(frozen=True, slots=True)
class BlockCouplings:
    """The couplings of all blocks of a model.

    Args:
        of: the couplings of every block; none where neither channels nor heads are removed.
        opaque: why some block could not be analysed, or ''.
    """

    of: Sequence[Sequence[Coupling]] = ()
    opaque: str = ""


ROUND_TO = 64
COARSE = 16
"""A multiple is too coarse if it is more than a sixteenth of the width."""


def plan_structure(
    skeleton: Skeleton,
    removals: Sequence[Removal],
    couplings: BlockCouplings,
    runs: BlockRuns,
    round_to: int | None = None,
    pattern: SparsityPattern | None = None,
    trust_remote_code: bool = False,
) -> Structure:
    """The cuts for the requested removals, and a config that expresses the sizes they leave.

    Args:
        skeleton: the model.
        removals: as requested.
        couplings: the coupled channels of every block.
        runs: calls of the blocks.
        round_to: numbers of channels are multiples of this; None for 64, or less where that is too coarse.
        pattern: of the kept weights; its groups must fit.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        InputError: the blocks have no such channels, heads or experts, or the config cannot express the sizes left.
    """
    planner = _Planner(skeleton, couplings, pattern, trust_remote_code)
    mixtures: Mixtures | None = None
    cuts: list[Cut] = []
    changes: dict[str, Any] = {}
    texts: dict[Kind, str] = {}
    ratios: dict[Kind, Fraction] = {}
    blocks = next((removal for removal in removals if removal.kind == "blocks"), None)
    removals = [removal for removal in removals if removal.kind != "blocks"]
    # Channels are those of the experts that stay.
    for removal in sorted(removals, key=lambda removal: removal.kind != "experts"):
        if removal.kind == "experts":
            mixtures, texts["experts"] = plan_experts(skeleton, removal, runs, trust_remote_code)
            changes, ratios["experts"] = changes | mixtures.changes, mixtures.ratio
            continue
        if removal.kind == "channels":
            found, new, texts["channels"] = planner.channels(removal, round_to, mixtures)
        else:
            found, new, texts["heads"] = planner.heads(removal)
        cuts, changes = cuts + found, changes | new
        ratios[removal.kind] = removed_ratio(found)
    config = changed_config(skeleton.config, changes) if changes else skeleton.config
    _, reason = planner.settings(iter([changes]), cuts, mixtures) if changes else ({}, "")
    if reason:
        raise InputError(
            f"the config cannot express all removals at once: {reason}", "remove only channels, heads or experts"
        )
    summary = tuple(texts[removal.kind] for removal in removals)
    structure = Structure(tuple(cuts), changes, config, summary, ratios, mixtures)
    return structure if blocks is None else plan_blocks(skeleton, structure, blocks, trust_remote_code)


class _Planner:
    """Chooses the inputs to remove and the settings to change.

    Args:
        skeleton: the model.
        couplings: of every block.
        pattern: of the kept weights, or None.
        trust: whether code that comes with the model may run.
    """

    def __init__(
        self, skeleton: Skeleton, couplings: BlockCouplings, pattern: SparsityPattern | None, trust: bool
    ) -> None:
        self.skeleton, self.pattern, self.trust = skeleton, pattern, trust
        self.couplings, self.opaque = couplings.of, couplings.opaque

    def channels(
        self, removal: Removal, round_to: int | None, mixtures: Mixtures | None = None
    ) -> tuple[list[Cut], dict[str, int], str]:
        """Cuts of MLP channels, new settings, and a summary; of experts, those that stay are cut."""
        found = list(self._consumers("channels", mixtures))
        own = {coupling.width: self._rounded(removal, coupling.width, round_to) for _, coupling in found}
        reasons: list[str] = []
        for widths in _width_options({old: new for old, (new, _) in own.items()}):
            cuts = [
                Cut("channels", block, coupling, coupling.classes[0].T[None], coupling.width - widths[coupling.width])
                for block, coupling in found
            ]
            for cut in cuts:
                self._check(cut)
            changes, reason = self.settings(channel_settings(self.skeleton.config, widths), cuts)
            if changes:
                texts = [
                    f"{old} -> {new} ({1 - new / old:.1%} of them, {step if new == alone else 'in step with others'})"
                    for (old, new), (alone, step) in zip(widths.items(), own.values(), strict=True)
                ]
                return cuts, changes, f"{removal.name}: MLP channels {'; '.join(texts)}{self._beside()}"
            reasons.append(
                f"the config of {self.skeleton.config.model_type!r} cannot express a width of "
                f"{', '.join(map(str, widths.values()))} for the inputs of {cuts[0].name!r}: {reason}"
            )
        raise InputError(reasons[0], "this model cannot lose MLP channels; remove weights instead, e.g. --sparsity 2:4")

    def _beside(self) -> str:
        """That some experts keep their channels, and how much of the blocks they are; '' where there are none."""
        counts, fused = expert_counts(self.skeleton.config), 0
        for index, block in enumerate(self.skeleton.blocks):
            name = self.skeleton.block_name(index)
            fused += sum(w.weights for w in find_other_weights(block, name, counts) if w.reason == FUSED)
            if not expert_couplings(block):
                fused += sum(layer.weights for layer in find_layers(block, name, self.skeleton.config) if layer.expert)
        total = sum(parameter.numel() for parameter in self.skeleton.blocks.parameters())
        return f"; the experts, {fused / total:.1%} of the block parameters, keep all of theirs" if fused else ""

    def _rounded(self, removal: Removal, old: int, round_to: int | None) -> tuple[int, str]:
        """The number of kept channels, and the multiple it is rounded to with why that is less than 64."""
        step, note = round_to or ROUND_TO, ""
        if round_to is None and step * COARSE > old:
            step = 1 << max(int(math.log2(max(old // COARSE, 1))), 0)
            note = f", {ROUND_TO} being coarse for {old}"
        if self.pattern is not None:
            step = math.lcm(step, self.pattern.multiple_of)
        wanted = old * (1 - removal.ratio)
        new = int(wanted / step + Fraction(1, 2)) * step
        if not 0 < new < old:
            raise InputError(
                f"{removal.name} of {old} channels is {float(wanted):.1f} left, which rounds to {min(new, old)} "
                f"at multiples of {step}",
                f"choose another ratio, or finer steps: --round-to {max(step // 4, 1)}",
            )
        return new, f"multiples of {step}{note}"

    def heads(self, removal: Removal) -> tuple[list[Cut], dict[str, int], str]:
        """Cuts of attention heads, new settings, and a summary."""
        found = list(self._consumers("heads"))
        forms = {(len(c.classes), *c.classes[0].shape, c.width) for _, c in found}
        if len(forms) > 1 or any(len({s.shape for s in c.classes}) > 1 for _, c in found):
            raise InputError("the blocks differ in their heads", "a config has one number of heads for all blocks")
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
                return (
                    cuts,
                    changes,
                    f"{text}; the config cannot express nearer numbers: {reasons[0]}" if reasons else text,
                )
            reasons.append(reason)
        raise InputError(
            f"the config of {self.skeleton.config.model_type!r} cannot express fewer heads: {reasons[0]}",
            "this model cannot lose heads; remove channels (channels:25%) or weights (2:4) instead",
        )

    def _consumers(self, kind: Kind, mixtures: Mixtures | None = None) -> Iterator[tuple[str, Coupling]]:
        """Block name and coupling of every consumer of channels, or of heads; of experts, of those that stay."""
        found = 0
        for index, own in enumerate(self.couplings):
            couplings = [*own, *(self._experts(index, mixtures) if kind == "channels" else ())]
            inner = {dependency.local for coupling in couplings for dependency in coupling.dependencies}
            for coupling in couplings:
                if _kind(coupling) == kind and coupling.consumer not in inner:
                    found += 1
                    yield self.skeleton.block_name(index), coupling
        if not found:
            opaque = f"{type(self.skeleton.blocks[0]).__name__} {self.opaque}" if self.opaque else ""
            mixed = f"the inputs of {self._suspect()!r} do not each come from rows of other layers"
            experts = self._undescribed() if kind == "channels" else ""
            raise InputError(
                f"no {WORDS[kind]} could be traced: {experts or opaque or mixed}",
                "this model can lose weights only, e.g. --sparsity 2:4",
            )

    def _experts(self, index: int, mixtures: Mixtures | None) -> list[Coupling]:
        """The couplings of the experts of a block, as many as stay."""
        found = expert_couplings(self.skeleton.blocks[index])
        cut = mixtures.cuts.get(self.skeleton.block_name(index)) if mixtures else None
        return found[: cut.kept] if cut else found

    def _undescribed(self) -> str:
        """That experts are there whose channels are not known, or ''."""
        for index, block in enumerate(self.skeleton.blocks):
            if has_experts(block) and not expert_couplings(block):
                return f"the experts of {self.skeleton.block_name(index)!r} do not say how gate and up lie"
        return ""

    def _suspect(self) -> str:
        """The last layer of the first block whose inputs are coupled with no rows."""
        known = {coupling.consumer for coupling in self.couplings[0]}
        sliced_parameters = {dependency.local for coupling in self.couplings[0] for dependency in coupling.dependencies}
        weights = [(name, getattr(part, "weight", None)) for name, part in self.skeleton.blocks[0].named_modules()]
        matrices = [name for name, weight in weights if isinstance(weight, Tensor) and weight.dim() == 2]
        left = [name for name in matrices if name not in known | sliced_parameters] or matrices or [""]
        return f"{self.skeleton.block_name(0)}.{left[-1]}"

    def _check(self, cut: Cut) -> None:
        """Refuse a cut that cannot be made.

        Raises:
            InputError: it changes the kept inputs, cannot be written, or leaves a width the pattern does not divide.
        """
        if not cut.coupling.removable:
            raise InputError(
                f"removing inputs of {cut.name!r} would change the others: a norm is taken over all of them",
                "this model cannot lose them; remove weights instead, e.g. --sparsity 2:4",
            )
        block, checkpoint = self.skeleton.model.get_submodule(cut.block), self.skeleton.checkpoint
        for local, name in cut.parameters(block).items():
            own = name == f"{cut.block}.{local}"
            written = checkpoint.stored_as_is(name) if own else checkpoint.writable(name)
            if not written or checkpoint.shared(name):
                raise InputError(
                    f"{name!r} cannot get smaller: it is shared between blocks, or stored in another form",
                    "remove weights instead, e.g. --sparsity 2:4",
                )
        rows = cut.rows(block)
        if self.pattern is not None and (problem := self.pattern.mismatch(rows, cut.width)):
            raise InputError(f"{self.pattern.name} does not fit {cut.name!r}: {problem}", "choose another --round-to")

    def settings(
        self, candidates: Iterator[dict[str, int]], cuts: list[Cut], mixtures: Mixtures | None = None
    ) -> tuple[dict[str, int], str]:
        """The first candidate settings that give the shapes after the cuts, see `find_settings`."""
        shapes: Shapes = {name: tuple(tensor.shape) for name, tensor in self.skeleton.model.state_dict().items()}
        shapes |= smaller_shapes(self.skeleton, cuts, mixtures)
        return find_settings(self.skeleton.config, candidates, shapes, self.skeleton.compute, self.trust)


def head_ratios(couplings: BlockCouplings) -> list[Fraction]:
    """The ratios of attention heads that the blocks can lose, rising; none where no heads were traced."""
    found = {
        Fraction(count, groups if pools == 1 and groups > 1 else queries)
        for own in couplings.of
        for coupling in own
        if _kind(coupling) == "heads"
        for groups, queries in [(len(coupling.classes), coupling.classes[0].shape[0])]
        for pools, count in head_options(groups, queries, Fraction(1, 2))
    }
    return sorted(found)


def _width_options(widths: dict[int, int]) -> Iterator[dict[int, int]]:
    """New widths by old ones: each rounded for itself, then multiples of the smallest in step with it.

    A config may say the width of one expert, and as a multiple of that the width of shared ones.
    """
    yield widths
    least = min(widths)
    in_step = {old: old // least * widths[least] if old % least == 0 else new for old, new in widths.items()}
    if in_step != widths:
        yield in_step


def _kind(coupling: Coupling) -> Kind | None:
    """Heads if some rows feed several inputs (query and key rows), channels if all inputs are free and independent."""
    if any(len(dependency.several) for dependency in coupling.dependencies):
        return "heads"
    alike = len(coupling.classes) == 1 and coupling.classes[0].shape == (1, coupling.width)
    return "channels" if alike else None
