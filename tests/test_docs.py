"""The guide builds as a site that needs no network and covers the public interface."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hf_ddpm

pytest.importorskip("mkdocs")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


def build(root, out):
    """Build the site of a copy of the repository; return the exit code and the output."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", root / "mkdocs.yml", "-d", out]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    code, output = build(ROOT, out)
    assert code == 0, output
    return out


def pages(site):
    return {str(page.relative_to(site)): page.read_text() for page in sorted(site.rglob("*.html"))}


def test_site_loads_nothing_from_elsewhere(site):
    for name, text in pages(site).items():
        loaded = re.findall(r"<(?:script|img|iframe)[^>]* src=\"?([^\" >]+)", text)
        loaded += re.findall(r"<link(?=[^>]*rel=\"?(?:stylesheet|preload|preconnect))[^>]* href=\"?([^\" >]+)", text)
        assert loaded and not [link for link in loaded if re.match(r"(?:https?:)?//", link)], name


def test_formulas_are_mathml(site):
    text = pages(site)["ddpm-in-100-lines/index.html"]
    assert text.count("<math ") > 20
    for name, text in pages(site).items():
        assert "arithmatex" not in text and "$$" not in text, name


def test_api_reference_covers_public_interface(site):
    text = pages(site)["api/index.html"]
    for name in hf_ddpm.__all__:
        thing = getattr(hf_ddpm, name)
        if thing.__module__.startswith("hf_ddpm"):
            assert f'id="{thing.__module__}.{name}"' in text, name
        else:  # a class of diffusers
            assert f"<code>{name}</code>" in text, name
    for method in ("__call__", "inpaint", "vary", "invert", "encode", "interpolate", "push_to_hub", "from_pretrained"):
        assert re.search(rf'id="hf_ddpm\.[\w.]+\.{method}"', text), method


def test_changelog_is_page(site):
    text = pages(site)["changelog/index.html"]
    assert "Differences from diffusers" in text and 'href="../editing/"' in text


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("[a](nowhere.md)", "nowhere.md"),
        ("[a](../nowhere.py)", "no such file: ../nowhere.py"),
        ("[a](start.md#nowhere)", "does not contain an anchor"),
        ("::: hf_ddpm.nowhere", "hf_ddpm.nowhere"),
    ],
)
def test_dead_links_fail(line, reason, tmp_path):
    for name in ("docs", "hf_ddpm"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, tmp_path)
    for name in ("scripts", "tests", "benchmarks", "model_cards", "notebooks"):
        (tmp_path / name).symlink_to(ROOT / name)
    index = tmp_path / "docs" / "index.md"
    index.write_text(f"{index.read_text()}\n{line}\n")
    code, output = build(tmp_path, tmp_path / "site")
    assert code and reason in output, output
