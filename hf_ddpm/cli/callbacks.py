"""Training callbacks for samples, exports, evaluations, model cards and pushes to the Hub."""

import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image

from hf_ddpm.config import Config
from hf_ddpm.evaluation.evaluate import Reference, evaluate
from hf_ddpm.evaluation.options import UNRELATED_OPTIONS, training_request
from hf_ddpm.evaluation.results import Metrics, read_results, scalars, summary
from hf_ddpm.hub.background import BackgroundPush
from hf_ddpm.hub.card import write_card
from hf_ddpm.hub.push import check_push
from hf_ddpm.images import sample_grid, save_animation, save_picture
from hf_ddpm.pipelines.runs import write_export
from hf_ddpm.sampling.generate import generate_images
from hf_ddpm.sampling.options import Sampling
from hf_ddpm.sampling.samplers import replaced_variance
from hf_ddpm.training.loop import Callback, Run
from hf_ddpm.training.progress import track_picture
from hf_ddpm.utils.jsonl import append_line, cut_lines, read_lines

# Time per frame of `samples.gif`, and its largest number of frames, which are evenly spaced.
MILLISECONDS, MOST_FRAMES = 500, 60


class SampleGrid(Callback):
    """Write `samples.png`: images of a fixed seed, sampled with the averaged weights.

    With `sample_at_checkpoints`, it also writes `samples/step-N.png` at each checkpoint, and `samples.gif` of these at
    the end.
    """

    def __init__(self, path: Path):
        self.path, self.folder = path, path.with_suffix("")

    def on_start(self, run: Run) -> None:
        """Delete grids of later steps, which will be written again."""
        if run.accelerator.is_main_process:
            for step, file in self._grids():
                if step > run.step or run.step == 0:
                    file.unlink()

    def on_pause(self, run: Run) -> None:
        """Write a grid with `sample_at_checkpoints`."""
        if run.config.training.sample_at_checkpoints:
            self.write(run)

    def on_end(self, run: Run) -> None:
        """Write the last grid, and the animation of all grids."""
        self.write(run)
        if run.config.training.sample_at_checkpoints and run.accelerator.is_main_process:
            files = [file for _, file in self._grids()]
            thinned = files[:: -math.ceil(len(files) / MOST_FRAMES)][::-1]  # always with the last grid
            grids = [Image.open(file) for file in thinned]
            kind = (grids[-1].size, grids[-1].mode)
            frames = [grid for grid in grids if (grid.size, grid.mode) == kind]
            save_animation(frames, self.path.with_suffix(".gif"), MILLISECONDS)

    def write(self, run: Run) -> None:
        """Sample images and write the grid; each process samples its share."""
        training, accelerator = run.config.training, run.accelerator
        pipe = run.pipeline()
        pipe.set_progress_bar_config(desc="Sampling", leave=False, disable=not accelerator.is_main_process)
        steps = training.num_inference_steps or pipe.default_steps
        images = generate_images(
            pipe,
            range(training.num_samples)[accelerator.process_index :: accelerator.num_processes],
            _sampling(run, steps),
            batch_size=training.train_batch_size,
            device=accelerator.device,
        )
        in_order = sorted(gather_object(list(images)), key=lambda numbered: numbered[0])
        if accelerator.is_main_process:
            pixels = torch.stack([image for _, image in in_order])
            grid = sample_grid(pixels, run.class_names)
            save_picture(grid, self.path)
            track_picture(run, "samples", grid)
            if training.sample_at_checkpoints:
                self.folder.mkdir(exist_ok=True)
                titled = sample_grid(pixels, run.class_names, f"step {run.step:,}")
                save_picture(titled, self.folder / f"step-{run.step:09d}.png")

    def _grids(self) -> list[tuple[int, Path]]:
        """Return the steps and files of the existing grids, by step."""
        files = sorted(self.folder.glob("step-" + "[0-9]" * 9 + ".png"))
        return [(int(file.stem.removeprefix("step-")), file) for file in files]


