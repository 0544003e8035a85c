r"""Progressive generation (Section 4.3, Figs. 6 and 10): estimates :math:`\hat x_0` during the reverse process."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_ddpm.images import bytes_to_unit, to_bytes
from hf_ddpm.paper.context import FigureContext, rmse, sheet, table
from hf_ddpm.paper.distances import distance, what_was_compared
from hf_ddpm.paper.options import ProgressiveOptions
from hf_ddpm.utils.seeds import SAMPLES, generator


def progressive(context: FigureContext, options: ProgressiveOptions) -> None:
    """Draw estimates of the first images of the seed at several moments, and measure their distances."""
    real = context.reference("fd", options.num_images).features() if options.num_images else None
    timesteps, frames = estimates(context, max(options.shown, options.num_images), options.frames)
    chosen = np.linspace(0, len(frames) - 1, min(options.columns, len(frames))).round().astype(int).tolist()
    moments: list[dict[str, Any]] = []
    for place in chosen:
        moment = {"t": timesteps[place] + 1, "rmse": rmse(bytes_to_unit(frames[place]), bytes_to_unit(frames[-1]))}
        moments.append(moment | (distance(context, real, frames[place]) if real else {}))

    shown = [bytes_to_unit(frame[: options.shown]) for frame in frames]
    rows = [("", torch.stack([shown[place][image] for place in chosen])) for image in range(options.shown)]
    context.draw("progressive.png", sheet(rows, [f"t = {moment['t']}" for moment in moments]))
    context.animate(f"progressive.{options.animation}", shown, [f"t = {t + 1}" for t in timesteps])
    cells = [[moment[name] for name in ("t", "rmse", "value") if name in moment] for moment in moments]
    paragraphs = [
        "The estimate of the image (Eq. 15) at moments of the reverse process, from t = T to 1; RMSE on the scale "
        "[0, 255].",
        "![Progressive generation](progressive.png)",
        f"![As an animation](progressive.{options.animation})",
        table(["t", "RMSE to the image", *(["Frechet distance"] if real else [])], cells),
    ]
    if real:
        plot_distances(context, moments)
        paragraphs += [
            what_was_compared(moments[-1], real.made_by),
            "![Distance against the steps taken (Fig. 10)](progressive_distance.png)",
        ]
    made_by = real.made_by if real else {}
    title = "Progressive generation (Fig. 6)"
    context.write("progressive", title, paragraphs, {"moments": moments}, options, made_by)


def estimates(context: FigureContext, count: int, moments: int) -> tuple[list[int], list[Tensor]]:
    """Return steps `t` and, for each, the estimates of the first images of the seed, as bytes."""
    seed, size = context.options.seed, context.options.batch_size
    parts, timesteps = [], []
    for start in range(0, count, size):
        indices = range(start, min(start + size, count))
        sources = [generator(seed, SAMPLES, index, device=context.accelerator.device) for index in indices]
        images, timesteps = context.pipe.progressive(len(indices), sources, len(context.pipe.scheduler), moments, "pt")
        parts.append([to_bytes(frame).cpu() for frame in images])
    return timesteps, [torch.cat(frame) for frame in zip(*parts, strict=True)]


def plot_distances(context: FigureContext, moments: list[dict[str, Any]]) -> None:
    """Plot the distances against the steps that have been taken (Fig. 10)."""
    steps = [len(context.pipe.scheduler) + 1 - moment["t"] for moment in moments]
    curves = {"estimate": (steps, [moment["value"] for moment in moments])}
    if "floor" in moments[0]:
        curves["held-out images"] = (steps, [moment["floor"] for moment in moments])
    labels = {"x_label": "evaluations of the network", "y_label": "Frechet distance"}
    context.plot("progressive_distance.png", curves, **labels, log_y=True, markers=True)
