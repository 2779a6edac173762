"""What users get: the built wheel, in an environment that holds nothing else."""

import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Building and installing ask a package index, which may be slow to answer.
pytestmark = pytest.mark.timeout(300)

STORE_AND_READ_BACK = """
import asyncio
from gridsession import SessionProvider, SessionSettings
async def main():
    async with SessionProvider(SessionSettings(connection_string="memory://")) as provider:
        async with provider.open(None, holder="wheel test") as session:
            session["a"] = 1
            sid = session.id
        async with provider.open(sid, holder="wheel test") as session:
            assert session["a"] == 1
asyncio.run(main())
"""


def run(*command: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; its output goes into the failure when it fails."""
    done = subprocess.run(
        command, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source distribution, as an index would get both."""
    built = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", built, ROOT)
    (wheel,) = built.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the wheel and its dependencies, no extras."""
    home = tmp_path_factory.mktemp("installed")
    venv.create(home, with_pip=False, symlinks=True)
    interpreter = home / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    pins = ROOT / "requirements" / "dev.txt"
    run(*pip, "--python", interpreter, "install", "--constraint", pins, wheel)
    return interpreter


def test_wheel_stores_a_value_and_reads_it_back(python: Path, tmp_path: Path) -> None:
    # -I: nothing of this checkout or of the caller's environment leaks in.
    run(python, "-I", "-W", "error", "-c", STORE_AND_READ_BACK, cwd=tmp_path)


def test_missing_extra_is_named(python: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [python, "-I", "-c", "import gridsession.web.starlette"],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    last_line = done.stderr.strip().splitlines()[-1]
    assert last_line.startswith(("ImportError: ", "ModuleNotFoundError: ")), done.stderr
    assert "pip install gridsession[starlette]" in done.stderr


def test_grids_are_found_by_entry_point(python: Path, tmp_path: Path) -> None:
    listing = (
        "from importlib.metadata import entry_points\n"
        "grids = entry_points(group='gridsession.grids')\n"
        "print(*sorted(f'{e.name}={e.load().__name__}' for e in grids))"
    )
    done = run(python, "-I", "-c", listing, cwd=tmp_path)
    assert done.stdout.split() == ["embedded=EmbeddedGrid", "memory=MemoryGrid"]


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    dist_info = f"gridsession-{project['version']}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "gridsession/py.typed" in names
    assert f"{dist_info}/licenses/LICENSE" in names
    assert {name.split("/")[0] for name in names} == {"gridsession", dist_info}


def test_sdist_leaves_tests_and_tools_out(wheel: Path) -> None:
    (sdist,) = wheel.parent.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        inside = {name.split("/")[1] for name in archive.getnames()}
    assert inside <= {
        ".gitignore",  # hatchling adds it: it says what a build from here leaves out
        "CHANGELOG.md",
        "LICENSE",
        "PKG-INFO",
        "README.md",
        "pyproject.toml",
        "src",
    }
