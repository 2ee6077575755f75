"""Rooms: imports point downwards, transformers and process groups stay in theirs; files are small and documented."""

import ast
from pathlib import Path

import pytest

import longspan

SOURCE = Path(longspan.__file__).parent
ROOMS = (
    "cli", "server", "bench", "evals", "peers", "planner", "train", "engine", "sessions", "retrieval", "hf",
    "attention", "distributed", "kv", "kernels", "settings", "lengths", "large", "specs", "errors",
)  # fmt: skip
"""From the top; a room imports from those behind it and from itself."""
FILES = sorted(SOURCE.rglob("*.py"))
IDS = [str(file.relative_to(SOURCE)) for file in FILES]


def room_of(file):
    """A file's room; None for the package's own `__init__`, which names what others make."""
    first = file.relative_to(SOURCE).parts[0].removesuffix(".py")
    return None if first == "__init__" else first


def imports(file):
    """Every module that a file imports, anywhere in it, as (dotted name, line); `from a import b` counts as a.b."""
    package = ("longspan", *file.relative_to(SOURCE).parts[:-1])
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            for alias in node.names:
                yield f"{module}.{alias.name}", node.lineno
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func)
            if called in ("importlib.import_module", "import_module", "__import__"):
                yield str(node.args[0].value), node.lineno


def own_room(module):
    """The room of a module of ours: None for the package's own names (its version, say) and for others' modules."""
    parts = module.split(".")
    if parts[0] != "longspan" or len(parts) == 1:
        return None
    known = parts[1] in ROOMS or (SOURCE / parts[1]).exists() or (SOURCE / f"{parts[1]}.py").exists()
    return parts[1] if known else None


def test_every_room_is_known():
    rooms = {room_of(file) for file in FILES} - {None}
    assert rooms <= set(ROOMS), "a new room needs its place in the order"
    assert {"cli", "engine", "attention", "kv", "errors", "settings"} <= rooms


def test_imports_are_seen():
    """The rules below rest on this: an import is found wherever it stands."""
    found = {name for name, _ in imports(SOURCE / "engine" / "making.py")}
    assert {"longspan.hf.loading.load", "torch", "longspan.settings"} <= found
    assert own_room("longspan.hf.loading.load") == "hf"
    assert own_room("longspan.settings") == "settings"
    assert own_room("longspan.__version__") is None and own_room("torch.nn") is None
    inside = {name for name, _ in imports(SOURCE / "hf" / "attention.py")}
    assert "transformers.AttentionInterface" in inside, "one inside a function"


@pytest.mark.parametrize("file", FILES, ids=IDS)
def test_imports_point_downwards(file):
    room = room_of(file)
    for module, line in imports(file):
        target = own_room(module)
        if room is None or target is None:
            # Only the package's own names that need no room may be taken from above: everything else has a home.
            if room is not None and module.startswith("longspan."):
                assert module == "longspan.__version__", f"line {line}: import {module} from its home"
            continue
        assert ROOMS.index(target) >= ROOMS.index(room), f"line {line}: {room} must not import {module}"


@pytest.mark.parametrize("file", FILES, ids=IDS)
def test_transformers_and_process_groups_stay_in_their_rooms(file):
    for module, line in imports(file):
        if module.split(".")[0] == "transformers":
            # What runs a peer lives in an environment, and a process, of its own.
            assert room_of(file) in ("hf", "peers"), f"line {line}: only hf/ touches transformers"
        if f"{module}.".startswith("torch.distributed."):
            assert room_of(file) == "distributed", f"line {line}: only distributed/ touches process groups"


@pytest.mark.parametrize("file", FILES, ids=IDS)
def test_files_are_small_and_say_what_they_do(file):
    text = file.read_text(encoding="utf-8")
    assert text.count("\n") <= 600, "split it"
    docstring = ast.get_docstring(ast.parse(text))
    assert docstring and len(docstring) > 20, "a module opens by saying what it does"
