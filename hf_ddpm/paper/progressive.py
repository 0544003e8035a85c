"""Progressive generation (Section 4.3, Figs. 6 and 10): estimates of the image during sampling."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_ddpm.images import bytes_to_unit, to_bytes, to_unit
from hf_ddpm.paper.context import FigureContext, captioned, describe_distance, rmse, sheet, table
from hf_ddpm.paper.options import ProgressiveOptions
from hf_ddpm.utils.seeds import SAMPLES

# Least signal sqrt(alpha-bar_t) at which estimates are shown; the linear schedule of the paper ends at 0.006.
LEAST_SIGNAL = 0.005


def progressive(context: FigureContext, options: ProgressiveOptions) -> None:
    """Draw estimates of the first images of the seed at several timesteps, and measure their distances."""
    real = context.reference("fd", options.num_images).features() if options.num_images else None
    timesteps, frames = estimates(context, max(options.shown, options.num_images), options.frames)
    chosen = np.linspace(0, len(frames) - 1, min(options.columns, len(frames))).round().astype(int).tolist()
    noise = to_unit(initial_noise(context, options.shown)).cpu()
    moments: list[dict[str, Any]] = []
    for index in chosen:
        moment = {"t": timesteps[index] + 1, "rmse": rmse(bytes_to_unit(frames[index]), bytes_to_unit(frames[-1]))}
        moments.append(moment | (context.distance(real, frames[index]) if real else {}))

    shown = [bytes_to_unit(frame[: options.shown]) for frame in frames]
    visible = [index for index in range(len(frames)) if has_signal(context, timesteps[index])]
    columns = [index for index in chosen if index in visible]
    rows = [("", torch.stack([noise[i], *(shown[index][i] for index in columns)])) for i in range(options.shown)]
    context.draw("progressive.png", sheet(rows, ["x_T", *(f"t = {timesteps[index] + 1}" for index in columns)]))
    titles = ["x_T, noise", *(f"t = {timesteps[index] + 1}" for index in visible)]
    context.animate(f"progressive.{options.animation}", [noise, *(shown[index] for index in visible)], titles)
    cells = [[moment[name] for name in ("t", "rmse", "value") if name in moment] for moment in moments]
    paragraphs = [
        captioned(
            "progressive.png",
            "Progressive generation",
            "Estimates of the image (Eq. 15) during sampling, one image per row; on the left the noise x_T. Timesteps "
            f"with a signal sqrt(alpha-bar_t) below {LEAST_SIGNAL:g}, as at the start of sampling with a cosine "
            "schedule, are not shown: the estimate divides by the signal, and would be clipped noise there.",
        ),
        captioned(f"progressive.{options.animation}", "Animation", "The same images at more timesteps."),
        "The table has all timesteps, from t = T to 1. RMSE between estimate and final image on the scale [0, 255].",
        table(["t", "RMSE to the image", *(["Frechet distance"] if real else [])], cells),
    ]
    if real:
        plot_distances(context, [moment for moment in moments if has_signal(context, moment["t"] - 1)] or moments)
        paragraphs += [
            describe_distance(moments[-1], real.made_by),
            captioned(
                "progressive_distance.png",
                "Distance against network evaluations (Fig. 10)",
                "Frechet distance of the estimates against the number of network evaluations, at the timesteps shown "
                "above.",
            ),
        ]
    made_by = real.made_by if real else {}
    title = "Progressive generation (Fig. 6)"
    context.write("progressive", title, paragraphs, {"moments": moments}, options, made_by)


def has_signal(context: FigureContext, t: int) -> bool:
    """Return whether x_t contains enough signal for an estimate of the image; `t` is 0-based."""
    return bool(context.pipe.scheduler.alphas_cumprod[t] ** 0.5 >= LEAST_SIGNAL)


def initial_noise(context: FigureContext, count: int) -> Tensor:
    """Return the noise x_T of the first images of the seed."""
    shape, device = (1, *context.pipe.image_shape), context.accelerator.device
    sources = [context.generator(SAMPLES, index) for index in range(count)]
    return torch.cat([torch.randn(shape, generator=source, device=device) for source in sources])


def estimates(context: FigureContext, count: int, frames: int) -> tuple[list[int], list[Tensor]]:
    """Return 0-based timesteps and the estimates at each of them, for the first images of the seed, as bytes."""
    size, total = context.options.batch_size, len(context.pipe.scheduler)
    # Evenly spaced from T to 0 in the paper's t, which gives round numbers; 0 is replaced by 1.
    shown = sorted({max(round(t), 1) - 1 for t in np.linspace(total, 0, frames)}, reverse=True)
    parts, timesteps = [], []
    for start in range(0, count, size):
        indices = range(start, min(start + size, count))
        sources = [context.generator(SAMPLES, index) for index in indices]
        images, timesteps = context.pipe.progressive(
            len(indices), sources, total, shown, "pt", **context.conditions(indices)
        )
        parts.append([to_bytes(frame).cpu() for frame in images])
    return timesteps, [torch.cat(frame) for frame in zip(*parts, strict=True)]


def plot_distances(context: FigureContext, moments: list[dict[str, Any]]) -> None:
    """Plot the distances against the number of network evaluations (Fig. 10)."""
    steps = [len(context.pipe.scheduler) + 1 - moment["t"] for moment in moments]
    curves = {"estimate": (steps, [moment["value"] for moment in moments])}
    context.plot_distances("progressive_distance.png", curves, "network evaluations", moments[0])
