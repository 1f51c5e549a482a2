"""Plan of a removal of whole experts: how many stay, and a proof on a copy of a block that its router allows it."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor, nn

from llmprune.errors import InputError, first_line
from llmprune.model.experts import ExpertMatrix, active_experts, says_how
from llmprune.model.hooks import hooked
from llmprune.model.routed_call import RoutedCall
from llmprune.model.skeleton import Skeleton
from llmprune.pruning.sparsity import Removal
from llmprune.structure.expert_cut import ExpertCut, Mixtures, find_cuts, router_groups, shuffled
from llmprune.structure.float64 import Float64, random_copy
from llmprune.structure.gradient_probe import Run

BlockRuns = Callable[[int], tuple[Run, Tensor]]
"""For the number of a block: a call of it with hidden states, which returns all outputs; and such hidden states."""
TOLERANCE = 1e-9
REMOVE_WEIGHTS = "this model cannot lose experts; remove weights instead, e.g. --sparsity 2:4"


def plan_experts(skeleton: Skeleton, removal: Removal, runs: BlockRuns, trust: bool) -> tuple[Mixtures, str]:
    """The cuts for a removal of experts, the same number in every block that has some, and a summary.

    Args:
        skeleton: the model.
        removal: as requested.
        runs: calls of the blocks.
        trust: whether code that comes with the model may run.

    Raises:
        InputError: there are no experts, too few would be left, or the config or the router does not allow it.
    """
    owners, count = _owners(skeleton)
    first, reasons = next(iter(owners)), list[str]()
    index = [skeleton.block_name(at) for at in range(len(skeleton.blocks))].index(first)
    for groups in router_groups(skeleton.config, count):
        kept = _kept(removal, count, groups, active_experts(skeleton.config))
        mixtures = find_cuts(skeleton, owners, count, kept, groups, trust)
        _check_written(skeleton, mixtures)
        smaller = skeleton.blocks_of(mixtures.config)[index]
        reasons.append(_obstacle(skeleton.blocks[index], smaller, mixtures.cuts[first], *runs(index)))
        if not reasons[-1]:
            return mixtures, _summary(removal, count, kept, groups)
    raise InputError(f"the experts of {first!r} cannot be removed: {reasons[0]}", REMOVE_WEIGHTS)


def _summary(removal: Removal, count: int, kept: int, groups: int) -> str:
    inside = f", as many in each of {groups} groups" if groups > 1 else ""
    share = f"{1 - kept / count:.1%} of them{inside}"
    return f"{removal.name}: experts {count} -> {kept} in every block that has some ({share})"


def _owners(skeleton: Skeleton) -> tuple[dict[str, str], int]:
    """The module that holds the experts of every block that has some, and their number."""
    owners, counts = {}, set()
    for index, block in enumerate(skeleton.blocks):
        name = skeleton.block_name(index)
        found = [local for local, module in block.named_modules() if says_how(module)]
        matrices = [part for part in block.modules() if isinstance(part, ExpertMatrix)]
        if matrices and not found:
            raise InputError(
                f"the experts of {name!r} do not say how they are called, so a token's experts are not known",
                REMOVE_WEIGHTS,
            )
        if len(found) > 1:
            raise InputError(f"{name!r} has {len(found)} mixtures of experts: {', '.join(found)}", REMOVE_WEIGHTS)
        if found:
            owners[name] = found[0]
            counts |= {part.place.layout.count for part in matrices}
    if not owners:
        raise InputError(
            f"{type(skeleton.model).__name__} has no experts to remove",
            "of a dense model remove channels (channels:25%), heads (heads:33%) or weights (2:4)",
        )
    if len(counts) > 1:
        raise InputError(f"the blocks have {' and '.join(map(str, sorted(counts)))} experts", REMOVE_WEIGHTS)
    return owners, counts.pop()


def _kept(removal: Removal, count: int, groups: int, active: int) -> int:
    """The number of experts that stay: the multiple of the groups that is nearest to the one asked for."""
    wanted = count * (1 - removal.ratio)
    kept = int(wanted / groups + Fraction(1, 2)) * groups
    step = f", in steps of {groups}, the router's groups" if groups > 1 else ""
    if kept >= count:
        raise InputError(
            f"{removal.name} of {count} experts is {float(count - wanted):.1f} to remove, which rounds to none{step}",
            f"choose a ratio of at least {groups / count:.0%}",
        )
    if kept < active:
        most = (count - -(-active // groups) * groups) / count
        raise InputError(
            f"{removal.name} leaves {kept} of {count} experts, but every token is sent to {active}{step}",
            f"remove {most:.0%} at most" if most > 0 else "this model needs all of them",
        )
    return kept


def _check_written(skeleton: Skeleton, mixtures: Mixtures) -> None:
    for cut in mixtures.cuts.values():
        for local in cut.parts:
            name = f"{cut.block}.{local}"
            if not skeleton.checkpoint.writable(name) or skeleton.checkpoint.shared(name):
                raise InputError(
                    f"{name!r} cannot get smaller: it is shared between blocks, or stored in another form",
                    REMOVE_WEIGHTS,
                )


def _obstacle(block: nn.Module, smaller: nn.Module, cut: ExpertCut, run: Run, hidden: Tensor) -> str:
    """Why experts cannot be removed, or ''.

    In a copy of the block with random weights, in float64, the parts of the router that belong to an expert change
    places: if they alone say which tokens it gets, and with which gate values, these change places with them. The
    smaller block must run as well. The experts themselves play no part, and all are one: they take little memory.
    """
    generator = torch.Generator().manual_seed(0)
    copy = random_copy(block, hidden.device, generator)
    inputs = torch.randn(hidden.shape, generator=generator, dtype=torch.float64).to(hidden.device)
    order = shuffled(cut, generator)
    try:
        before = _gates(copy, cut, run, inputs)
        for local in cut.router:
            path, _, attribute = local.rpartition(".")
            tensor = getattr(copy.get_submodule(path), attribute)
            tensor.copy_(cut.sliced(local, tensor.detach().clone(), order))
        after = _gates(copy, cut, run, inputs)
        _gates(random_copy(smaller, hidden.device, generator), cut, run, inputs)
    except InputError as error:
        return error.message
    except Exception as error:  # a router may refuse the number that is left
        return first_line(error)
    if torch.allclose(after, before[:, order], rtol=TOLERANCE, atol=TOLERANCE):
        return ""
    within = f" in groups of {cut.count // cut.groups}" if cut.groups > 1 else ""
    return f"which of them a token is sent to depends on their order{within}"


@torch.no_grad()
def _gates(block: nn.Module, cut: ExpertCut, run: Run, inputs: Tensor) -> Tensor:
    """The gate values in a run, `(tokens, experts)`.

    Raises:
        InputError: the module that holds the experts is not called once, with tokens and their routing.
    """
    calls: list[RoutedCall | None] = []
    owner = block.get_submodule(cut.owner)
    note = owner.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(RoutedCall.of(args, kwargs)), with_kwargs=True
    )
    with hooked([note]), Float64():
        run(block, inputs)
    if len(calls) != 1 or calls[0] is None:
        raise InputError(f"{type(owner).__name__} is not called once, with tokens and their routing", REMOVE_WEIGHTS)
    return calls[0].gates(cut.count)
