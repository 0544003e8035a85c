"""From the options of a run to its images."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from hf_ddpm.config import DataConfig
from hf_ddpm.data.batches import BatchSource, ShuffledImages
from hf_ddpm.data.store import load_images
from hf_ddpm.data.streaming.stream import open_stream

# Lanes of a stream: as many as processes that read little beside what they use. A change changes every streamed run.
LANES = 16


def open_images(
    config: DataConfig,
    *,
    seed: int,
    batch_size: int,
    device: torch.device | str,
    main_process_first: AbstractContextManager[None],
    report: Path | None = None,
    log: Callable[[str], object] = lambda line: None,
) -> BatchSource:
    """Opens the images of a run.

    Args:
        config: Which.
        seed: Seed of the run.
        batch_size: Images in a global batch.
        device: Where batches are wanted.
        main_process_first: Entered while images are decoded: one process does it, the others find them in the cache.
        report: File for images that cannot be used, and for other files that are not, as lines of JSON.
        log: Called with a line on the files of a folder, and with one for each damaged cache.

    Returns:
        The images, to be closed.

    Raises:
        ValueError: If the data set, a column or an image is not usable; each is named, with the reason.
    """
    options = {
        "split": config.split,
        "config": config.dataset_config,
        "column": config.image_column,
        "resolution": config.size,
        "channels": config.channels,
        "levels": config.levels,
        "crop": config.crop,
        "enlarge": config.enlarge,
        "value_range": config.value_range,
        "class_column": config.class_column,
        "max_samples": config.max_train_samples,
        "seed": seed,
        "skip_bad_images": config.skip_bad_images,
        "report": report if config.skip_bad_images else None,
        "device": device,
        "log": log,
    }
    if config.streaming:
        return open_stream(config.dataset, batch_size=batch_size, lanes=LANES, **options)
    with main_process_first:
        store = load_images(config.dataset, **options)
    return ShuffledImages(store, seed=seed, batch_size=batch_size)
