"""docs/architecture.md, its picture and docs/modules.md match the package."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.conftest import load_file

ROOT = Path(__file__).parents[1]
PAGE, PICTURE, MODULES = (ROOT / "docs" / name for name in ("architecture.md", "architecture.svg", "modules.md"))
REMEDY = "run python docs/architecture.py"


@pytest.fixture(scope="module")
def architecture():
    return load_file(ROOT / "docs" / "architecture.py")


def test_picture_and_pages_are_up_to_date(architecture):
    assert PICTURE.read_text() == architecture.draw(), REMEDY
    assert MODULES.read_text() == architecture.write_modules(), REMEDY
    page = PAGE.read_text()
    assert page == architecture.write_page(page), REMEDY


def test_picture_shows_imports():
    """Read the imports from text, unlike the script, which reads syntax trees."""
    imported = {}
    for file in (ROOT / "hf_ddpm").rglob("*.py"):
        component = file.relative_to(ROOT / "hf_ddpm").parts[0].removesuffix(".py")
        if (file.parent / "__init__.py").exists() and not component.startswith("__"):
            text = re.sub(r"^if TYPE_CHECKING:\n(?: .*\n|\n)+", "", file.read_text(), flags=re.MULTILINE)
            names = re.findall(r"^ *(?:from|import) hf_ddpm\.(\w+)", text, re.MULTILINE)
            imported.setdefault(component, set()).update(set(names) - {component})
    titles = [title.text for title in ElementTree.parse(PICTURE).iter("{http://www.w3.org/2000/svg}title")][1:]
    shown = {}
    for title in titles:
        component, others = title.split(" imports: ")
        shown[component] = set(others.split(", ")) - {"none"}
    assert shown.keys() == imported.keys() and len(shown) > 10
    by_name = {("cli", "demo")}  # a command, which is imported by its name
    for component, others in imported.items():
        assert others <= shown[component] <= others | {other for name, other in by_name if name == component}


def test_only_implied_arrows_are_left_out(architecture):
    pairs = {("a", "b"), ("b", "c"), ("a", "c"), ("c", "d"), ("a", "d"), ("a", "e")}
    assert architecture.reduce_arrows(pairs) == {("a", "b"), ("b", "c"), ("c", "d"), ("a", "e")}


def test_list_of_modules_names_each_file_once():
    text = MODULES.read_text()
    named = [name + "__init__.py" * name.endswith("/") for name in re.findall(r"\]\(\.\./hf_ddpm/([^)]*)\)", text)]
    assert len(named) == len(set(named))
    assert set(named) == {str(file.relative_to(ROOT / "hf_ddpm")) for file in (ROOT / "hf_ddpm").rglob("*.py")}


def test_numbered_lists_name_existing_definitions():
    lists = re.split(r"\n## ", PAGE.read_text())[1:4]
    for text in lists:
        lines = re.findall(r"^\d+\. \[(.*?)\]\((.*?)\) `(.*?)`", text, re.MULTILINE)
        assert len(lines) == 10
        for name, link, definition in lines:
            assert link == f"../hf_ddpm/{name}"
            source = (PAGE.parent / link).read_text()
            assert all(re.search(rf"(def|class) {part}\b", source) for part in definition.split("."))
