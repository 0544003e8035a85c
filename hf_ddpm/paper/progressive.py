r"""Progressive generation (Section 4.3, Figs. 6 and 10): estimates $\hat x_0$ during the reverse process."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_ddpm.images import bytes_to_unit, to_bytes, to_unit
from hf_ddpm.paper.context import FigureContext, captioned, rmse, sheet, table, what_was_compared
from hf_ddpm.paper.options import ProgressiveOptions
from hf_ddpm.utils.seeds import SAMPLES, generator


def progressive(context: FigureContext, options: ProgressiveOptions) -> None:
    """Draw estimates of the first images of the seed at several moments, and measure their distances."""
    real = context.reference("fd", options.num_images).features() if options.num_images else None
    timesteps, frames = estimates(context, max(options.shown, options.num_images), options.frames)
    chosen = np.linspace(0, len(frames) - 1, min(options.columns, len(frames))).round().astype(int).tolist()
    noise = to_unit(starts(context, options.shown)).cpu()
    moments: list[dict[str, Any]] = []
    for place in chosen:
        moment = {"t": timesteps[place] + 1, "rmse": rmse(bytes_to_unit(frames[place]), bytes_to_unit(frames[-1]))}
        moments.append(moment | (context.distance(real, frames[place]) if real else {}))

    shown = [bytes_to_unit(frame[: options.shown]) for frame in frames]
    seen = [place for place in range(len(frames)) if is_informed(context, timesteps[place])]
    columns = [place for place in chosen if place in seen]
    rows = [("", torch.stack([noise[i], *(shown[place][i] for place in columns)])) for i in range(options.shown)]
    context.draw("progressive.png", sheet(rows, ["x_T", *(f"t = {timesteps[place] + 1}" for place in columns)]))
    titles = ["x_T, noise", *(f"t = {timesteps[place] + 1}" for place in seen)]
    context.animate(f"progressive.{options.animation}", [noise, *(shown[place] for place in seen)], titles)
    cells = [[moment[name] for name in ("t", "rmse", "value") if name in moment] for moment in moments]
    paragraphs = [
        captioned(
            "progressive.png",
            "Progressive generation",
            "Images on their way (a row each): the noise x_T, then the estimate of the image (Eq. 15) at moments of "
            "the reverse process. An estimate divides by the signal in x_t, sqrt(alpha-bar_t); moments with less than "
            f"{LEAST_SIGNAL:g} of it, as at the end of a cosine schedule, are not shown: there it is clipped noise.",
        ),
        captioned(f"progressive.{options.animation}", "As an animation", "The same images at more moments."),
        "The table has all moments, from t = T to 1; RMSE on the scale [0, 255].",
        table(["t", "RMSE to the image", *(["Frechet distance"] if real else [])], cells),
    ]
    if real:
        plot_distances(context, [moment for moment in moments if is_informed(context, moment["t"] - 1)] or moments)
        paragraphs += [
            what_was_compared(moments[-1], real.made_by),
            captioned(
                "progressive_distance.png",
                "Distance against the steps taken (Fig. 10)",
                "Frechet distance of the estimates after so many evaluations of the network, at the moments that are "
                "shown above.",
            ),
        ]
    made_by = real.made_by if real else {}
    title = "Progressive generation (Fig. 6)"
    context.write("progressive", title, paragraphs, {"moments": moments}, options, made_by)


# Least signal in x_t, sqrt(alpha-bar_t), of moments that are shown; the linear schedule of the paper ends at 0.006.
LEAST_SIGNAL = 0.005


def is_informed(context: FigureContext, t: int) -> bool:
    """Return whether x_t still holds enough of an image for an estimate; `t` counts from 0."""
    return bool(context.pipe.scheduler.alphas_cumprod[t] ** 0.5 >= LEAST_SIGNAL)


def starts(context: FigureContext, count: int) -> Tensor:
    """Return the noise x_T that the first images of the seed are made from."""
    seed, device, shape = context.options.seed, context.accelerator.device, (1, *context.pipe.image_shape)
    sources = [generator(seed, SAMPLES, index, device=device) for index in range(count)]
    return torch.cat([torch.randn(shape, generator=source, device=device) for source in sources])


def estimates(context: FigureContext, count: int, moments: int) -> tuple[list[int], list[Tensor]]:
    """Return steps `t` and, for each, the estimates of the first images of the seed, as bytes."""
    seed, size = context.options.seed, context.options.batch_size
    total = len(context.pipe.scheduler)
    # The paper's t, round numbers: from T in even steps to 0, of which the last is 1.
    shown = sorted({max(round(t), 1) - 1 for t in np.linspace(total, 0, moments)}, reverse=True)
    parts, timesteps = [], []
    for start in range(0, count, size):
        indices = range(start, min(start + size, count))
        sources = [generator(seed, SAMPLES, index, device=context.accelerator.device) for index in indices]
        images, timesteps = context.pipe.progressive(len(indices), sources, total, shown, "pt")
        parts.append([to_bytes(frame).cpu() for frame in images])
    return timesteps, [torch.cat(frame) for frame in zip(*parts, strict=True)]


def plot_distances(context: FigureContext, moments: list[dict[str, Any]]) -> None:
    """Plot the distances against the steps that have been taken (Fig. 10)."""
    steps = [len(context.pipe.scheduler) + 1 - moment["t"] for moment in moments]
    curves = {"estimate": (steps, [moment["value"] for moment in moments])}
    levels = {"held-out images": moments[0]["floor"]} if "floor" in moments[0] else {}
    labels = {"x_label": "evaluations of the network", "y_label": "Frechet distance"}
    context.plot("progressive_distance.png", curves, **labels, levels=levels, log_y=True, markers=True)
