"""What a person sees of a run: a bar on the terminal and lines in `metrics.jsonl`."""

import json
import time
from pathlib import Path

import torch
from tqdm.auto import tqdm

from hf_ddpm.files import write_text
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
            truncate(self.path, run.step)
        self._bar = tqdm(total=steps, initial=run.step, desc="Training", unit="step", disable=not is_main)
        self._restart(run)

    def on_step(self, run: Run) -> None:
        """Advances the bar; writes a line when one is due."""
        self._bar.update()
        self._losses.append(run.losses)
        self._t.append(run.t)
        training = run.config.training
        if run.step % training.log_steps and run.step < training.max_train_steps and run.stopped_by is None:
            return
        line = self._line(run)
        if run.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        run.accelerator.log({name: value for name, value in line.items() if value is not None}, step=run.step)
        self._bar.set_postfix_str(f"loss {line['loss']:.4f}, {line['images_per_second']:.0f} images/s")
        run.check_finite()
        self._restart(run)

    def on_end(self, run: Run) -> None:
        """Closes the bar before others show theirs."""
        self.close()

    def close(self) -> None:
        """Closes the bar."""
        self._bar.close()

    def _line(self, run: Run) -> dict[str, float | None]:
        """Returns what there is to say of the steps since the last line; every process must ask."""
        losses, t = torch.cat(self._losses), torch.cat(self._t)
        quarter = t * 4 // len(run.scheduler)
        sums = losses.new_zeros(2, 4).index_add_(1, quarter, torch.stack([losses, torch.ones_like(losses)]))
        totals, counts = run.accelerator.reduce(sums, reduction="sum").tolist()
        seconds = time.perf_counter() - self._since
        return {
            "step": run.step,
            "images": run.step * run.global_batch_size,
            "loss": sum(totals) / sum(counts),
            # By quarter of the timesteps, from the least noise to the most.
            **{f"loss_q{i}": totals[i - 1] / counts[i - 1] if counts[i - 1] else None for i in range(1, 5)},
            "grad_norm": float(run.grad_norm),
            "learning_rate": run.optimizer.param_groups[0]["lr"],
            "images_per_second": len(self._losses) * run.global_batch_size / seconds,
        }

    def _restart(self, run: Run) -> None:
        self._losses: list[torch.Tensor] = []
        self._t: list[torch.Tensor] = []
        self._since = time.perf_counter()


def truncate(path: Path, step: int) -> None:
    """Drops the lines of a file of JSON that are of later steps than `step`, and a line that a kill has cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_text(path, "".join(kept))
