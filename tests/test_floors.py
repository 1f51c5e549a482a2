"""The package is built in floors: a package imports only from the floors below it."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "llmprune"
FLOORS = [
    {"__init__", "__main__"},
    {"cli"},
    {"run"},
    {"pipeline"},
    {"streaming", "export"},
    {"reporting"},
    {"structure", "sources", "distill_job"},
    {"model", "job"},
    {"pruning"},
    {"runtime", "training", "knobs"},
    {"errors", "progress"},
]
FLOOR = {name: -number for number, names in enumerate(FLOORS) for name in names}
SPEAKS = {"cli", "__main__"}
HELP = {"cli", "__init__", "__main__", "errors", "job", "distill_job"}
READS = {
    "runtime.foreign",
    "runtime.memory",
    "runtime.process_group",
    "sources.generated",
    "pipeline.state",
    "reporting.report",
}
"""Modules that read what the system or we ourselves have written, beside the gate."""


def module_name(path: Path) -> str:
    """`llmprune/pruning/methods/__init__.py` -> `pruning.methods`."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def room(module: str) -> str:
    """`pruning.methods.admm` -> `pruning`."""
    return module.partition(".")[0]


TREES = {module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
MODULES = sorted(TREES)
MATHEMATICS = [module for module in MODULES if room(module) == "pruning"]


def imports(module: str, top: bool = False) -> set[str]:
    """Full names of all that a module imports, anywhere or at its top: `torch.nn`, `llmprune.errors.InputError`."""
    found = set()
    for node in TREES[module].body if top else ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def uses(module: str, *dotted: str) -> set[str]:
    """Which of the dotted names (`torch.load`, `print`) stand in a module's code."""
    text = {ast.unparse(node) for node in ast.walk(TREES[module]) if isinstance(node, ast.Attribute | ast.Name)}
    return text & set(dotted) | {name for name in imports(module) if name in dotted}


def libraries(module: str, top: bool = False) -> set[str]:
    """The distributions that a module imports."""
    return {name.partition(".")[0] for name in imports(module, top)}


def test_every_package_has_a_floor_and_at_most_eight_modules_stand_beside_them() -> None:
    assert {room(module) for module in MODULES} == FLOOR.keys()
    assert len(list(PACKAGE.glob("*.py"))) <= 8


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_downwards_between_packages(module: str) -> None:
    rooms = {room(name.removeprefix("llmprune.")) for name in imports(module) if name.startswith("llmprune.")}
    above = {name for name in rooms - {room(module)} if FLOOR[name] >= FLOOR[room(module)]}
    assert not above


def test_no_module_imports_itself_through_others() -> None:
    graph = {}
    for module in MODULES:
        names = {name.removeprefix("llmprune.") for name in imports(module) if name.startswith("llmprune.")}
        graph[module] = {name if name in TREES else name.rpartition(".")[0] for name in names} - {module}
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("package", [path.parent for path in PACKAGE.glob("*/__init__.py")], ids=lambda p: p.name)
def test_a_package_says_in_a_few_lines_what_it_holds(package: Path) -> None:
    text = ast.get_docstring(TREES[package.name])
    assert text
    assert len(text.splitlines()) <= 15


@pytest.mark.parametrize("module", MATHEMATICS)
def test_the_mathematics_knows_no_transformers_and_no_modules(module: str) -> None:
    assert not libraries(module) & {"transformers", "accelerate", "datasets", "huggingface_hub", "safetensors"}
    assert not {name for name in imports(module) if name.startswith("torch.nn")}
    assert not uses(module, "torch.nn", "nn.Module")


@pytest.mark.parametrize("module", sorted(set(MODULES) - set(MATHEMATICS)))
def test_scipy_stays_with_the_mathematics(module: str) -> None:
    assert not libraries(module) & {"scipy", "sklearn"}


@pytest.mark.parametrize("module", [module for module in MODULES if room(module) not in SPEAKS])
def test_only_the_command_line_speaks(module: str) -> None:
    assert not uses(module, "print", "sys.stdout", "sys.stderr", "input")
    assert not libraries(module) & {"logging", "tqdm", "argparse"}


@pytest.mark.parametrize("module", [module for module in MODULES if room(module) in SPEAKS])
def test_the_command_line_prints_in_one_place_which_escapes(module: str) -> None:
    """Beside it are the bars of tqdm, which write above themselves."""
    assert not uses(module, "print", "input")
    writers = {"cli.shell": {"say"}, "cli.terminal": {"TerminalProgress"}, "cli.notebook": {"ProgressBars"}}
    found = {
        top.name
        for top in TREES[module].body
        if isinstance(top, ast.FunctionDef | ast.ClassDef)
        for node in ast.walk(top)
        if isinstance(node, ast.Attribute) and node.attr in {"write", "writelines"}
    }
    assert found == writers.get(module, set())


@pytest.mark.parametrize("module", sorted(set(MODULES) - READS))
def test_files_of_others_are_read_through_the_gate(module: str) -> None:
    """`runtime.foreign` knows pipes and devices, bounds sizes, and says what is wrong in our words."""
    methods = {node.attr for node in ast.walk(TREES[module]) if isinstance(node, ast.Attribute)}
    assert not methods & {"read_text", "read_bytes"}
    assert not uses(module, "json.load", "json.loads")


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_pickled(module: str) -> None:
    assert not libraries(module) & {"pickle", "cloudpickle", "dill", "joblib"}
    assert not uses(module, "torch.load", "torch.save", "torch.serialization", "eval", "exec")


@pytest.mark.parametrize(
    "module", [m for m in MODULES if room(m) in {"cli", "__init__", "__main__", "errors", "job", "distill_job"}]
)
def test_help_needs_no_torch(module: str) -> None:
    assert not libraries(module, top=True) & {"torch", "numpy", "transformers"}
