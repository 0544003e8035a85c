"""Images from anywhere, decoded once, as batches of bytes."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from hf_ddpm.config import DataConfig

if TYPE_CHECKING:  # slow to import: loaded with the first images
    import torch

    from hf_ddpm.data.batches import BatchSource


def open_images(
    data: DataConfig,
    *,
    seed: int,
    batch_size: int,
    device: "torch.device | str",
    main_process_first: AbstractContextManager[None],
    report: Path | None = None,
    log: Callable[[str], object] = lambda line: None,
) -> "BatchSource":
    """Opens the images of a run, in memory or as a stream.

    Args:
        data: Options of the images.
        seed: Seed of the run.
        batch_size: Images in a global batch.
        device: Device of the batches.
        main_process_first: Entered while images are decoded: one process does it, the others find them in the cache.
        report: File that lists, as lines of JSON, bad images and other unused files, with `skip_bad_images`.
        log: Called with a line on the files of a folder, and with one for each damaged cache.

    Returns:
        The images, to be closed.

    Raises:
        ValueError: If the data set, a column or an image is not usable; each is named, with the reason.
    """
    from hf_ddpm.data.batches import ShuffledImages
    from hf_ddpm.data.store import load_images
    from hf_ddpm.data.streaming.stream import open_stream

    report = report if data.skip_bad_images else None
    if data.streaming:
        return open_stream(data, seed=seed, batch_size=batch_size, report=report, device=device, log=log)
    with main_process_first:
        store = load_images(data, seed=seed, report=report, device=device, log=log)
    return ShuffledImages(store, seed=seed, batch_size=batch_size)
