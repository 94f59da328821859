"""The house's order: no circle between files, no import from a lower layer to a higher one."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "lmc_fast"
LAYERS = [
    "errors",
    "files",
    "output",
    "sizes",
    "version",
    "importing",
    "examples",
    "kernels",
    "backends",
    "solvers",
    "architectures",
    "checkpoints",
    "symmetry",
    "engine",
    "matching",
    "learning",
    "streaming",
    "budget",
    "evaluation",
    "tokenizer",
    "images",
    "data",
    "pair",
    "alignment",
    "pipeline",
    "cli",
    "__main__",
]


def module_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def imported(module: str) -> set[str]:
    """Modules of the package that a module imports, anywhere in it."""
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1])
            source = f"{base}.{node.module}" if node.module else base
            found |= {f"{source}.{a.name}" if f"{source}.{a.name}" in MODULES else source for a in node.names}
    return found - {module}


def test_no_circle_between_files():
    tuple(TopologicalSorter({module: imported(module) for module in MODULES}).static_order())


def test_imports_go_down():
    layer = {module: LAYERS.index(module.split(".")[1]) for module in MODULES if "." in module}
    upward = [
        (module, other)
        for module in layer
        for other in imported(module)
        if layer.get(other, -1) > layer[module] or other == "lmc_fast"
    ]
    assert not upward
