"""Curves as pictures."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from hf_ddpm.utils.files import atomic_write

Curve = tuple[Sequence[float], Sequence[float]]


def save_curves(
    path: Path,
    curves: Mapping[str, Curve],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    markers: bool = False,
) -> None:
    """Draws curves over common axes into a PNG.

    Args:
        path: The file.
        curves: By name, x and y; a single curve needs no legend.
        x_label: What x is, with its unit.
        y_label: What y is, with its unit.
        log_x: Whether the x axis is logarithmic.
        log_y: Whether the y axis is.
        markers: Whether each point is marked, for curves of few.
    """
    from matplotlib.figure import Figure  # takes a second; not pyplot, which keeps state and may want a display
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        """Says 20 and 0.2, where others say 2 x 10^1 and 2e-01."""

        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    figure = Figure(figsize=(6.4, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name, (x, y) in curves.items():
        axes.plot(x, y, label=name, marker="o" if markers else None, markersize=4, linewidth=1.2)
    axes.set(xlabel=x_label, ylabel=y_label)
    for axis, scale, is_log in ((axes.xaxis, axes.set_xscale, log_x), (axes.yaxis, axes.set_yscale, log_y)):
        if is_log:
            scale("log")
            axis.set_major_formatter(Plain())
            axis.set_minor_formatter(Plain(minor_thresholds=(2, 0.8)))
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    with atomic_write(path) as partial:
        partial.write_bytes(picture.getvalue())
