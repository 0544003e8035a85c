"""What a person sees of a run: a bar on the terminal and lines in `metrics.jsonl`."""

import json
import time
from pathlib import Path

import torch
from tqdm.auto import tqdm

from hf_ddpm.training.loop import Callback, Run


class Progress(Callback):
    """Shows one progress bar and appends a line to `metrics.jsonl` every `log_steps` steps.

    Losses stay on the device until a line is due, so that no step waits for them.

    Args:
        path: The metrics file; lines beyond the step that a run resumes from are cut off.
    """

    def __init__(self, path: Path):
        self.path = path

    def on_start(self, run: Run) -> None:
        """Cuts the file to the step resumed from, and opens the bar."""
        steps, is_main = run.config.training.max_train_steps, run.accelerator.is_main_process
        if is_main:
            _truncate(self.path, run.step)
        self._bar = tqdm(total=steps, initial=run.step, desc="Training", unit="step", disable=not is_main)
        self._restart(run)

    def on_step(self, run: Run) -> None:
        """Advances the bar; writes a line when one is due."""
        self._bar.update()
        self._losses.append(run.loss)
        training = run.config.training
        if run.step % training.log_steps and run.step < training.max_train_steps and run.stopped_by is None:
            return
        loss = run.accelerator.reduce(torch.stack(self._losses).mean(), reduction="mean").item()
        seconds = time.perf_counter() - self._since
        line = {
            "step": run.step,
            "images": run.step * run.global_batch_size,
            "loss": loss,
            "grad_norm": float(run.grad_norm),
            "learning_rate": run.optimizer.param_groups[0]["lr"],
            "images_per_second": len(self._losses) * run.global_batch_size / seconds,
        }
        if run.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        self._bar.set_postfix_str(f"loss {loss:.4f}, {line['images_per_second']:.0f} images/s")
        run.check_finite()
        self._restart(run)

        if run.step == training.max_train_steps or run.stopped_by is not None:
            self._bar.close()

    def _restart(self, run: Run) -> None:
        self._losses: list[torch.Tensor] = []
        self._since = time.perf_counter()


def _truncate(path: Path, step: int) -> None:
    """Drops the lines after `step`, and a line that a kill has cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            continue
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(kept))
    partial.replace(path)
