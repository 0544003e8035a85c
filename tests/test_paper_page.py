import re
from importlib import import_module
from pathlib import Path

import pytest

from hf_ddpm.paper.options import FIGURES
from hf_ddpm.presets import preset_names

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "paper.md").read_text()
QUOTED = re.findall(r"`([^`]+)`", PAGE[PAGE.index("## Equations") : PAGE.index("## Results")])


def resolve(name):
    """Return the object of a dotted name."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            target = import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[length:]:
            target = getattr(target, attribute)
        return target
    raise AttributeError(name)


@pytest.mark.parametrize("name", sorted({name for name in QUOTED if name.startswith("hf_ddpm.")}))
def test_page_names_existing_functions(name):
    target = resolve(name)
    assert callable(target) and target.__doc__


def test_page_names_existing_scripts_presets_and_figures():
    assert all((ROOT / name.split()[0]).exists() for name in QUOTED if name.startswith("scripts/"))
    presets = [name.split()[1] for name in QUOTED if name.startswith("--preset")]
    assert {*preset_names()} - {"digits", "small-32", "small-64"} == {*presets}
    commands = {*FIGURES, "distillation", "all", "ablation"}
    assert {name for name in QUOTED if re.fullmatch(r"[a-z-]+", name)} - {"vlb", "simple"} == commands


def test_page_lists_every_equation_algorithm_figure_and_table():
    def numbers(title):
        section = re.search(rf"## {title}\n(.*?)(?=\n## |\Z)", PAGE, re.DOTALL)[1]
        cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("|")]
        ranges = [re.findall(r"\d+", part) for cell in cells for part in cell.split(",") if "Section" not in part]
        return {n for ends in ranges if ends for n in range(int(ends[0]), int(ends[-1]) + 1)}

    assert numbers("Equations") == {*range(1, 17), 26}
    assert numbers("Algorithms") == {1, 2, 3, 4} and numbers("Tables") == {1, 2, 3, 4}
    assert numbers("Figures") == {*range(1, 20)} - {2}  # which is a drawing
