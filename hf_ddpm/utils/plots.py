"""Plot curves into PNG files."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from hf_ddpm.utils.files import atomic_write

Curve = tuple[Sequence[float], Sequence[float]]

# A logarithmic axis omits outliers: at most this share of the points at each end, if they are farther from the others
# than this share of the axis.
LEFT_OUT, FAR_OFF = 0.01, 0.25
# With more curves the legend is placed next to the axes; with more values of x they are not all labeled.
MOST_INSIDE, MOST_TICKS = 4, 8


def save_curves(
    path: Path,
    curves: Mapping[str, Curve],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    markers: bool = False,
    levels: Mapping[str, float] | None = None,
) -> None:
    """Plot curves over common axes into a PNG file. A logarithmic y axis omits outliers.

    Args:
        path: The file.
        curves: x and y of each curve by name; a single curve gets no legend.
        x_label: Label of the x axis, with the unit.
        y_label: Label of the y axis, with the unit.
        log_x: If true, the x axis is logarithmic.
        log_y: If true, the y axis is logarithmic.
        markers: If true, mark each point, for curves of few points.
        levels: y of dashed horizontal reference lines by name.
    """
    from matplotlib.figure import Figure  # slow to import; not pyplot, which keeps state and may need a display
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        """Formats ticks as 20 and 0.2, not as 2 x 10^1 and 2e-01."""

        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    levels = levels or {}
    is_beside = len(curves) + len(levels) > MOST_INSIDE
    figure = Figure(figsize=(8 if is_beside else 6.4, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name, (x, y) in curves.items():
        axes.plot(x, y, label=name, marker="o" if markers else None, markersize=4, linewidth=1.2)
    for name, level in levels.items():
        axes.axhline(level, label=name, color="black", linestyle="--", linewidth=1.2)
    axes.set(xlabel=x_label, ylabel=y_label)
    for axis, scale, is_log in ((axes.xaxis, axes.set_xscale, log_x), (axes.yaxis, axes.set_yscale, log_y)):
        if is_log:
            scale("log", nonpositive="mask")
            axis.set_major_formatter(Plain())
            axis.set_minor_formatter(Plain(minor_thresholds=(2, 0.8)))
            axis.grid(which="minor", alpha=0.12)
    axes.grid(alpha=0.3)
    positions = sorted({place for x, _ in curves.values() for place in x})
    if log_x and len(positions) <= MOST_TICKS:
        axes.set_xticks(positions, [f"{place:g}" for place in positions])
        axes.set_xticks([], minor=True)
    heights = [*(value for _, y in curves.values() for value in y), *levels.values()]
    limits = log_limits(heights) if log_y else None
    if limits is not None:
        axes.set_ylim(*limits)
    if is_beside:
        figure.legend(loc="outside right upper", frameon=False)
    elif len(curves) + len(levels) > 1:
        axes.legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    with atomic_write(path) as partial:
        partial.write_bytes(picture.getvalue())


def log_limits(values: Sequence[float]) -> tuple[float, float] | None:
    """Return limits of a logarithmic axis that omit outliers of the positive values; None if there are no outliers."""
    points = np.log([value for value in values if 0 < value < np.inf])
    if not len(points):
        return None
    ends = np.array([points.min(), points.max()])
    inner = np.array(
        [np.quantile(points, LEFT_OUT, method="lower"), np.quantile(points, 1 - LEFT_OUT, method="higher")]
    )
    length = inner[1] - inner[0]
    is_far = np.abs(ends - inner) > FAR_OFF * length
    if not length or not is_far.any():
        return None
    bottom, top = np.exp(np.where(is_far, inner, ends) + np.array([-0.05, 0.05]) * length)
    return float(bottom), float(top)
