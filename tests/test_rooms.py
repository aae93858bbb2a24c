"""The house: imports go down the list of rooms, never up."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = [
    "jobs",
    "online",
    "pipeline",
    "tracking",
    "training",
    "analysis",
    "learn",
    "jump",
    "tiles",
    "lease",
    "numbered",
    "storage",
    "config",
    "methods",
    "draws",
]
# They start Ray and show progress, and know nothing of the rooms.
FREE = {"cluster", "progress"}


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return "jobs" if parts[0] == "jobs" else parts[1].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "coda_ray" else [f"coda_ray.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("coda_ray.")}
    return found - FREE


FILES = sorted([*ROOT.glob("coda_ray/**/*.py"), *ROOT.glob("jobs/*.py")])


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    room = room_of(path)
    if room in FREE | {"__init__"}:
        assert not imported_rooms(path)
        return
    allowed = set(ROOMS[ROOMS.index(room) :])
    assert imported_rooms(path) <= allowed, f"{path} imports upward: {imported_rooms(path) - allowed}"
