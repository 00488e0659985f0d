"""Which room may use which: one direction, from experiments through training and the store to the page."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "gstlib"
GROUND = {"errors", "files"}  # use nothing of ours
PAPER = {"effects", "pruner", "models", "flatness"}  # count as one room; those of its modules that others need are their own
# what a room may use beside the ground floor and itself
ARROWS = {
    "pruning": set(),
    "scores": set(),
    "convolution": set(),
    "network": {"scores", "convolution"},
    "paper": {"pruning", "scores", "convolution", "network"},
    "spec": {"pruning"},
    "experiments": {"spec"},
    "data": {"spec"},
    "training": {"paper", "spec", "data"},
    "store": {"spec"},
    "reading": {"store", "experiments", "spec"},
    "claims": {"reading", "store", "experiments", "spec"},
    "campaign": {"training", "data", "store", "experiments", "spec"},
    "bench": {"training", "data", "experiments", "store", "spec", "paper", "convolution"},
    "book": {"reading", "claims", "bench", "campaign", "store", "experiments", "spec"},
}


def room(module: str) -> str:
    """The room of a module "gstlib.x.y"."""
    part = module.split(".")[1] if "." in module else "gstlib"
    return "paper" if part in PAPER else part


def imports():
    """(file, room, imported module, imported name, whether inside a function) of every import from gstlib."""
    for file in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(["gstlib", *file.relative_to(PACKAGE).with_suffix("").parts])
        tree = ast.parse(file.read_text())
        inside = {id(n) for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef))
                  for n in ast.walk(f)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "gstlib":
                for alias in node.names:
                    yield file, module, node.module, alias.name, id(node) in inside


def used(module: str, name: str) -> str:
    """What `from module import name` leads to: a module where there is one of that name, else `module` itself."""
    return f"{module}.{name}" if module == "gstlib" else module


def test_every_arrow_is_allowed():
    wrong = []
    for file, module, source, name, _ in imports():
        here, there = room(module), room(used(source, name))
        if here in ("gstlib", "__init__", "__main__") or there in GROUND | {here, "gstlib"} and here not in GROUND:
            continue
        if here in GROUND or there not in ARROWS[here]:
            wrong.append(f"{file.relative_to(PACKAGE)} uses {used(source, name)}")
    assert not wrong, "\n".join(wrong)


def test_every_room_has_its_arrows():
    rooms = {room(f"gstlib.{place.stem}") for place in PACKAGE.iterdir() if place.suffix == ".py" or (place / "__init__.py").exists()}
    assert rooms == set(ARROWS) | GROUND | {"__init__", "__main__"}


def test_rooms_form_no_circle():
    order: list[str] = []
    while len(order) < len(ARROWS):
        free = [name for name, needs in ARROWS.items() if name not in order and needs <= set(order)]
        assert free, f"a circle among {set(ARROWS) - set(order)}"
        order += free


def test_no_name_with_an_underscore_crosses_a_folder():
    wrong = [f"{file.relative_to(PACKAGE)}: {source}.{name}" for file, module, source, name, _ in imports()
             if name.startswith("_") and room(module) != room(used(source, name))]
    for file in sorted(PACKAGE.rglob("*.py")):
        own = room(".".join(["gstlib", *file.relative_to(PACKAGE).with_suffix("").parts]))
        tree = ast.parse(file.read_text())
        modules = {alias.asname or alias.name: used(node.module, alias.name) for node in ast.walk(tree)
                   if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gstlib") for alias in node.names}
        for node in ast.walk(tree):
            if (isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__")
                    and isinstance(node.value, ast.Name) and node.value.id in modules
                    and modules[node.value.id].split(".")[-1] == node.value.id
                    and room(modules[node.value.id]) != own):
                wrong.append(f"{file.relative_to(PACKAGE)}: {node.value.id}.{node.attr}")
    assert not wrong, "\n".join(wrong)


def test_production_patches_nothing():
    assert not [file for file in PACKAGE.rglob("*.py") if "unittest" in file.read_text()]


@pytest.mark.parametrize("name", ["reading", "claims", "store", "experiments", "spec", "data"])
def test_reading_needs_no_torch(name):
    modules = [f"gstlib.{name}.{file.stem}" for file in (PACKAGE / name).glob("[a-z]*.py")] or [f"gstlib.{name}"]
    if name == "data":
        modules = ["gstlib.data"]
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