class Export(Callback):
    """Write the pipeline of the averaged weights in the diffusers format; further averages go to subfolders."""

    def __init__(self, folder: Path):
        self.folder = folder

    def on_end(self, run: Run) -> None:
        """Write the pipelines."""
        if run.accelerator.is_main_process:
            for number, ema in enumerate(run.emas):
                export(run, self.folder / ema.name if number else self.folder, number)


class Evaluations(Callback):
    """Evaluate the averaged model.

    The evaluation at the end goes to `results.json`, those during training to `evaluations.jsonl` and `best/`.

    Args:
        config: The options of the run.
        accelerator: Its processes.
        log: Called with a line per evaluation.
        data_log: Called with lines about unused files of the dataset and about damaged caches.

    Raises:
        ValueError: If an evaluation option is invalid; raised before training starts.
    """

    # Metrics that rank models: their value in the results, and whether lower is better.
    BEST_BY = {"fd": ("value", True), "kid": ("value", True), "is": ("value", False)}

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        log: Callable[[str], object],
        data_log: Callable[[str], object] = lambda line: None,
    ):
        self.folder, self.log = Path(config.training.output_dir), log
        self.lines, self.every = self.folder / "evaluations.jsonl", config.evaluation.eval_steps
        read_results(self.folder / "results.json")
        shape = (config.data.channels, *config.data.size)
        self.request = training_request(config)
        self.reference = Reference(self.request, shape, accelerator, data_log, bound_precision="no")
        self.reference.count()

    def on_start(self, run: Run) -> None:
        """Repeat an evaluation that was interrupted."""
        count, classes = self.reference.count(), len(run.class_names)
        if self.request.compared and count < classes:
            raise ValueError(f"--eval_num_images {count}: the model has {classes} classes; expected at least {classes}")
        is_done = True
        if run.accelerator.is_main_process:
            cut_lines(self.lines, run.step)
            is_done = run.step == 0 or run.step in [line.get("step") for line in read_lines(self.lines)]
        (is_done,) = broadcast_object_list([is_done])
        if not is_done and run.step < run.config.training.max_train_steps:
            self.on_pause(run)

    def on_pause(self, run: Run) -> None:
        """Evaluate every `eval_steps` steps."""
        if self.every is not None and run.step % self.every == 0:
            work = self.folder / ".evaluation"  # its samples are deleted below
            self._note(run, self._evaluate(run, work / "results.json"), work / "results.json")
            if run.accelerator.is_main_process:
                shutil.rmtree(work)
            run.accelerator.wait_for_everyone()

    def on_end(self, run: Run) -> None:
        """Evaluate the final model; `results.json` and its samples are kept."""
        metrics = self._evaluate(run, self.folder / "results.json")
        if self.every is not None and run.step % self.every == 0:
            self._note(run, metrics, self.folder / "results.json")

    def _evaluate(self, run: Run, output: Path) -> Metrics:
        options: dict[str, Any] = {"pipe": run.pipeline(), "reference": self.reference, "output": output}
        metrics = scalars(evaluate(self.request, self._sampling(run), **options, log=self.log))
        if metrics:
            self.log(f"step {run.step}: {summary(metrics)}")
        return metrics

    def _note(self, run: Run, metrics: Metrics, results: Path) -> None:
        """Log metrics to `evaluations.jsonl` and the trackers; save the model if it is the best so far."""
        if run.accelerator.is_main_process:
            # Metrics are comparable only if these options are the same.
            options = asdict(self.request) | asdict(self._sampling(run))
            request = {name: value for name, value in options.items() if name not in UNRELATED_OPTIONS}
            line = {"step": run.step, "request": request, **metrics}
            lines = read_lines(self.lines)
            # Lines of older versions lack newer options, which count as not given.
            given = _given(request)
            comparable = [old for old in lines if _given(old.get("request")) == given and old.get("step") != run.step]
            if all(self._is_as_good(line, other) for other in comparable):
                self._save_best(run, results)
            if run.step not in [other.get("step") for other in lines]:
                append_line(self.lines, line)
        numbers = {f"{name}/{key}": value for name, figure in metrics.items() for key, value in figure.items()}
        run.accelerator.log(numbers, step=run.step)

    def _sampling(self, run: Run) -> Sampling:
        pipe = run.pipeline()
        sampling = _sampling(run, run.config.evaluation.eval_inference_steps or pipe.default_steps)
        # Set only if it replaces the model's variance, which older versions used: their metrics are not comparable.
        return replace(sampling, variance=replaced_variance(pipe, sampling))

    def _is_as_good(self, line: dict[str, Any], other: dict[str, Any]) -> bool:
        metric = self.request.chosen[0]
        key, less_is_better = self.BEST_BY[metric]
        new, old = (metrics.get(metric) for metrics in (line, other))
        if not isinstance(old, dict) or not isinstance(old.get(key), int | float):
            return True  # ignore a damaged line
        low, high = (new, old) if less_is_better else (old, new)
        return bool(low[key] <= high[key])

    def _save_best(self, run: Run, results: Path) -> None:
        """Write the model and its results to `best/`."""
        export(run, self.folder / "best")
        shutil.copy(results, self.folder / "best" / "results.json")


