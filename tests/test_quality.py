"""The linters and the type checker, as `make lint` runs them, and a few habits that no linter knows."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("command", ["ruff check .", "ruff format --check .", "mypy"])
def test_lint(command: str) -> None:
    done = subprocess.run([sys.executable, "-m", *command.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_wheel_holds_the_whole_package(tmp_path: Path) -> None:
    """Every file under src/cache2cache, such as the catalogue and the default fuser, and nothing else."""
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    source = ROOT / "src"
    there = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    assert names == {name for name in there if "__pycache__" not in name and not name.endswith(".egg-info")}
    assert {"cache2cache/py.typed", "cache2cache/models/catalogue.json"} <= names


def test_importing_the_package_is_light() -> None:
    code = "import cache2cache, sys; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'heavy'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names_exist() -> None:
    import cache2cache

    for name in cache2cache.__all__:
        assert getattr(cache2cache, name) is not None
    with pytest.raises(AttributeError):
        cache2cache.nonsense  # noqa: B018
