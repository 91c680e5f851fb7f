"""The floors of the core: a file imports only from lower floors; pluggy is touched in two files."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CORE = ROOT / "qvmcore"

FLOORS: tuple[frozenset[str], ...] = (
    frozenset({"errors", "types"}),
    frozenset({"options", "memory", "irq", "events"}),
    frozenset({"bus", "engine"}),
    frozenset({"vdev", "termination"}),
    frozenset({"pci"}),
    frozenset({"virtio"}),
    frozenset({"hookspecs", "api", "server"}),
    frozenset({"plugins"}),
    frozenset(
        {
            "compose",
            "toml_source",
            "layout",
            "bind",
            "bind_pci",
            "pci_tree",
            "slot",
            "button",
            "boards",
            "fdt",
            "acpi",
            "load",
            "signals",
            "dump",
            "choose",
            "control",
            "rundir",
            "inquiry",
            "doorway",
            "post",
            "served",
        }
    ),
    frozenset({"machine", "service"}),
    frozenset({"cli"}),
)
SIDE = "testing"


def floor_of(module: str) -> int:
    """The floor of a top-level module of the core; fails for a module nobody put on a floor."""
    for number, modules in enumerate(FLOORS):
        if module in modules:
            return number
    raise AssertionError(f"qvmcore.{module} is on no floor; add it to FLOORS in {Path(__file__).name}")


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module a file imports at run time: TYPE_CHECKING blocks do not count."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            if node.module == "qvmcore":
                yield from (f"qvmcore.{alias.name}" for alias in node.names)
        yield from imports(node)


def modules(folder: Path) -> list[Path]:
    """The Python files below a folder."""
    return sorted(path for path in folder.rglob("*.py") if "tests" not in path.parts[len(ROOT.parts) :])


@pytest.mark.parametrize("path", modules(CORE), ids=lambda path: str(path.relative_to(CORE)))
def test_imports_come_from_lower_floors(path: Path) -> None:
    own = path.relative_to(CORE).parts[0].removesuffix(".py")
    if own in (SIDE, "__init__", "__main__"):
        return
    for name in imports(ast.parse(path.read_text())):
        if name.startswith("qvmcore."):
            target = name.split(".")[1]
            assert target != SIDE, f"{path.name} imports the testing kit"
            assert target == own or floor_of(target) < floor_of(own) or {target, own} in SAME_FLOOR, (
                f"{own} (floor {floor_of(own)}) imports {target} (floor {floor_of(target)})"
            )


#: Pairs on one floor that may know each other; each is a part of the same step of a machine's life.
SAME_FLOOR: list[set[str]] = [
    {"bus", "engine"},
    {"vdev", "termination"},
    {"hookspecs", "api"},
    {"hookspecs", "server"},
    {"api", "server"},
    {"compose", "toml_source"},
    {"compose", "layout"},
    {"compose", "boards"},
    {"compose", "load"},
    {"layout", "boards"},
    {"boards", "fdt"},
    {"boards", "acpi"},
    {"acpi", "layout"},
    {"acpi", "load"},
    {"load", "boards"},
    {"bind", "slot"},
    {"button", "slot"},
    {"bind", "bind_pci"},
    {"bind_pci", "slot"},
    {"bind_pci", "boards"},
    {"bind_pci", "layout"},
    {"control", "rundir"},
    {"control", "inquiry"},
    {"inquiry", "slot"},
    {"served", "bind"},
    {"served", "bind_pci"},
    {"served", "slot"},
    {"post", "bind"},
    {"post", "doorway"},
    {"post", "served"},
]


def test_the_check_sees_an_upward_import() -> None:
    found = list(imports(ast.parse("def f():\n    from qvmcore import machine\n    import qvmcore.cli\n")))
    assert found == ["qvmcore", "qvmcore.machine", "qvmcore.cli"]
    assert floor_of("machine") > floor_of("bus")


def test_pluggy_is_imported_in_two_files_only() -> None:
    users = {
        path.relative_to(CORE).as_posix()
        for path in modules(CORE)
        if any(name.split(".")[0] == "pluggy" for name in imports(ast.parse(path.read_text())))
    }
    assert users == {"hookspecs.py", "plugins.py"}


@pytest.mark.parametrize("path", modules(ROOT / "plugins"), ids=lambda path: str(path.relative_to(ROOT)))
def test_plugins_import_the_api_only(path: Path) -> None:
    used = {name for name in imports(ast.parse(path.read_text())) if name.split(".")[0] == "qvmcore"}
    if path.name.startswith(SIDE):
        # What a plugin has for the tests of others may stand on the testing kit.
        used = {name for name in used if name.split(".")[1:2] != [SIDE]}
    assert used <= {"qvmcore.api"}, f"{path.name} reaches behind qvmcore.api"
