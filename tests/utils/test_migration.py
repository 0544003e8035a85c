import re
from pathlib import Path

import pytest

from hf_ddpm.config import PARTS, Config, Sources
from hf_ddpm.sampling.options import SampleConfig, Sampling
from hf_ddpm.utils.migration import DIFFUSERS, LUCIDRAINS, MIGRATION
from hf_ddpm.utils.options import option_names, parse_options

PAGE = Path(__file__).parents[2] / "docs" / "migration.md"
OPTIONS = option_names([*PARTS, Sources])


@pytest.mark.parametrize(("title", "table"), [("diffusers", DIFFUSERS), ("denoising-diffusion-pytorch", LUCIDRAINS)])
def test_docs_page_matches_table_in_code(title, table):
    section = re.search(rf"\n## {title}\n(.*?)(?=\n## |\Z)", PAGE.read_text(), re.DOTALL)[1]
    rows = [[cell.strip(" `") for cell in line.split(" | ")] for line in section.splitlines() if line.startswith("| `")]
    written = {name.strip("| `").removeprefix("--"): entry.strip("| ").replace("`", "") for name, entry in rows}
    assert written == {name: entry.replace("`", "") for name, entry in table.items()}


@pytest.mark.parametrize(("name", "entry"), MIGRATION.items())
def test_option_of_another_package_suggests_its_replacement(name, entry):
    assert name not in OPTIONS  # otherwise there would be no error
    assert set(re.findall(r"--(\w+)", entry)) <= set(OPTIONS)
    with pytest.raises(ValueError, match=f"^unknown option --{name}: ") as caught:
        Config.of(preset="digits", **{name: "x"})
    answer = str(caught.value).partition(": ")[2]
    assert answer == (f"did you mean {entry}?" if entry.startswith("--") else entry)


def test_suggested_values_are_valid():
    for entry in MIGRATION.values():
        for name, value in re.findall(r"^--(\w+) (\w+)$", entry):
            Config.of(preset="digits", **{name: value})


def test_options_of_other_packages_in_yaml_file_get_suggestion(tmp_path):
    (tmp_path / "x.yaml").write_text("random_flip: true")
    with pytest.raises(ValueError, match=r"unknown option random_flip: did you mean horizontal_flip\?"):
        Config.of(preset="digits", config=tmp_path / "x.yaml")


def test_options_of_other_commands_are_not_suggested():
    required = ["--model", "m", "--output", "o"]
    with pytest.raises(ValueError, match=r"--ddpm_num_inference_steps: did you mean --num_inference_steps\?"):
        parse_options([*required, "--ddpm-num-inference-steps", "4"], SampleConfig, Sampling)
    with pytest.raises(ValueError, match="unknown option --num_epochs: see --help"):
        parse_options([*required, "--num_epochs", "4"], SampleConfig, Sampling)
