"""Generated images against real ones: features of all sets, then the figures, then the nearest training images."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from hf_ddpm.data.sources import choose
from hf_ddpm.evaluation.extraction import Images, Processes, extract
from hf_ddpm.evaluation.feature_cache import fingerprint, reference_features
from hf_ddpm.evaluation.features import Extractor
from hf_ddpm.evaluation.frechet import Moments
from hf_ddpm.evaluation.options import EvaluateConfig
from hf_ddpm.evaluation.pictures import copied_fraction, nearest_picture
from hf_ddpm.evaluation.results import METRIC_SEED, Sets, figures
from hf_ddpm.utils.public import hub_ids, strip_local_path


def compare(
    request: EvaluateConfig,
    extractor: Extractor,
    images: Images,
    reference: Images | None,
    held_out: Images | None,
    count: int,
    processes: Processes,
    stats: Moments | None = None,
) -> Iterator[tuple[dict[str, dict[str, Any]], Image.Image | None]]:
    """Computes what was asked for of generated images, a metric at a time; all processes are to call it.

    Args:
        request: What was asked for.
        extractor: The extractor.
        images: Generated images, the first `count` of which are taken.
        reference: Real images, all of which are taken; None if there are only `stats`.
        held_out: Other real images, `count` of which are drawn at random for the floor; None for no floor.
        count: Number of images.
        processes: Those that share the work.
        stats: What the Frechet distance is measured by, instead of the reference.

    Yields:
        The figures of a metric, with what it was made with; last those on copies, as `memorization`, and the picture of
        the nearest training images. On all processes but the first, nothing; without a reference, no copies and no
        picture.
    """
    total = count + (0 if reference is None else len(reference)) + (count if held_out is not None else 0)
    known: list[Tensor] = []
    made_by: dict[str, Any] = {"extractor": {"name": extractor.name, "checksum": extractor.checksum}}
    with tqdm(total=-(-total // processes.world), desc="Features", unit="image", disable=processes.rank > 0) as bar:
        generated = extract(extractor, images, range(count), processes, bar.update)
        if reference is not None:
            known, made_by = real_features(request, extractor, reference, held_out, count, processes, bar.update)
    if processes.rank > 0:
        return
    real = dict(zip(("reference", "held_out"), known, strict=False))
    sets = Sets(generated, real.get("reference"), real.get("held_out"), stats)
    for metric in request.compared:
        entry = {**figures(metric, sets), "made_by": made_by}
        if stats is not None and metric == "fd":
            path = Path(str(request.reference_stats))
            checksum = hashlib.sha256(path.read_bytes()).hexdigest()
            entry["made_by"] = made_by | {"reference_stats": {"name": path.name, "sha256": checksum}}
        yield {metric: entry}, None
    if reference is None or sets.reference is None:
        return
    if request.save_reference_stats is not None:
        Moments.of(sets.reference).save(Path(request.save_reference_stats))
    copies = copied_fraction(images, range(count), reference, request.pixel_values)
    numbers_of = {"num_images": count, "reference_images": len(reference)}
    picture = nearest_picture(images, generated.features, reference, sets.reference)
    yield {"memorization": {"exact_copies": copies, **numbers_of, "made_by": made_by}}, picture


def real_features(
    request: EvaluateConfig,
    extractor: Extractor,
    reference: Images,
    held_out: Images | None,
    count: int,
    processes: Processes,
    progress: Callable[[int], object] = lambda count: None,
) -> tuple[list[Tensor], dict[str, Any]]:
    """Returns what generated images are measured by; arguments as above, all processes are to call it.

    Returns:
        Features of the reference and of the images drawn for the floor, if there are any, on all processes; and which
        data and which extractor they are of.
    """
    drawn = choose(len(held_out), count, METRIC_SEED) if held_out is not None else []
    data = {
        "name": strip_local_path(str(request.dataset), hub_ids(request.dataset)),
        "config": request.dataset_config,
        "reference_split": request.reference_split,
        "reference_fingerprint": fingerprint(reference, range(len(reference))),
        "held_out_split": None if held_out is None else request.split,
        "held_out_fingerprint": None if held_out is None else fingerprint(held_out, drawn),
        "reference_skipped": getattr(reference, "skipped", 0),
    }
    features = [
        reference_features(extractor, real, numbers, str(data[name]), processes, progress=progress)
        for real, numbers, name in [
            (reference, range(len(reference)), "reference_fingerprint"),
            (held_out, drawn, "held_out_fingerprint"),
        ]
        if real is not None
    ]
    return features, {"dataset": data, "extractor": {"name": extractor.name, "checksum": extractor.checksum}}
