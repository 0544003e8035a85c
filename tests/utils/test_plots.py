import numpy as np
from PIL import Image

from hf_ddpm.utils.plots import save_curves


def test_curves_are_drawn_where_their_points_are(tmp_path):
    slopes = []
    for y in ([0, 1], [1, 0]):
        save_curves(tmp_path / "curve.png", {"": ([0, 1], y)}, x_label="x", y_label="y")
        with Image.open(tmp_path / "curve.png") as picture:
            pixels = np.asarray(picture.convert("RGB")).astype(int)
        rows, columns = (pixels[..., 2] - pixels[..., 0] > 60).nonzero()  # the curve is blue, all else gray
        slopes.append(np.corrcoef(rows, columns)[0, 1])
    assert slopes[0] < -0.9 and slopes[1] > 0.9  # rows count downward
