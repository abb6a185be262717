"""The house stands as docs/architecture.md draws it: who may import whom, and what stays shut."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {"beit_pretrain": ROOT, "beit_tokenizers": ROOT / "tokenizers"}  # package: folder it lies in

# Each room (a module or folder of beit_pretrain, and the two outside it) with what it may import of this
# project. Imports inside functions count. A dot names one file of a room.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": {"wording"},
    "wording": set(),
    "summary": {"wording"},
    "cluster": {"wording", "errors"},
    "devices": {"cluster.launch", "wording"},
    "tokenizer": {"errors"},
    "masking": {"errors"},
    "optim": {"errors"},
    "evaluation": {"errors"},
    "sheets": set(),
    "label_maps": {"sheets", "errors"},
    "dense": {"label_maps", "evaluation", "errors"},
    "models": {"errors"},
    "data": {"masking", "label_maps", "wording", "cluster.ending", "errors"},
    "checkpoint": {"models.rel_pos", "wording", "errors"},
    "run_files": {"errors"},
    "report": {"masking", "label_maps", "run_files", "wording", "errors"},
    "callbacks": {"tokenizer", "evaluation", "sheets", "errors"},
    "stages": {
        "models",
        "optim",
        "checkpoint",
        "tokenizer",
        "evaluation",
        "dense",
        "label_maps",
        "errors",
    },
    "adoption": {"checkpoint.record", "checkpoint.stored", "wording", "errors"},
    "compose": {"adoption", "run_files", "wording", "models.default_blocks", "errors"},
    "folder": {
        "run_files",
        "cluster.lock",
        "checkpoint",
        "report.folder",
        "compose",
        "models.default_blocks",
        "errors",
    },
    "origins": {"checkpoint", "stages.base", "tokenizer", "wording", "errors"},
    "values": {"origins", "devices", "wording"},
    "checks": {"values", "compose", "origins", "data.folder", "tokenizer", "devices", "wording", "errors"},
    "build": {
        "cluster",
        "devices",
        "origins",
        "data",
        "stages.base",
        "checkpoint",
        "tokenizer",
        "wording",
        "errors",
    },
    "preview": {"build", "stages.base", "optim", "tokenizer", "devices", "wording", "errors"},
    "run": {
        "preview",
        "build",
        "callbacks.without_secrets",
        "run_files",
        "origins",
        "checks",
        "compose",
        "folder",
        "checkpoint",
        "report",
        "cluster",
        "devices",
        "wording",
        "errors",
    },
    "chain": {"compose", "cluster", "devices", "checkpoint", "report", "run_files", "summary", "errors"},
    "tools": {
        "models",
        "cluster",
        "chain",
        "run",
        "build",
        "checks",
        "origins",
        "dense",
        "label_maps",
        "sheets",
        "tokenizer",
        "devices",
        "compose",
        "summary",
        "stages",
        "data",
        "masking",
        "checkpoint",
        "report",
        "folder",
        "run_files",
        "wording",
        "errors",
    },
    "cli": {"compose", "cluster", "devices", "run", "chain", "tools", "summary", "errors"},
    "__main__": {"cli"},
    "train.py": {"cli"},
    "__init__": {"tools.load"},
    "beit_tokenizers": {"tokenizer", "models", "checkpoint", "errors"},
}

# (importer, imported) against the table, each with its reason; a line that is not needed any more must go.
EXCEPTIONS: set[tuple[str, str]] = set()

LINES = 350  # a longer file usually holds two ideas
LONGER = {"stages/base.py": 386, "stages/probe.py": 380}  # known ones, so that they do not grow unseen

IMPORTS_OF = "import sys; {code}; print('\\n'.join(sorted({{m.partition('.')[0] for m in sys.modules}})))"


@cache
def modules() -> dict[str, Path]:
    """Dotted name to file, of all modules of the project."""
    found = {"train": ROOT / "train.py"}
    for package, folder in SOURCES.items():
        for path in (folder / package).rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(module: str) -> Iterator[str]:
    """The project's modules that a module names in an import, wherever in the file."""
    known = modules()
    for node in ast.walk(ast.parse(known[module].read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else str(node.module) for name in inner]
        else:
            continue
        for name in names:
            if name.partition(".")[0] in SOURCES:
                assert name in known, f"{module} imports {name}, which does not exist"
                yield name


def room(module: str) -> str:
    """Where a module belongs: its top folder or file; the package itself is `__init__`."""
    package, _, inner = module.partition(".")
    if module == "beit_pretrain":
        return "__init__"
    if package != "beit_pretrain":
        return {"train": "train.py"}.get(package, package)
    return inner.partition(".")[0]


def inside(module: str) -> str:
    """A module's name below its package, as the table writes it."""
    return module.removeprefix("beit_pretrain.")


def allowed(importer: str, imported: str) -> bool:
    name = inside(imported)
    return room(importer) == room(imported) or any(
        name == entry or name.startswith(f"{entry}.") for entry in MAY_IMPORT[room(importer)]
    )


def test_every_room_is_in_the_table() -> None:
    rooms = {room(name) for name in modules()}
    assert rooms <= MAY_IMPORT.keys(), "give the new room a line in the table, here and in the document"
    targets = {entry for entries in MAY_IMPORT.values() for entry in entries}
    assert {target.partition(".")[0] for target in targets} <= MAY_IMPORT.keys()


@pytest.mark.parametrize("module", sorted(modules()))
def test_a_module_imports_only_what_its_room_may(module: str) -> None:
    forbidden = sorted(
        {name for name in imports(module) if not allowed(module, name) and (module, name) not in EXCEPTIONS}
    )
    assert not forbidden, f"{module} must not import {', '.join(forbidden)}"


def test_rooms_stand_on_floors() -> None:
    """The table itself has no circle, so an arrow can only point downwards."""
    assert _circle({r: {t.partition(".")[0] for t in targets} for r, targets in MAY_IMPORT.items()}) == []


def test_no_module_reaches_itself_through_its_imports() -> None:
    arrows = {name: {to for to in imports(name) if (name, to) not in EXCEPTIONS} for name in modules()}
    assert _circle(arrows) == []


def test_every_exception_is_still_one() -> None:
    assert all(imported in imports(importer) for importer, imported in EXCEPTIONS)


def _circle(arrows: dict[str, set[str]]) -> list[str]:
    """The first circle found in a graph, as the nodes on it; empty if there is none."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for target in sorted(arrows.get(node, ())):
            if found := visit(target, [*path, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(arrows) if (found := visit(node, []))), [])


def test_a_circle_would_be_found() -> None:
    assert _circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert _circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_the_document_shows_the_same_table() -> None:
    rows = {}
    for line in (ROOT / "docs" / "architecture.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `") and len(cells) == 3:
            name = cells[0].strip("`").removesuffix("/").removesuffix(".py")
            entries = cells[2].replace("`", "").split(",")
            rows[name] = {entry.strip() for entry in entries} - {"", "nothing"}
    assert rows == {name.removesuffix(".py"): targets for name, targets in MAY_IMPORT.items()}


def test_pre_training_does_not_name_a_tokenizer() -> None:
    naming = [
        n for n, path in modules().items() if room(n) != "beit_tokenizers" and "beit_tok" in path.read_text()
    ]
    assert naming == [], "the concrete tokenizer is named in configs/tokenizer/*.yaml only"


@pytest.mark.parametrize("path", sorted(modules().values()), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_grows_beyond_one_idea(path: Path) -> None:
    known = {ROOT / "beit_pretrain" / name: limit for name, limit in LONGER.items()}
    assert len(path.read_text().splitlines()) <= known.get(path, LINES)


# --- what an import costs -----------------------------------------------------------------------------------


def loaded(code: str) -> set[str]:
    """Top-level packages in memory after some code, in a fresh process started in the repository."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS_OF.format(code=code)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines())


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = {"torch", "numpy", "lightning", "hydra", "omegaconf", "timm", "PIL", "matplotlib"}
    assert not loaded("import beit_pretrain") & heavy


@pytest.mark.parametrize(
    "code",
    [
        "from beit_pretrain.cli import main; main(['--help'])",
        "from beit_pretrain.tools.app import app; app(['masks', '--help'], standalone_mode=False)",
        "from beit_pretrain.compose import compose; compose(['stage=pretrain', 'data=digits'])",
    ],
    ids=["beit-train --help", "beit-tools masks --help", "composing a configuration"],
)
def test_a_question_at_the_door_does_not_wait_for_torch(code: str) -> None:
    assert not loaded(code) & {"torch", "lightning", "torchvision", "timm", "matplotlib", "scipy"}


def test_tokenizers_in_the_root_is_still_hugging_faces() -> None:
    assert not (ROOT / "tokenizers" / "__init__.py").exists()
    code = "import tokenizers; assert tokenizers.Tokenizer, tokenizers; import beit_tokenizers"
    assert {"tokenizers", "beit_tokenizers"} <= loaded(code)


# --- doors that stay shut -----------------------------------------------------------------------------------


@pytest.mark.parametrize("module", sorted(modules()))
def test_nothing_is_guessed_or_loaded_loosely(module: str) -> None:
    for node in ast.walk(ast.parse(modules()[module].read_text())):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            where = f"{module}:{node.lineno}"
            assert name != "hasattr", f"{where}: ask for a type or a method of the contract"
            assert not name.endswith("add_safe_globals"), f"{where}: the allow-list is for one file only"
            strict = [ast.unparse(k.value) for k in node.keywords if k.arg == "strict"]
            loose = name.endswith("load_state_dict") and strict not in ([], ["True"])
            assert not loose, f"{where}: weights are loaded strictly, key by key"
    assert module.rpartition(".")[2] not in ("utils", "helpers", "misc"), "name a file by what it holds"
