import itertools
import json
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hf_ddpm.evaluation.frechet import Moments, frechet_distance
from hf_ddpm.paper.context import rmse, sheet, table
from hf_ddpm.paper.options import FigureOptions, VisibleOptions
from hf_ddpm.paper.shared_latent import rmse_within


def test_table_aligns_numbers_right():
    expected = "| a | b | c |\n| --- | ---: | ---: |\n| x | 1 | 0.3333 |\n| y | 10000 | 1.235e+05 |"
    assert table(["a", "b", "c"], [["x", 1, 1 / 3], ["y", 10000, 123456.7]]) == expected


def test_data_options_default_to_those_of_run(trained, model):
    default = FigureOptions(model=str(trained))
    assert default.floor and not FigureOptions(model=str(trained), floor=False).floor
    assert (default.dataset, default.levels, default.image_column) == ("digits", 17, None)
    other = FigureOptions(model=str(trained), dataset="mine", image_column="picture")
    assert (other.dataset, other.levels, other.image_column) == ("mine", None, "picture")
    assert FigureOptions(model=model).dataset is None


def test_background_defaults_to_that_of_run(trained, tmp_path):
    (tmp_path / "config.yaml").write_text((trained / "config.yaml").read_text() + "\nbackground: blue\n")
    assert FigureOptions(model=str(tmp_path)).background == "blue"
    assert FigureOptions(model=str(tmp_path), background="white").background == "white"


def test_timesteps_are_quarters_by_default(context):
    assert context.diffused([]) == [5, 10, 15, 20] and context.diffused([9, 3, 9]) == [3, 9]
    for wrong in (0, 21):
        with pytest.raises(ValueError, match=rf"--diffused {wrong}: expected 1 to 20"):
            context.diffused([wrong])


def test_visible_timesteps_by_default(context):
    # sqrt(alpha-bar_t) of the model's 20 betas from 0.005 to 0.5 falls below 0.2 at the 15th.
    betas = np.linspace(5e-3, 0.5, 20)
    signal = np.cumprod(1 - betas) ** 0.5
    eighths = [2, 5, 8, 10, 12, 15, 18, 20]
    assert context.visible([]) == [t for t in eighths if signal[t - 1] >= 0.2] == [2, 5, 8, 10, 12]
    assert context.visible([20, 3]) == [3, 20]


@pytest.mark.parametrize("classes", [[], ["left", "right"], [str(digit) for digit in range(10)]])
def test_standard_error_is_deviation_over_samples_with_classes_in_turn(context, monkeypatch, classes):
    context.options.class_labels, random = classes, torch.Generator().manual_seed(0)
    turn = max(1, len(classes))
    centers = 3 * torch.randn(turn, 2, generator=random, dtype=torch.float64)  # classes differ more than their images

    def draw(count):
        images = torch.randn(count, 2, generator=random, dtype=torch.float64)
        return images + centers[torch.arange(count) % turn]

    real = SimpleNamespace(count=100, extractor=None, reference=draw(5000))
    reference = Moments.of(real.reference)
    monkeypatch.setattr("hf_ddpm.paper.context.extract", lambda *args: SimpleNamespace(features=draw(100)))
    monkeypatch.setattr(
        "hf_ddpm.paper.context.compute_metric",
        lambda name, generated, real: {"value": frechet_distance(Moments.of(generated.features), reference)},
    )
    distances = [context.distance(real, None) for _ in range(150)]
    deviation = statistics.stdev(distance["value"] for distance in distances)
    mean = statistics.fmean(distance["standard_error"] for distance in distances)
    assert 0.7 < mean / deviation < 1.4
    real.count = 2 * turn - 1  # fewer than two images of a class
    assert "standard_error" not in context.distance(real, None) or turn == 1


def test_figure_files_contain_text_results_and_origin(context):
    context.write("name", "Title", ["Text.", "More."], {"value": 1}, VisibleOptions([2]), {"dataset": "d"})
    assert (context.folder / "name.md").read_text() == "## Title\n\nText.\n\nMore.\n"
    written = json.loads((context.folder / "name.json").read_text())
    assert written["value"] == 1 and written["made_by"]["options"] == {"diffused": [2]}
    assert written["made_by"]["dataset"] == "d" and written["made_by"]["seed"] == 0
    assert written["model"]["name"] == context.options.model and set(written["made_by"]["versions"]) >= {
        "torch",
        "hf_ddpm",
    }


def test_output_must_be_folder(tmp_path):
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="is a file or lies below a file; expected a folder"):
            FigureOptions(model="m", output=str(output))


def test_rmse_is_on_scale_of_pixels():
    a, b = torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)
    b[0] = 1.0  # half of all pixels differ by 255
    assert rmse(a, b) == pytest.approx(255 / np.sqrt(2))


def test_rmse_within_groups_is_over_all_pairs():
    images = torch.rand(3, 4, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    squares = [
        ((group[i] - group[j]) ** 2).mean().item() for group in images for i, j in itertools.combinations(range(4), 2)
    ]
    assert rmse_within(images) == pytest.approx(255 * np.sqrt(np.mean(squares)), rel=1e-5)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sheet_shows_images_in_rows_and_columns(channels):
    values = torch.tensor([[0.2, 0.4, 0.6], [0.8, 1.0, 0.0]])
    rows = [(f"row {i}", row.view(3, 1, 1, 1).expand(3, channels, 32, 32)) for i, row in enumerate(values)]
    page = np.asarray(sheet(rows, ["a", "b", "c"]))
    page = page.reshape(*page.shape[:2], channels)
    left, top = page.shape[1] - 3 * 70, page.shape[0] - 2 * 70  # tiles of 64 pixels, followed by a gap of 6
    shown = [[page[top + 70 * i + 32, left + 70 * j + 32, 0] for j in range(3)] for i in range(2)]
    np.testing.assert_array_equal(shown, (values * 255).round().numpy())
    # Labels are dark: those of rows on the left, those of columns above.
    assert page[top : top + 64, : left - 4, 0].min() < 128 and page[:top, left:, 0].min() < 128
