"""Progress of a run: progress bar, `metrics.jsonl`, `status.json` and experiment tracker."""

import importlib.util
import json
import math
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from tqdm.auto import tqdm

from hf_ddpm.provenance import hardware
from hf_ddpm.training.loop import Callback, Run
from hf_ddpm.utils.files import write_text
from hf_ddpm.utils.jsonl import append_line, cut_lines
from hf_ddpm.utils.public import public_values

PROJECT = "hf_ddpm"


class Progress(Callback):
    """Show a progress bar and append a line to `metrics.jsonl` every `log_steps` steps.

    Losses stay on the device until a line is written, so that no other step waits for the device.

    Args:
        path: The metrics file. If a run resumes, lines of later steps are removed.
    """

    def __init__(self, path: Path):
        self.path = path
        self._is_paused = True  # the time before the first step does not count

    def on_start(self, run: Run) -> None:
        """Remove lines of later steps from the file, and open the progress bar."""
        steps, is_main = run.config.training.max_train_steps, run.accelerator.is_main_process
        if is_main:
            cut_lines(self.path, run.step)
        self._bar = tqdm(total=steps, initial=run.step, desc="Training", unit="step", disable=not is_main)
        self._restart()

    def on_step(self, run: Run) -> None:
        """Advance the progress bar, and write a line every `log_steps` steps."""
        self._bar.update()
        if self._is_paused:  # the time since the last step contains other work, such as an evaluation
            self._since, self._timed, self._is_paused = time.perf_counter(), 0, False
        else:
            self._timed += 1
        self._losses.append(run.losses)
        self._t.append(run.t)
        if not run.logs_now:
            return
        run.check_finite()
        # In half precision a loss may overflow; the scaler then skips the step.
        line = {name: value if math.isfinite(value or 0) else None for name, value in self._line(run).items()}
        if run.accelerator.is_main_process:
            append_line(self.path, line)
        run.accelerator.log({name: value for name, value in line.items() if value is not None}, step=run.step)
        rate = "" if run.images_per_second is None else f", {run.images_per_second:.0f} images/s"
        loss = "not finite" if line["loss"] is None else f"{line['loss']:.4f}"
        self._bar.set_postfix_str(f"loss {loss}{rate}")
        self._restart()

    def on_pause(self, run: Run) -> None:
        """Exclude the time of other callbacks, such as an evaluation, from the measured speed."""
        self._measure(run)
        self._is_paused = True

    def on_end(self, run: Run) -> None:
        """Close the progress bar before other callbacks show theirs."""
        self.close()

    def close(self) -> None:
        """Close the progress bar."""
        self._bar.close()

    def _line(self, run: Run) -> dict[str, float | None]:
        """Return the metrics of the steps since the last line. Every process must call this method."""
        losses, t = torch.cat(self._losses), torch.cat(self._t)
        quarter = t * 4 // len(run.diffusion)
        sums = losses.new_zeros(2, 4).index_add_(1, quarter, torch.stack([losses, torch.ones_like(losses)]))
        totals, counts = run.accelerator.reduce(sums, reduction="sum").tolist()
        self._measure(run)
        return {
            "step": run.step,
            "images": run.step * run.global_batch_size,
            "loss": sum(totals) / sum(counts),
            # Mean loss by quarter of the timesteps, from the least noise to the most.
            **{f"loss_q{i}": totals[i - 1] / counts[i - 1] if counts[i - 1] else None for i in range(1, 5)},
            "grad_norm": float(run.grad_norm),
            "learning_rate": run.optimizer.param_groups[0]["lr"],
            "images_per_second": run.images_per_second,
        }

    def _measure(self, run: Run) -> None:
        if self._timed:
            run.images_per_second = self._timed * run.global_batch_size / (time.perf_counter() - self._since)

    def _restart(self) -> None:
        self._losses: list[torch.Tensor] = []
        self._t: list[torch.Tensor] = []
        self._since, self._timed = time.perf_counter(), 0


class StatusFile(Callback):
    """Write the state of a run to `status.json` during a `with` block.

    The status is `running`, then `finished`, `preempted` or `failed` (with the error). While running, step, speed and
    remaining time are updated with each line of `metrics.jsonl`.

    Args:
        path: The file.
        run: The run.
    """

    def __init__(self, path: Path, run: Run):
        self.path, self.run = path, run
        accelerator = run.accelerator
        self.facts = {
            "images": run.num_images,
            "hardware": f"{accelerator.num_processes} x {hardware(accelerator.device)}",
        }

    def __enter__(self) -> "StatusFile":
        """Write the status `running`."""
        self._write("running")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Write the final status of the session."""
        if error is None:
            self._write("finished" if self.run.stopped_by is None else "preempted")
        elif isinstance(error, KeyboardInterrupt):
            self._write("preempted")
        else:
            with suppress(OSError):  # a full disk must not hide the error that it caused
                self._write("failed", error=f"{type(error).__name__}: {error}")

    def on_step(self, run: Run) -> None:
        """Write step, speed and remaining time every `log_steps` steps."""
        if run.logs_now:
            self._write("running", durable=False)

    def _write(self, status: str, durable: bool = True, **more: Any) -> None:
        run, rate = self.run, self.run.images_per_second
        if not run.accelerator.is_main_process:
            return
        steps = run.config.training.max_train_steps
        left = None if rate is None else round((steps - run.step) * run.global_batch_size / rate, 1)
        progress = {"max_train_steps": steps, "images_per_second": rate, "seconds_left": left}
        content = {"status": status, "step": run.step, **progress, **self.facts, **more}
        write_text(self.path, json.dumps(content) + "\n", durable)


def check_tracker(name: str) -> None:
    """Raise a `ValueError` if an experiment tracker is not installed."""
    if name != "none" and importlib.util.find_spec(name) is None:
        raise ValueError(f"--tracker {name}: package is not installed; run `pip install {name}`")


def start_tracker(run: Run) -> None:
    """Start the run's experiment tracker, if it has one; resumed sessions log to the same project, run or group."""
    tracker, folder = run.config.training.tracker, Path(run.config.training.output_dir)
    options = {
        "tensorboard": {"purge_step": run.step + 1},
        "trackio": {"name": folder.name, "resume": "allow"},
        "wandb": {"group": folder.name, "dir": str(folder)},
    }
    if tracker != "none":
        run.accelerator.init_trackers(PROJECT, config=_flat(run), init_kwargs={tracker: options[tracker]})


def track_picture(run: Run, name: str, picture: Image) -> None:
    """Log an image to the experiment tracker."""
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
    """Return the options as numbers and text for the tracker, without local paths."""
    options = public_values(run.config.to_dict(), run.hub_ids)
    return {name: value if isinstance(value, int | float | str) else str(value) for name, value in options.items()}
