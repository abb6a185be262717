"""The wheel holds what a run needs, and works where there is no checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Two updates of a tokenizer of a few thousand parameters.
SMALL_RUN = [
    "stage=tokenizer",
    "experiment=digits_tokenizer",
    "tokenizer.vocab_size=16",
    "tokenizer.hidden=8",
    "tokenizer.code_dim=8",
    "trainer.accelerator=cpu",
    "logger=csv",
    "debug=true",
    "name=tok",
]


def run(command: Sequence[str | Path], cwd: Path) -> str:
    """What a command prints; it sees no path of the process that runs the tests."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    environment |= {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of what is shipped, so that nothing of the checkout's leftovers can slip in."""
    out, copy = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("source") / "beit"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "train.py"):
        shutil.copy(ROOT / name, copy / name)
    for name in ("beit_pretrain", "tokenizers", "configs", "tests", "benchmarks", "docs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, copy], cwd=out)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment with the wheel, and with this one's packages but not its editable ones.

    A folder named in a .pth file goes on the path, but the .pth files in it are not read.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    run([*pip, wheel], cwd=folder)
    (site,) = folder.glob("lib/python*/site-packages")
    paths = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site / "dependencies.pth").write_text("\n".join(paths) + "\n")
    return folder / "bin"


def test_the_wheel_holds_code_configurations_and_templates(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    code = [*(ROOT / "beit_pretrain").rglob("*"), *(ROOT / "tokenizers" / "beit_tokenizers").rglob("*")]
    wanted = {
        str(path.relative_to(ROOT)).removeprefix("tokenizers/")
        for path in code
        if path.is_file() and "__pycache__" not in path.parts
    }
    configs = {f"beit_pretrain/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")}
    metadata = {name for name in names if ".dist-info/" in name}
    assert names - metadata == wanted | configs
    assert {Path(name).suffix for name in wanted} >= {".py", ".j2", ".css"} and len(configs) > 20
    assert any(name.endswith("licenses/LICENSE") for name in metadata)


def test_the_installed_package_is_the_wheel_and_not_the_checkout(installed: Path, tmp_path: Path) -> None:
    code = (
        "import beit_pretrain, beit_tokenizers.dvae, beit_pretrain.compose as c; "
        "print(beit_pretrain.__file__, beit_tokenizers.__file__, c.config_dir(), sep='\\n')"
    )
    for path in run([installed / "python", "-c", code], cwd=tmp_path).splitlines():
        assert Path(path).is_relative_to(installed.parent), path


def test_help_from_another_folder_names_the_shipped_choices(installed: Path, tmp_path: Path) -> None:
    text = run([installed / "beit-train", "--help"], cwd=tmp_path)
    assert "digits_pretrain" in text and str(installed.parent) in text
    assert list(tmp_path.iterdir()) == []


def test_a_run_from_another_folder(installed: Path, tmp_path: Path) -> None:
    run([installed / "beit-train", *SMALL_RUN], cwd=tmp_path)
    folder = tmp_path / "runs" / "tok-debug"
    made = {path.name for path in folder.iterdir()}
    assert made >= {"config.yaml", "results.json", "metrics.csv", "report.html", "checkpoints"}
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_a_tool_from_another_folder(installed: Path, tmp_path: Path) -> None:
    run([installed / "beit-tools", "masks", "--out", "sheet.png"], cwd=tmp_path)
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
