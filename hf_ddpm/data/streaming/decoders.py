"""Processes that decode the images of a stream, a batch at a time."""

import os
import signal
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from hf_ddpm.data.decoding import attempt
from hf_ddpm.data.transforms import ImageFormat, crop_at

Place = Sequence[float]


class Decoder(Dataset[Any]):
    """Decodes what it is given as an index: the rows of a batch."""

    def __init__(self, form: ImageFormat):
        self.form = form

    def __getitem__(self, job: tuple[list[dict[str, Any] | None], list[Place]]) -> tuple[np.ndarray, list[Any]]:
        images = np.zeros((len(job[0]), *self.form.shape), self.form.dtype)
        bad = []
        for row, (encoded, place) in enumerate(zip(*job, strict=True)):
            image = attempt(encoded, self.form)
            if isinstance(image, str):
                bad.append((row, image))
            else:
                images[row] = crop_at(image, self.form, place)
        return images, bad


def decoding(form: ImageFormat, jobs: Iterable[Any], workers: int) -> DataLoader[Any]:
    """Returns the decoded images of one job after another.

    Args:
        form: What images are made into.
        jobs: What `Decoder` takes, again and again from where it was last set to.
        workers: Processes that decode, which end with what is returned; 0 to decode in this one.
    """
    return DataLoader(
        Decoder(form),
        batch_size=None,
        sampler=jobs,
        num_workers=workers,
        collate_fn=_as_it_is,
        worker_init_fn=_serve_parent if workers else None,
        persistent_workers=workers > 0,
        generator=torch.Generator(),  # the global one is not touched
    )


def _as_it_is(decoded: Any) -> Any:
    return decoded  # as numpy, which travels by pipe: tensors would need shared memory, of which containers have little


def _serve_parent(worker: int) -> None:
    """Leaves signals to the parent, and ends with it: killed, it could not say so, and its pipes stay open here."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # a whole process group is told, and the parent needs its last batch
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
