"""The arrows of docs/architecture.md: no package imports one that stands above it, and none imports in a circle."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "phlora"

# Lowest first; a unit may import its own floor's lower neighbours and itself, never a later floor.
FLOORS = [
    {"errors"},
    {"model_names"},
    {"names", "markup", "parameters"},
    {"config_values"},
    {"notebook"},
    {"config", "display", "files", "extras", "measure", "patterns", "stop"},
    {"others", "plots"},
    {"lora", "data"},
    {"models"},
    {"adapters"},
    {"runs"},
    {"forecast"},
    {"evaluate", "export"},
    {"train", "serve", "migrate"},
    {"dropin", "importing"},
    {"cli"},
    {"testing"},
    {"__main__"},
]
FLOOR_OF = {unit: floor for floor, units in enumerate(FLOORS) for unit in units}


def unit_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> set[str]:
    """Every `phlora.x.y` that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("phlora.")}
        elif (
            isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").startswith("phlora")
        ):
            module = node.module or ""
            found |= {module} if module != "phlora" else {f"phlora.{alias.name}" for alias in node.names}
    return found


FILES = [path for path in sorted(SOURCE.rglob("*.py")) if path.name != "__init__.py" or path.parent != SOURCE]


def test_every_file_has_a_floor() -> None:
    assert {unit_of(path) for path in FILES} <= FLOOR_OF.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_down(path: Path) -> None:
    unit = unit_of(path)
    for module in imported_modules(path):
        target = module.split(".")[1]
        if target in FLOOR_OF:
            assert target == unit or FLOOR_OF[target] < FLOOR_OF[unit], f"{unit} imports {module}"


def test_no_module_imports_itself_through_others() -> None:
    graph = {
        ".".join(["phlora", *path.relative_to(SOURCE).with_suffix("").parts]): imported_modules(path)
        for path in FILES
    }

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join([*trail, module])
        for target in graph.get(module, ()):
            visit(target, (*trail, module))

    for module in graph:
        visit(module, ())


def test_data_knows_neither_transformers_nor_peft_and_lora_only_torch() -> None:
    forbidden = {
        "data": {"transformers", "peft", "trl"},
        "lora": {"transformers", "peft", "trl", "numpy", "datasets"},
    }
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            roots = {name.split(".")[0] for name in names}
            assert not roots & forbidden.get(unit_of(path), set()), path
