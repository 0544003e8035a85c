"""Training images from folders, files and the Hub, as batches of pixels."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from hf_ddpm.config import DataConfig

if TYPE_CHECKING:  # slow imports, which `open_images` loads
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
    """Open the images of a run, decoded in advance or as a stream.

    Args:
        data: Options of the images.
        seed: Seed of the run.
        batch_size: Images per global batch.
        device: Device of the batches.
        main_process_first: Context in which images are decoded: the main process decodes them first, the others then
            read its cache.
        report: With `skip_bad_images`, the JSON Lines file that lists bad images and other unused files.
        log: Called with a line about the files of a folder, and with one per damaged cache.

    Returns:
        The source of images; the caller closes it.

    Raises:
        ValueError: If the dataset, a column or an image is unusable; the message names it and the reason.
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


def check_exists(data: DataConfig) -> None:
    """Raise a `ValueError` if a dataset is a path that does not exist; Hub ids and streamed URLs are not checked.

    Args:
        data: Options of the images.
    """
    name, path = data.dataset, Path(data.dataset)
    is_path = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if is_path and not path.exists() and not (data.streaming and "://" in name):
        raise ValueError(f"--dataset {name}: does not exist; expected a folder, a file, a Hub id or digits")
