"""The wheel works without a clone, and the tests of the sdist run."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.conftest import TINY_RUN

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
FOLDERS = ("hf_ddpm", "tests", "benchmarks", "docs", "scripts", "model_cards", "notebooks")


def run(words, folder, path=None):
    """Run a command in a folder, with only `path` in PYTHONPATH; return its output."""
    home = {"HF_HOME": str(folder / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}
    environment = {**os.environ, **home, "PYTHONPATH": "" if path is None else str(path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(word) for word in words], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip(*words, folder):
    run([sys.executable, "-m", "pip", "--no-input", *words, "--no-index", "--no-deps", "-q"], folder)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The unpacked sdist, built from a copy of the clone."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("sdist")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, copy)
    run([sys.executable, "-c", f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})"], copy)
    (archive,) = out.iterdir()
    with tarfile.open(archive) as tar:
        tar.extractall(out, filter="data")
    archive.unlink()
    (folder,) = out.iterdir()
    return folder


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """The wheel, built from the sdist."""
    out = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-build-isolation", "--wheel-dir", out, sdist, folder=out)
    (file,) = out.glob("*.whl")
    return file


def test_sdist_contains_all_files_of_its_tests(sdist):
    for name in FOLDERS:
        files = {str(file.relative_to(ROOT)) for file in (ROOT / name).rglob("*") if file.is_file()}
        missing = {name for name in files if "__pycache__" not in name and not (sdist / name).exists()}
        assert files and not missing
    top = {"constraints.txt", "setup.cfg", "README.md", "README.zh-CN.md", "LICENSE"}
    assert top <= {file.name for file in sdist.iterdir()}
    listed = run([sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider"], sdist, sdist)
    assert len([line for line in listed.splitlines() if "::" in line]) > 1000
    tests = ["tests/diffusion/test_schedules.py", "tests/test_architecture.py", "tests/test_readme.py"]
    run([sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", *tests], sdist, sdist)


def test_wheel_contains_only_package(wheel):
    names = ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"hf_ddpm", f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"}
    files = {str(file.relative_to(ROOT)) for file in (ROOT / "hf_ddpm").rglob("*") if file.is_file()}
    assert {name for name in files if "__pycache__" not in name} == {name for name in names if "dist-info" not in name}
    assert "hf_ddpm/py.typed" in names


def test_wheel_trains_samples_and_evaluates_without_clone(wheel, tmp_path):
    site = tmp_path / "site"
    pip("install", "--target", site, wheel, folder=tmp_path)
    where = run([sys.executable, "-c", "import hf_ddpm; print(hf_ddpm.__file__)"], tmp_path, site)
    assert Path(where.strip()).is_relative_to(site)

    def command(*words):
        run([sys.executable, "-m", "hf_ddpm", *words], tmp_path, site)

    command("train", *TINY_RUN, "--max_train_steps", "2", "--output_dir", "run")
    assert "model_name: run" in (tmp_path / "run" / "README.md").read_text()
    sampling = ("--num_inference_steps", "2", "--num_images", "3")
    run([site / "bin" / "hf-ddpm", "sample", "--model", "run", *sampling, "--output", "out"], tmp_path, site)
    assert {f"0000{index}.png" for index in range(3)} <= {file.name for file in (tmp_path / "out").iterdir()}
    few = ("--dataset", "digits", "--num_images", "8", "--steps_per_image", "2", "--output", "run/results.json")
    command("evaluate", "--model", "run", "--metrics", "fd,nll", "--num_inference_steps", "2", *few)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["nll"]["total_bpd"] > 0 and results["fd"]["value"] > 0
