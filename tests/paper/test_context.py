import itertools
import json

import numpy as np
import pytest
import torch

from hf_ddpm.paper.context import rmse, sheet, table
from hf_ddpm.paper.options import DiffusedOptions, FigureOptions
from hf_ddpm.paper.shared_latent import variety


def test_numbers_are_right_of_their_columns():
    expected = "| a | b | c |\n| --- | ---: | ---: |\n| x | 1 | 0.3333 |\n| y | 10000 | 1.235e+05 |"
    assert table(["a", "b", "c"], [["x", 1, 1 / 3], ["y", 10000, 123456.7]]) == expected


def test_the_data_of_a_run_are_known_and_may_be_others(trained, model):
    known = FigureOptions(model=str(trained))
    assert known.floor and not FigureOptions(model=str(trained), floor=False).floor
    assert (known.dataset, known.levels, known.image_column) == ("digits", 17, None)
    other = FigureOptions(model=str(trained), dataset="mine", image_column="picture")
    assert (other.dataset, other.levels, other.image_column) == ("mine", None, "picture")
    assert FigureOptions(model=model).dataset is None


def test_the_background_is_that_of_the_run_unless_another_is_given(trained, tmp_path):
    (tmp_path / "config.yaml").write_text((trained / "config.yaml").read_text() + "\nbackground: blue\n")
    assert FigureOptions(model=str(tmp_path)).background == "blue"
    assert FigureOptions(model=str(tmp_path), background="white").background == "white"


def test_diffusion_steps_are_quarters_by_default(context):
    assert context.diffused([]) == [5, 10, 15, 20] and context.diffused([9, 3, 9]) == [3, 9]
    for wrong in (0, 21):
        with pytest.raises(ValueError, match=rf"diffused=\[{wrong}\] is not allowed: 1 to 20"):
            context.diffused([wrong])


def test_by_default_images_are_diffused_as_far_as_they_are_seen(context):
    # sqrt(alpha-bar_t) of the model's 20 betas from 0.005 to 0.5 falls below 0.2 at the 15th.
    betas = np.linspace(5e-3, 0.5, 20)
    signal = np.cumprod(1 - betas) ** 0.5
    eighths = [2, 5, 8, 10, 12, 15, 18, 20]
    assert context.informed([]) == [t for t in eighths if signal[t - 1] >= 0.2] == [2, 5, 8, 10, 12]
    assert context.informed([20, 3]) == [3, 20]


def test_a_figure_says_what_it_is_of(context):
    context.write("name", "Title", ["Words.", "More."], {"value": 1}, DiffusedOptions([2]), {"dataset": "d"})
    assert (context.folder / "name.md").read_text() == "## Title\n\nWords.\n\nMore.\n"
    written = json.loads((context.folder / "name.json").read_text())
    assert written["value"] == 1 and written["made_by"]["options"] == {"diffused": [2]}
    assert written["made_by"]["dataset"] == "d" and written["made_by"]["seed"] == 0
    assert written["model"]["name"] == context.options.model and set(written["made_by"]["versions"]) >= {
        "torch",
        "hf_ddpm",
    }


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="a file stands there, a folder is wanted"):
        FigureOptions(model="m", output=str(tmp_path / "file"))


def test_rmse_is_on_the_scale_of_pixels():
    a, b = torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)
    b[0] = 1.0  # half of all pixels are 255 off
    assert rmse(a, b) == pytest.approx(255 / np.sqrt(2))


def test_variety_is_the_mean_over_pairs_of_a_group():
    images = torch.rand(3, 4, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    squares = [
        ((group[i] - group[j]) ** 2).mean().item() for group in images for i, j in itertools.combinations(range(4), 2)
    ]
    assert variety(images) == pytest.approx(255 * np.sqrt(np.mean(squares)), rel=1e-5)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_image_stands_at_its_place(channels):
    values = torch.tensor([[0.2, 0.4, 0.6], [0.8, 1.0, 0.0]])
    rows = [(f"row {i}", row.view(3, 1, 1, 1).expand(3, channels, 32, 32)) for i, row in enumerate(values)]
    page = np.asarray(sheet(rows, ["a", "b", "c"]))
    page = page.reshape(*page.shape[:2], channels)
    left, top = page.shape[1] - 3 * 70, page.shape[0] - 2 * 70  # 64 pixels, and 6 behind them
    seen = [[page[top + 70 * i + 32, left + 70 * j + 32, 0] for j in range(3)] for i in range(2)]
    np.testing.assert_array_equal(seen, (values * 255).round().numpy())
    # Labels are dark: those of rows on the left, those of columns above.
    assert page[top : top + 64, : left - 4, 0].min() < 128 and page[:top, left:, 0].min() < 128