class Card(Callback):
    """Write the model card from the files of the run.

    It runs right after the export, so that an outdated card never accompanies new weights, and again at the end.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def on_end(self, run: Run) -> None:
        """Write the card."""
        if run.accelerator.is_main_process:
            write_card(self.folder, pipe=run.pipeline(), model_id=run.config.hub.hub_model_id)


class Push(Callback):
    """Push the model to the Hub: at checkpoints in the background, and at the end.

    Args:
        config: The options of the run.
        log: Called with a line per failed push, which does not stop the run, and with one at the end.

    Raises:
        ValueError: If the Hub would reject the push; raised before training starts.
        OSError: If the Hub cannot be reached.
    """

    def __init__(self, config: Config, log: Callable[[str], object]):
        self.folder, self.model_id, self.log = Path(config.training.output_dir), str(config.hub.hub_model_id), log
        check_push(self.model_id, config.hub.hub_private_repo)
        self.background = BackgroundPush(self.folder, self.model_id, config.hub.hub_private_repo, log)

    def on_pause(self, run: Run) -> None:
        """Export the current model and start to push it."""
        try:
            export(run, self.folder)
            if not run.config.training.sample_at_checkpoints:
                (self.folder / "samples.png").unlink(missing_ok=True)  # of other weights, from an earlier end
            self._start(run)
        except (OSError, ValueError) as error:
            self.log(f"step {run.step}: push to {self.model_id} failed: {error}")

    def on_end(self, run: Run) -> None:
        """Push the files of the previous callbacks, and wait until the push is done."""
        self._start(run)
        if self.background.finish():
            self.log(f"pushed the model to {self.model_id}")
        else:
            command = f"hf-ddpm push --model {self.folder} --hub_model_id {self.model_id}"
            self.log(f"push to {self.model_id} failed; to retry: {command}")

    def close(self) -> None:
        """Cancel a running push."""
        self.background.close()

    def _start(self, run: Run) -> None:
        write_card(self.folder, pipe=run.pipeline(), model_id=self.model_id)
        self.background.start(f"Upload the model of step {run.step}")


def _sampling(run: Run, steps: int) -> Sampling:
    """Return the settings for sampling during a run: all classes in turn, in the precision of the training."""
    training = run.config.training
    classes, precision = list(run.class_names), training.mixed_precision
    return Sampling(training.seed, steps, class_labels=classes, mixed_precision=precision)


def _given(request: Any) -> dict[str, Any] | None:
    """Return the options of a request that are not None."""
    return {name: value for name, value in request.items() if value is not None} if isinstance(request, dict) else None


def export(run: Run, folder: Path, number: int = 0) -> None:
    """Write the pipeline of an average, and its step to `export.json`; see `write_export`."""
    record = {"step": run.step, "images": run.step * run.global_batch_size}
    write_export(run.pipeline(number), folder, {**record, "lengths": run.lengths, "hub_ids": run.hub_ids})
