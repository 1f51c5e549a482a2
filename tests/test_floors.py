"""The package is built in floors: a module imports only from its own floor or below, and never in a circle."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "llmprune"
FLOORS = [
    {
        "chart",
        "clock",
        "durable",
        "errors",
        "memory",
        "pattern",
        "problem",
        "progress",
        "reach",
        "recipe",
        "report",
        "sparsity",
    },
    {"linalg", "permutation", "positions", "ranks", "refit", "room", "shares", "spectrum", "stats", "targets"},
    {"methods", *(f"methods.{path.stem}" for path in PACKAGE.glob("methods/[!_]*.py"))},
    {"structured", *(f"structured.{path.stem}" for path in PACKAGE.glob("structured/[!_]*.py"))},
    {"remove", "solve"},
    {
        "checkpoint",
        "demo",
        "families",
        "finetune",
        "folder",
        "gguf",
        "html_report",
        "job",
        "packed",
        "semistructured",
        "shards",
        "source",
        "texts",
        "tokens",
    },
    {
        "activations",
        "block",
        "carried",
        "coupling",
        "cuts",
        "find_couplings",
        "float64",
        "gathering",
        "heads",
        "kinds",
        "landing",
        "pausing",
        "probe",
        "rehearse",
        "scales",
        "skeleton",
        "stream",
        "structure",
        "surgery",
        "watch",
    },
    {
        "estimate",
        "hub",
        "own_text",
        "perplexity",
        "plan",
        "prepare",
        "prepared",
        "refine",
        "resume",
        "stages",
        "verify",
        "workplace",
    },
    {"allocate", "launch", "outcome", "packing", "together", "upload"},
    {"samples"},
    {"run"},
    {"__main__", "arguments", "bars", "cli", "flags", "shell", "terminal"},
]
FLOOR = {module: number for number, modules in enumerate(FLOORS) for module in modules}


def module_name(path: Path) -> str:
    """`llmprune/methods/__init__.py` -> `methods`."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


TREES = {module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
MODULES = sorted(TREES.keys() - {"__init__"})


def imports(module: str) -> set[str]:
    """Full names of all that a module imports, wherever in its text: `torch.nn`, `llmprune.errors.InputError`."""
    found = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own_imports(module: str) -> set[str]:
    """The modules of the package that a module imports."""
    names = {name.removeprefix("llmprune.") for name in imports(module) if name.startswith("llmprune.")}
    return {name if name in TREES else name.rpartition(".")[0] for name in names}


def uses(module: str, *dotted: str) -> set[str]:
    """Which of the dotted names (`torch.load`, `print`) stand in a module's code."""
    text = {ast.unparse(node) for node in ast.walk(TREES[module]) if isinstance(node, ast.Attribute | ast.Name)}
    return text & set(dotted) | {name for name in imports(module) if name in dotted}


def test_every_module_has_a_floor() -> None:
    assert set(MODULES) == FLOOR.keys()


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_nothing_from_above(module: str) -> None:
    above = {name for name in own_imports(module) if FLOOR[name] > FLOOR[module]}
    assert not above


def test_no_module_imports_itself_through_others() -> None:
    TopologicalSorter({module: own_imports(module) for module in MODULES}).prepare()


@pytest.mark.parametrize("module", sorted(FLOORS[0] | FLOORS[1] | FLOORS[2] | FLOORS[3]))
def test_the_mathematics_knows_no_transformers_and_no_modules(module: str) -> None:
    foreign = {"transformers", "accelerate", "datasets", "huggingface_hub", "safetensors"}
    assert not {name for name in imports(module) if name.split(".")[0] in foreign}
    assert not {name for name in imports(module) if name.startswith("torch.nn")}
    assert not uses(module, "torch.nn", "nn.Module")


@pytest.mark.parametrize("module", sorted(set(MODULES) - FLOORS[1] - FLOORS[3]))
def test_scipy_stays_on_its_floor(module: str) -> None:
    assert not {name for name in imports(module) if name.split(".")[0] in {"scipy", "sklearn"}}


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"arguments", "bars", "cli", "flags", "shell", "terminal"}))
def test_only_the_command_line_speaks(module: str) -> None:
    assert not uses(module, "print", "sys.stdout", "sys.stderr", "input")
    assert not {name for name in imports(module) if name.split(".")[0] in {"logging", "tqdm", "argparse"}}


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_pickled(module: str) -> None:
    assert not {name for name in imports(module) if name.split(".")[0] in {"pickle", "cloudpickle", "dill", "joblib"}}
    assert not uses(module, "torch.load", "torch.save", "torch.serialization", "eval", "exec")


def test_the_command_line_imports_only_the_standard_library_at_its_top() -> None:
    for module in ("arguments", "cli", "flags", "shell", "__main__", "methods", "structured", "errors", "__init__"):
        for node in TREES[module].body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"torch", "numpy", "transformers", "tqdm"}
