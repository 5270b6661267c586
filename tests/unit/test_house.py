"""The rules of the house: who may import whom, how long a file may be. Read off the sources, not off what runs."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import networkx
import pytest

from monarch_compile.codegen.tuning import store
from monarch_compile.registry import FAMILIES

ROOT = Path(__file__).parents[2]
TOPS = ("monarch_compile", "passes", "codegen")
MOST_LINES = 400

Name = str
"""A module's name as it is imported, below `monarch_compile`: "passes.attention.match"; "" for the package itself."""


def _modules() -> dict[Name, ast.Module]:
    found: dict[Name, ast.Module] = {}
    for top in TOPS:
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if top == "monarch_compile" and parts[1] in ("passes", "codegen"):
                continue  # links to the folders at the top level
            inside = parts[1:] if top == "monarch_compile" else parts
            name = ".".join(part for part in inside if part != "__init__")
            found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


MODULES_OF_THE_HOUSE = _modules()


def _imported(nodes: Iterator[ast.AST]) -> Iterator[tuple[Name, str]]:
    """What import statements name: a module of the house or another, and the name that is taken from it."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.module, alias.name) for alias in node.names)


def _own(nodes: Iterator[ast.AST]) -> set[Name]:
    """The modules of the house among them."""
    found = set()
    for module, name in _imported(nodes):
        if module.partition(".")[0] == "monarch_compile":
            inner = module.partition(".")[2]
            deeper = f"{inner}.{name}".strip(".")
            found.add(deeper if deeper in MODULES_OF_THE_HOUSE else inner)
    return found


def _at_import(tree: ast.Module) -> Iterator[ast.AST]:
    """Statements that run when the module is imported, but for those that only a type checker reads."""
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        yield node
        if isinstance(node, ast.Try) or (isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.dump(node.test)):
            pending += node.body


EVERYWHERE = {name: _own(ast.walk(tree)) for name, tree in MODULES_OF_THE_HOUSE.items()}
AT_IMPORT = {name: _own(_at_import(tree)) for name, tree in MODULES_OF_THE_HOUSE.items()}


def _family_of(name: Name) -> str | None:
    rooms = name.split(".")
    return next((family for family in FAMILIES if family in rooms[:2]), None)


def test_passes_import_no_codegen() -> None:
    wrong = {name: sorted(x for x in names if x.startswith("codegen")) for name, names in EVERYWHERE.items()
             if name.startswith("passes")}  # fmt: skip
    assert {name: found for name, found in wrong.items() if found} == {}


def test_codegen_sees_no_graph() -> None:
    """Neither passes nor torch.fx, but for one question about symbolic sizes."""
    for name, tree in MODULES_OF_THE_HOUSE.items():
        if name.startswith("codegen"):
            assert not [x for x in EVERYWHERE[name] if x.startswith("passes")], name
            fx = {(module, what) for module, what in _imported(ast.walk(tree)) if module.startswith("torch.fx")}
            assert fx <= {("torch.fx.experimental.symbolic_shapes", "statically_known_true")}, (name, fx)


SPINE_KNOWS = {
    "": "exports monarch_attention",
    "config": "is the list of options that users give, attention's among them",
    "distributed": "opens attention over several ranks",
    "integrations": "opens the doors for eager attention",
}
"""What users say to attention: modules of the spine that know it, and why; no other may."""


def _names_a_family(name: Name) -> bool:
    names = any(_family_of(other) for other in EVERYWHERE[name])
    text = ast.dump(MODULES_OF_THE_HOUSE[name])
    return names or any(f"value='{family}'" in text for family in FAMILIES)


def test_the_spine_names_no_family() -> None:
    """But for the registry, and for what users say to attention."""
    spine = [name for name in MODULES_OF_THE_HOUSE if _family_of(name) is None and name != "registry"]
    found = {name for name in spine if _names_a_family(name)}
    print("\n".join(f"{name}: {reason}" for name, reason in SPINE_KNOWS.items()))
    assert found == set(SPINE_KNOWS)


NO_PART_OF_A_KERNEL = {
    "{family}.reference": "checks what is tuned",
    "errors": "says what went wrong",
    "registry": "finds emitters",
    "sources": "makes the key",
    "version": "is in the header of a kernel's file",
}
"""What codegen imports, and why a tuned schedule stays as good when it changes."""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tuned_schedule_is_keyed_by_whatever_its_kernels_are_made_from(family: str) -> None:
    used = {other for name, names in EVERYWHERE.items() if name.startswith("codegen") for other in names}
    used = {name for name in used if not name.startswith("codegen") and _family_of(name) in (None, family)}
    keyed = {path.relative_to(ROOT / "monarch_compile") for path in store.meaning_files(family)}
    no_part = {name.format(family=family) for name in NO_PART_OF_A_KERNEL}
    assert no_part <= used
    assert {".".join(path.with_suffix("").parts) for path in keyed} == used - no_part


def test_no_family_imports_another() -> None:
    for name, names in EVERYWHERE.items():
        own = _family_of(name)
        assert own is None or {_family_of(other) for other in names} <= {None, own}, name


def test_passes_and_codegen_name_families_in_their_rooms_alone() -> None:
    assert not [name for name in SPINE_KNOWS if name.startswith(("passes", "codegen"))]


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = networkx.DiGraph([(name, other) for name, names in AT_IMPORT.items() for other in names])
    circles = sorted(sorted(part) for part in networkx.strongly_connected_components(graph) if len(part) > 1)
    assert circles == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_tests_in_a_folder_of_its_own(family: str) -> None:
    assert list((ROOT / "tests" / family).rglob("test_*.py"))


@pytest.mark.parametrize("top", [*TOPS, "benchmarks", "examples"])
def test_files_are_short(top: str) -> None:
    paths = [path for path in (ROOT / top).rglob("*.py") if not any(p.is_symlink() for p in path.parents)]
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text("utf-8").splitlines()) for path in paths}
    assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES} == {}
