r"""Preview of sampling: estimates of the final images at each step."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import numpy as np
from torch import Tensor

from hf_ddpm.diffusion.gaussian import GaussianDiffusion
from hf_ddpm.images import to_bytes, to_signed, to_unit
from hf_ddpm.pipelines.pipeline_ddpm import DDPMPipeline

# Number of evenly spaced steps that are always shown, including the first and the last.
FRAMES = 8
# Minimum number of seconds before any other step is shown.
PAUSE = 0.3


@dataclass(frozen=True)
class PreviewFrame:
    r"""Images of one step of sampling, to show during sampling.

    Attributes:
        step: Number of steps done, in [0, steps].
        steps: Total number of steps.
        images: :math:`\hat x_0` at that step, at the end the final images; uint8, shape `(B, C, H, W)`.
        frames: Images of the evenly spaced steps up to this one.
        seconds: Seconds since the start.
    """

    step: int
    steps: int
    images: Tensor
    frames: tuple[Tensor, ...]
    seconds: float = 0.0

    @property
    def frame_steps(self) -> list[int]:
        """The steps of all frames, past and future."""
        return _frame_steps(self.steps)


def watch(work: Callable[..., Tensor]) -> Iterator[PreviewFrame]:
    """Run sampling in a separate thread, and yield previews of it.

    Args:
        work: Calls a pipeline with the given keyword arguments, and returns the images as uint8.

    Yields:
        Previews; the last one has the final images. Closing the iterator ends the work after the current step.
    """

    def run(emit: Callable[[tuple[int, int, Tensor]], None]) -> None:
        steps, x_t = 0, None

        def on_step(pipe: DDPMPipeline, i: int, t: Tensor, tensors: dict[str, Tensor]) -> None:
            nonlocal steps, x_t
            steps = pipe.num_timesteps
            emit((i, steps, _estimate(pipe, t, x_t, tensors)))
            x_t = tensors["latents"]

        tensors = ["latents", "pred_original_sample", "model_output"]
        images = work(callback_on_step_end=on_step, callback_on_step_end_tensor_inputs=tensors)
        emit((steps, steps, to_signed(images)))

    frames: tuple[Tensor, ...] = ()
    start, last = time.monotonic(), 0.0
    for step, steps, signed in in_background(run):
        is_frame = step in _frame_steps(steps)
        if not is_frame and time.monotonic() - last < PAUSE:
            continue
        images = to_bytes(to_unit(signed)).cpu()
        if is_frame:
            frames = (*frames, images)
        last = time.monotonic()
        yield PreviewFrame(step, steps, images, frames, last - start)
        last = time.monotonic()


def in_background(work: Callable[[Callable[[Any], None]], None]) -> Iterator[Any]:
    """Run `work(emit)` in a separate thread, and yield the emitted items.

    After the iterator is closed, the next `emit` ends the work. Exceptions of the work are raised here.
    """
    emitted: SimpleQueue[tuple[str, Any]] = SimpleQueue()
    closed = threading.Event()

    def emit(item: Any) -> None:
        if closed.is_set():
            raise _Closed
        emitted.put(("item", item))

    def run() -> None:
        try:
            work(emit)
            emitted.put(("end", None))
        except BaseException as error:
            emitted.put(("error", error))

    threading.Thread(target=run, daemon=True).start()
    try:
        while (message := emitted.get())[0] == "item":
            yield message[1]
    finally:
        closed.set()
    if message[0] == "error":
        raise message[1]


class _Closed(Exception):
    """Ends work whose iterator is closed."""


def _frame_steps(steps: int) -> list[int]:
    return sorted(set(np.linspace(0, steps, FRAMES).round().astype(int).tolist()))


def _estimate(pipe: DDPMPipeline, t: Tensor, x_t: Tensor | None, tensors: dict[str, Tensor]) -> Tensor:
    r"""Return :math:`\hat x_0`; compute it if the scheduler does not return it (the first step then shows noise)."""
    if tensors["pred_original_sample"] is not None:
        return tensors["pred_original_sample"]
    if x_t is None:
        return tensors["latents"]
    diffusion, kind = GaussianDiffusion(pipe.scheduler.betas), pipe.scheduler.config.prediction_type
    return diffusion.predict_start(tensors["model_output"], x_t, int(t), kind)
