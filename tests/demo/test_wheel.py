import os
import re
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path
from zipfile import ZipFile

import pytest

import hf_ddpm
from hf_ddpm.demo.wheel import requirements, write_space, write_wheel

PACKAGE = Path(hf_ddpm.__file__).parent


def run(*command, folder, **environment):
    """Run a command without access to a clone of the package; return its exit code and its output."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MODEL_ID")}
    done = subprocess.run(list(map(str, command)), cwd=folder, env=kept | environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def space(tmp_path):
    write_space(tmp_path / "space")
    return tmp_path / "space"


def test_space_contains_wheel_and_its_requirements(space):
    (wheel,) = space.glob("*.whl")
    assert {file.name for file in space.iterdir()} == {"app.py", "README.md", "requirements.txt", wheel.name}
    lines = (space / "requirements.txt").read_text().splitlines()
    assert lines == requirements()
    names = [re.match(r"[\w-]+", line)[0] for line in lines]
    assert "hf_ddpm" not in names  # it is not on PyPI
    assert {"torch", "diffusers", "gradio"} <= set(names) and not {"pytest", "torch-fidelity", "ruff"} & set(names)


def test_wheel_contains_package_and_valid_record(tmp_path):
    wheel = write_wheel(tmp_path)
    files = {file.relative_to(PACKAGE.parent).as_posix() for file in PACKAGE.rglob("*") if file.is_file()}
    names = ZipFile(wheel).namelist()
    assert {name for name in files if "__pycache__" not in name} == {
        name for name in names if ".dist-info/" not in name
    }
    (record,) = [ZipFile(wheel).read(name).decode() for name in names if name.endswith("RECORD")]
    assert [line.split(",")[0] for line in record.splitlines()] == names
    assert not any("direct_url" in name for name in names)  # it would contain a local path


def test_wheel_is_reproducible(tmp_path):
    (tmp_path / "again").mkdir()
    wheel, again = write_wheel(tmp_path), write_wheel(tmp_path / "again")
    assert wheel.read_bytes() == again.read_bytes()
    assert {entry.date_time for entry in ZipFile(wheel).infolist()} == {(1980, 1, 1, 0, 0, 0)}  # not those of the files


def test_metadata_of_clone_come_from_its_egg_info(tmp_path, monkeypatch):
    folder = tmp_path / "hf_ddpm.egg-info"
    folder.mkdir()
    (folder / "PKG-INFO").write_text("Metadata-Version: 2.4\nName: hf_ddpm\nVersion: 7.8\n")
    monkeypatch.setattr("hf_ddpm.demo.wheel._distribution", lambda: metadata.PathDistribution(folder))
    wheel = ZipFile(write_wheel(tmp_path))
    assert wheel.read("hf_ddpm-7.8.dist-info/METADATA") == (folder / "PKG-INFO").read_bytes()


def test_package_that_is_not_installed_raises_error(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_ddpm.demo.wheel.NAME", "not_installed")
    with pytest.raises(ValueError, match="not_installed is not installed, .*; run pip install -e ."):
        write_space(tmp_path)


@pytest.mark.slow
def test_wheel_installs_into_new_environment(tmp_path):
    wheel = write_wheel(tmp_path)
    venv.create(tmp_path / "new", with_pip=True)
    python = tmp_path / "new" / "bin" / "python"
    code, output = run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel, folder=tmp_path)
    assert code == 0, output
    show = "import hf_ddpm; print(hf_ddpm.__file__, hf_ddpm.__version__)"
    code, output = run(python, "-c", show, folder=tmp_path)
    assert output.startswith(str(tmp_path / "new")) and output.split()[1] == hf_ddpm.__version__
    code, output = run(python, "-m", "pip", "show", "--files", "hf_ddpm", folder=tmp_path)
    assert code == 0 and "hf_ddpm/demo/space/app.py" in output


@pytest.mark.slow
def test_app_of_space_imports_package_from_its_wheel(space, tmp_path):
    show = "import runpy; runpy.run_path('app.py'); import hf_ddpm; print(hf_ddpm.__file__)"
    code, output = run(sys.executable, "-c", show, folder=space, TMPDIR=str(tmp_path))
    assert code == 0, output
    assert Path(output.strip()).is_relative_to(tmp_path) and Path(output.strip()).is_file()
    code, output = run(sys.executable, "app.py", folder=space, MODEL_ID=str(tmp_path / "nothing"))
    assert code == 2 and "nothing' cannot be loaded" in output
