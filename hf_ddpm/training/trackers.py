"""Telling a run's metrics to TensorBoard, Trackio or Weights & Biases, through accelerate."""

import importlib.util
from pathlib import Path

import numpy as np
from PIL.Image import Image

from hf_ddpm.training.loop import Run
from hf_ddpm.utils.public import public_values

PROJECT = "hf_ddpm"


def check_tracker(name: str) -> None:
    """Raises a `ValueError` if a tracker is not installed."""
    if name != "none" and importlib.util.find_spec(name) is None:
        raise ValueError(f"tracker={name!r} is not installed: pip install {name}")


def start_tracker(run: Run) -> None:
    """Opens the run's tracker, if it has one; what later sessions of a run say is put with what earlier ones said."""
    tracker, folder = run.config.training.tracker, Path(run.config.training.output_dir)
    options = {
        "tensorboard": {"purge_step": run.step + 1},
        "trackio": {"name": folder.name, "resume": "allow"},
        "wandb": {"group": folder.name, "dir": str(folder)},
    }
    if tracker != "none":
        run.accelerator.init_trackers(PROJECT, config=_flat(run), init_kwargs={tracker: options[tracker]})


def track_picture(run: Run, name: str, picture: Image) -> None:
    """Shows the tracker a picture."""
    for tracker in run.accelerator.trackers:
        if tracker.name == "tensorboard":
            pixels = np.asarray(picture.convert("RGB"))[None]
            tracker.log_images({name: pixels}, step=run.step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({name: [picture]}, step=run.step)
        else:
            import trackio

            tracker.log({name: trackio.Image(picture)}, step=run.step)


def _flat(run: Run) -> dict[str, int | float | str | bool]:
    """Returns the options as trackers take them; they leave this machine, paths of it do not."""
    options = public_values(run.config.to_dict(), run.hub_ids)
    return {name: value if isinstance(value, int | float | str) else str(value) for name, value in options.items()}
