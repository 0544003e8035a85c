"""Nearest training images of generated images (Figs. 12 and 15), to detect copies."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_ddpm.data.sources import choose
from hf_ddpm.evaluation.extraction import Images, extract
from hf_ddpm.evaluation.memorization import copied_fraction, nearest_picture
from hf_ddpm.evaluation.precision_recall import nearest
from hf_ddpm.evaluation.results import METRIC_SEED
from hf_ddpm.paper.context import FigureContext, captioned, table
from hf_ddpm.paper.options import NearestNeighborsOptions

# Images are compared at this size at most: all pixels of a large dataset would not fit into memory.
MOST_PIXELS = 32
AT_A_TIME = 256


def nearest_neighbors(context: FigureContext, options: NearestNeighborsOptions) -> None:
    """Draw the samples closest to a training image, by pixels and by features, and compare distances."""
    reference = context.reference("fd", options.num_images)
    real = reference.features()
    training, held_out, indices = reference.images, reference.held_out, range(real.count)
    assert training is not None
    samples = context.samples(real.count, context.sampling(len(context.pipe.scheduler)))
    pixels = [as_points(training, range(len(training)))]
    if held_out is not None:
        pixels.append(as_points(held_out, choose(len(held_out), real.count, METRIC_SEED)))
    real_features = [features for features in (real.reference, real.held_out) if features is not None]
    spaces = {
        "pixels": (as_points(samples, indices), *pixels),
        "features": (extract(real.extractor, samples, indices, context.accelerator).features, *real_features),
    }
    medians = {}
    for name, (sample_points, training_points, *held_out_points) in spaces.items():
        picture = nearest_picture(samples, sample_points, training, training_points)
        context.draw(f"nearest-neighbors_{name}.png", picture)
        medians[name] = {"samples": median(sample_points, training_points)}
        if held_out_points:
            medians[name]["held_out"] = median(held_out_points[0], training_points)
    copies = copied_fraction(samples, indices, training, context.levels)

    data, extractor, count = real.made_by["dataset"], real.made_by["extractor"], real.count
    head = ["distance by", "samples", *(["held-out images"] if pixels[1:] else [])]
    caption = (
        f"Of {count} samples, those closest to an image of {data['name']} ({data['reference_split']}), each with its "
        "three nearest images of that set. Distances are computed from {}."
    )
    by_features = f"features ({extractor['name']})"
    comparison = f", compared with those of {count} held-out images" if pixels[1:] else ""
    paragraphs = [
        captioned("nearest-neighbors_pixels.png", "Nearest by pixels", caption.format("pixels")),
        captioned("nearest-neighbors_features.png", "Nearest by features", caption.format(by_features)),
        table(head, [[name, *values.values()] for name, values in medians.items()]),
        f"Median distances of samples to their nearest training image{comparison}. "
        f"Exact copies of training images among the samples: {100 * copies:.3g}%.",
    ]
    numbers = {"median_distances": medians, "exact_copies": copies, "num_images": count}
    title = "Nearest neighbors (Figs. 12 and 15)"
    context.write("nearest-neighbors", title, paragraphs, numbers, options, real.made_by)


def as_points(images: Images, indices: Any) -> Tensor:
    """Return images on the scale [0, 255] as points, downscaled to at most `MOST_PIXELS` per side, shape `(n, D)`."""
    parts = []
    for start in range(0, len(indices), AT_A_TIME):
        pixels = images[torch.tensor(indices[start : start + AT_A_TIME])]
        height, width = (min(side, MOST_PIXELS) for side in pixels.shape[2:])
        small = F.adaptive_avg_pool2d(pixels.float(), (height, width))
        parts.append(small.flatten(1).cpu())
    return torch.cat(parts)


def median(points: Tensor, reference: Tensor) -> float:
    """Return the median distance of points to their nearest reference point."""
    return nearest(points, reference)[0].quantile(0.5).item()
