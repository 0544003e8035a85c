import json
import re
from pathlib import Path

import pytest
import torch

from tests.conftest import load_file

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def learn():
    return load_file(ROOT / "docs" / "learn.py")


def code_of(learn):
    return [text for kind, text in learn.parts(learn.PAGE.read_text()) if kind == "code"]


def test_notebook_has_text_and_code_of_page(learn):
    cells = json.loads(learn.NOTEBOOK.read_text())["cells"]
    assert ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"] == code_of(learn)
    text = "\n\n".join(text for kind, text in learn.parts(learn.PAGE.read_text()) if kind == "markdown")
    in_notebook = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    words = [re.sub(r"!?\[.*?\]\(.*?\)", "", one).split() for one in (text, in_notebook)]
    assert words[0] == words[1]


def test_results_in_text_are_those_of_notebook(learn):
    cells = json.loads(learn.NOTEBOOK.read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", []) if output["output_type"] == "stream"]
    printed = set(re.findall(r"\d+\.\d+", "".join(line for output in outputs for line in output["text"])))
    sentences = re.findall(r"^(?:The printed|It prints)(?:.|\n)*?\n\n", learn.PAGE.read_text(), re.MULTILINE)
    stated = re.findall(r"\d+\.\d+", " ".join(sentences))
    assert len(stated) == 6 and {*stated} - {"0.02"} <= printed


def test_code_of_page_has_about_100_lines(learn):
    lines = [line for text in code_of(learn) for line in text.splitlines() if line.strip()]
    assert 85 <= len(lines) <= 115


@pytest.mark.slow
def test_code_of_page_runs(learn):
    """It trains, samples and evaluates, and shows the effect of the two slips."""
    names, printed = {}, ""
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    try:
        for code in code_of(learn):
            printed += learn.run(code, names)[0]
    finally:
        torch.set_rng_state(state)
        torch.set_num_threads(threads)
    right, slip = map(float, re.search(r"x_T: (\S+); with the slip: (\S+)", printed).groups())
    assert right == pytest.approx(1, abs=0.03) and slip == pytest.approx(0.02**0.5, abs=0.01)
    assert float(re.search(r"forms of the mean: (\S+)", printed).group(1)) < 1e-5
    first, last = map(float, re.search(r"loss: (\S+) in .*, (\S+) in the last", printed).groups())
    assert last < 0.12 < first
    bits = [float(number) for number in re.findall(r"fixed_\w+: (\S+) bits", printed)]
    assert len(bits) == 2 and all(2 < number < 4 for number in bits)
    for samples in names["samples"].values():
        assert samples.shape == (20, 1, 8, 8) and samples.min() >= -1.2 and samples.max() <= 1.2
