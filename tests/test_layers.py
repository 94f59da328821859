"""The house's order: no circle between files, no import from a lower layer to a higher one."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "lmc_fast"
LAYERS = [
    "errors",
    "members",
    "places",
    "interrupts",
    "files",
    "output",
    "sizes",
    "version",
    "model_types",
    "importing",
    "examples",
    "kernels",
    "implementations",
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


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_no_private_name_leaves_its_module():
    """Neither by import, nor as an attribute of what was imported, nor by its name in a monkeypatch."""
    found = []
    for folder in (PACKAGE, PACKAGE.parent / "tests", PACKAGE.parent / "benchmarks"):
        for file in sorted(folder.rglob("*.py")):
            tree = ast.parse(file.read_text())
            ours = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and (n.level or "lmc_fast" in n.module)]
            names = [a for n in ours for a in n.names]
            found += [(file.name, a.name) for a in names if private(a.name) and a.name != "_C"]
            bound = {a.asname or a.name for a in names}
            for node in ast.walk(tree):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                    owner, name = node.value, node.attr
                elif isinstance(node, ast.Call) and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
                    owner, name = node.args[0], str(node.args[1].value)
                else:
                    continue
                if isinstance(owner, ast.Name) and owner.id in bound and private(name):
                    found.append((file.name, f"{owner.id}.{name}"))
    assert not found
