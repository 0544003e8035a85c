"""The progress of a run: a bar on the terminal, `metrics.jsonl`, `status.json`, and an experiment tracker."""

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
    """Shows one progress bar and appends a line to `metrics.jsonl` every `log_steps` steps.

    Losses stay on the device until a line is due, so that no step waits for them.

    Args:
        path: The metrics file; lines beyond the step that a run resumes from are cut off.
    """

    def __init__(self, path: Path):
        self.path = path
        self._is_paused = True  # others have something to do before the first step, too

    def on_start(self, run: Run) -> None:
        """Cuts the file to the step resumed from, and opens the bar."""
        steps, is_main = run.config.training.max_train_steps, run.accelerator.is_main_process
        if is_main:
            cut_lines(self.path, run.step)
        self._bar = tqdm(total=steps, initial=run.step, desc="Training", unit="step", disable=not is_main)
        self._restart()

    def on_step(self, run: Run) -> None:
        """Advances the bar; writes a line when one is due."""
        self._bar.update()
        if self._is_paused:  # the time since is not that of this step
            self._since, self._timed, self._is_paused = time.perf_counter(), 0, False
        else:
            self._timed += 1
        self._losses.append(run.losses)
        self._t.append(run.t)
        if not run.logs_now:
            return
        run.check_finite()
        # In half precision a loss may overflow for a step, which is then skipped.
        line = {name: value if math.isfinite(value or 0) else None for name, value in self._line(run).items()}
        if run.accelerator.is_main_process:
            append_line(self.path, line)
        run.accelerator.log({name: value for name, value in line.items() if value is not None}, step=run.step)
        rate = "" if run.images_per_second is None else f", {run.images_per_second:.0f} images/s"
        loss = "not finite" if line["loss"] is None else f"{line['loss']:.4f}"
        self._bar.set_postfix_str(f"loss {loss}{rate}")
        self._restart()

    def on_pause(self, run: Run) -> None:
        """Lets what others do now, such as to evaluate, count as no time of a step."""
        self._measure(run)
        self._is_paused = True

    def on_end(self, run: Run) -> None:
        """Closes the bar before others show theirs."""
        self.close()

    def close(self) -> None:
        """Closes the bar."""
        self._bar.close()

    def _line(self, run: Run) -> dict[str, float | None]:
        """Return what there is to say of the steps since the last line; every process must ask."""
        losses, t = torch.cat(self._losses), torch.cat(self._t)
        quarter = t * 4 // len(run.diffusion)
        sums = losses.new_zeros(2, 4).index_add_(1, quarter, torch.stack([losses, torch.ones_like(losses)]))
        totals, counts = run.accelerator.reduce(sums, reduction="sum").tolist()
        self._measure(run)
        return {
            "step": run.step,
            "images": run.step * run.global_batch_size,
            "loss": sum(totals) / sum(counts),
            # By quarter of the timesteps, from the least noise to the most.
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
    """Keep `status.json` true during a `with` block: running, then finished, preempted or failed (with the error).

    A running session writes its step, speed and remaining time whenever it writes a line of the metrics.

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
        """Write that the run is running."""
        self._write("running")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Write how the session has ended."""
        if error is None:
            self._write("finished" if self.run.stopped_by is None else "preempted")
        elif isinstance(error, KeyboardInterrupt):
            self._write("preempted")
        else:
            with suppress(OSError):  # a full disk must not hide the error that it caused
                self._write("failed", error=f"{type(error).__name__}: {error}")

    def on_step(self, run: Run) -> None:
        """Write step, speed and remaining time when a line of the metrics is due."""
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
    """Raise a `ValueError` if a tracker is not installed."""
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
    """Return the options as trackers take them; they leave this machine, paths of it do not."""
    options = public_values(run.config.to_dict(), run.hub_ids)
    return {name: value if isinstance(value, int | float | str) else str(value) for name, value in options.items()}
