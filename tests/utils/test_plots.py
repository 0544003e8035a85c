import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from hf_ddpm.utils.plots import save_curves


def test_what_is_drawn_is_what_was_given(tmp_path, monkeypatch):
    figures, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (figures.append(self), save(self, *args, **kwargs))
    )
    curves = {"a": ([1, 10, 100], [3.0, 2.0, 0.5]), "b": ([2, 20], [1.0, 4.0])}
    save_curves(tmp_path / "curve.png", curves, x_label="steps", y_label="distance", log_x=True, markers=True)
    (axes,) = figures[0].axes
    assert {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines} == curves
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("steps", "distance")
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "linear")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]


def test_curves_are_drawn_where_their_points_are(tmp_path):
    slopes = []
    for y in ([0, 1], [1, 0]):
        save_curves(tmp_path / "curve.png", {"": ([0, 1], y)}, x_label="x", y_label="y")
        with Image.open(tmp_path / "curve.png") as picture:
            pixels = np.asarray(picture.convert("RGB")).astype(int)
        rows, columns = (pixels[..., 2] - pixels[..., 0] > 60).nonzero()  # the curve is blue, all else gray
        slopes.append(np.corrcoef(rows, columns)[0, 1])
    assert slopes[0] < -0.9 and slopes[1] > 0.9  # rows count downward
