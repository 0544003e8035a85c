"""docs/architecture.md and its picture are up to date with the package."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.conftest import load_file

ROOT = Path(__file__).parents[1]
PAGE, PICTURE = ROOT / "docs" / "architecture.md", ROOT / "docs" / "architecture.svg"
REMEDY = "run python docs/architecture.py"


@pytest.fixture(scope="module")
def architecture():
    return load_file(ROOT / "docs" / "architecture.py")


def test_picture_and_page_are_up_to_date(architecture):
    assert PICTURE.read_text() == architecture.draw(), REMEDY
    page = PAGE.read_text()
    assert page == architecture.write_page(page), REMEDY


def test_picture_shows_the_imports():
    """Reads the imports from the text of the files; the script uses syntax trees."""
    imported = {}
    for file in (ROOT / "hf_ddpm").rglob("*.py"):
        room = file.relative_to(ROOT / "hf_ddpm").parts[0].removesuffix(".py")
        if (file.parent / "__init__.py").exists() and not room.startswith("__"):
            text = re.sub(r"^if TYPE_CHECKING:\n(?: .*\n|\n)+", "", file.read_text(), flags=re.MULTILINE)
            names = re.findall(r"^ *(?:from|import) hf_ddpm\.(\w+)", text, re.MULTILINE)
            imported.setdefault(room, set()).update(set(names) - {room})
    titles = [title.text for title in ElementTree.parse(PICTURE).iter("{http://www.w3.org/2000/svg}title")][1:]
    shown = {}
    for title in titles:
        room, others = title.split(" imports: ")
        shown[room] = set(others.split(", ")) - {"none"}
    assert shown.keys() == imported.keys() and len(shown) > 10
    by_name = {("cli", "demo")}  # imported by name, as a command
    for room, others in imported.items():
        assert others <= shown[room] <= others | {other for name, other in by_name if name == room}


def test_arrows_implied_by_others_are_left_out(architecture):
    pairs = {("a", "b"), ("b", "c"), ("a", "c"), ("c", "d"), ("a", "d"), ("a", "e")}
    assert architecture.reduce_arrows(pairs) == {("a", "b"), ("b", "c"), ("c", "d"), ("a", "e")}


def test_module_map_lists_each_file_once():
    table = PAGE.read_text().split("## Module map")[1]
    named = [name + "__init__.py" * name.endswith("/") for name in re.findall(r"\]\(\.\./hf_ddpm/([^)]*)\)", table)]
    assert len(named) == len(set(named))
    assert set(named) == {str(file.relative_to(ROOT / "hf_ddpm")) for file in (ROOT / "hf_ddpm").rglob("*.py")}


def test_walks_list_existing_definitions():
    walks = re.split(r"\n## ", PAGE.read_text())[1:4]
    for walk in walks:
        lines = re.findall(r"^\d+\. \[(.*?)\]\((.*?)\) `(.*?)`", walk, re.MULTILINE)
        assert len(lines) == 10
        for name, link, definition in lines:
            assert link == f"../hf_ddpm/{name}"
            source = (PAGE.parent / link).read_text()
            assert all(re.search(rf"(def|class) {part}\b", source) for part in definition.split("."))
