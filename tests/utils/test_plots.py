import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from hf_ddpm.utils.plots import log_limits, save_curves


@pytest.fixture
def figures(monkeypatch):
    """Record the saved figures."""
    figures, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (figures.append(self), save(self, *args, **kwargs))
    )
    return figures


def test_curves_labels_and_scales_are_drawn(figures, tmp_path):
    curves = {"a": ([1, 10, 100], [3.0, 2.0, 0.5]), "b": ([2, 20], [1.0, 4.0])}
    save_curves(tmp_path / "curve.png", curves, x_label="steps", y_label="distance", log_x=True, markers=True)
    (axes,) = figures[0].axes
    assert {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines} == curves
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("steps", "distance")
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "linear")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "10", "20", "100"]


def test_level_is_dashed_line_in_legend(figures, tmp_path):
    curves = {"": ([1, 2], [3.0, 2.0])}
    save_curves(tmp_path / "curve.png", curves, x_label="x", y_label="y", levels={"held out": 9.0})
    (axes,) = figures[0].axes
    line = axes.lines[-1]
    assert (set(line.get_ydata()), line.get_linestyle(), line.get_label()) == ({9.0}, "--", "held out")
    assert axes.get_ylim()[1] > 9 and axes.get_legend() is not None


def test_legend_of_many_curves_is_outside_axes(figures, tmp_path):
    curves = {str(number): ([1, 2], [number, 2.0]) for number in range(5)}
    save_curves(tmp_path / "curve.png", curves, x_label="x", y_label="y")
    (axes,), (legend,) = figures[0].axes, figures[0].legends
    assert axes.get_legend() is None and len(legend.get_texts()) == 5
    assert legend.get_window_extent().x0 >= axes.get_window_extent().x1


def test_zeros_are_omitted_from_logarithmic_axes(figures, tmp_path):
    save_curves(tmp_path / "curve.png", {"": ([0, 1, 2], [0, 1, 2])}, x_label="x", y_label="y", log_y=True)
    with np.errstate(divide="ignore"):
        assert not np.isfinite(figures[0].axes[0].yaxis.get_transform().transform([0.0])).any()


def test_logarithmic_axis_omits_only_outliers(figures, tmp_path):
    x, y = np.arange(1, 1001), np.geomspace(1, 1e-3, 1000)
    for lone, shown in (({}, None), ({0: 0.0}, None), ({999: 1e-9}, 1e-3), ({0: 1e-9, 5: 1e9}, 1e-3)):
        values = y.copy()
        values[list(lone)] = list(lone.values())
        limits = log_limits(values.tolist())
        save_curves(tmp_path / "curve.png", {"": (x, values)}, x_label="x", y_label="y", log_y=True)
        bottom, top = figures[-1].axes[0].get_ylim()
        # 1% of the points at each end of three decades is a factor of 1.07.
        assert 0.5e-3 < bottom < 1.1e-3 and 0.9 < top < 2
        assert (limits is None) == (shown is None)
    assert log_limits([1.0, 1e-9, 2.0]) is None  # with few points, none is an outlier
    assert log_limits([]) is None and log_limits([0.0]) is None and log_limits([2.0] * 300) is None


def test_curves_are_drawn_at_their_points(tmp_path):
    slopes = []
    for y in ([0, 1], [1, 0]):
        save_curves(tmp_path / "curve.png", {"": ([0, 1], y)}, x_label="x", y_label="y")
        with Image.open(tmp_path / "curve.png") as picture:
            pixels = np.asarray(picture.convert("RGB")).astype(int)
        rows, columns = (pixels[..., 2] - pixels[..., 0] > 60).nonzero()  # the curve is blue, everything else is gray
        slopes.append(np.corrcoef(rows, columns)[0, 1])
    assert slopes[0] < -0.9 and slopes[1] > 0.9  # rows are counted from the top
