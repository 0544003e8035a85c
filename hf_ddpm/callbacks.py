"""What happens beside the training: samples, exports, evaluations, cards. Only this module knows all of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from hf_ddpm.config import Config
from hf_ddpm.evaluation.evaluate import Evaluator, Figures
from hf_ddpm.evaluation.report import scalars, summary
from hf_ddpm.evaluation.request import EvaluateConfig
from hf_ddpm.hub.card import write_card
from hf_ddpm.images import grid, save_picture, to_pil
from hf_ddpm.sampling import Sampling, sample_images
from hf_ddpm.training.loop import Callback, Run
from hf_ddpm.training.progress import truncate
from hf_ddpm.training.trackers import track_picture


class SampleGrid(Callback):
    """Draws the same images again and again as the network learns, with the averaged weights, into `samples.png`."""

    def __init__(self, path: Path):
        self.path = path

    def on_checkpoint(self, run: Run) -> None:
        """Draws if asked to, unless the run is at its end or was told to stop."""
        training = run.config.training
        if training.sample_at_checkpoints and run.step < training.max_train_steps and run.stopped_by is None:
            self.draw(run)

    def on_end(self, run: Run) -> None:
        """Draws."""
        self.draw(run)

    def draw(self, run: Run) -> None:
        """Draws; each process its share."""
        training, accelerator = run.config.training, run.accelerator
        pipe = run.pipeline()
        pipe.set_progress_bar_config(desc="Sampling", leave=False, disable=not accelerator.is_main_process)
        images = sample_images(
            pipe,
            range(training.num_samples)[accelerator.process_index :: accelerator.num_processes],
            seed=training.seed,
            num_inference_steps=training.num_inference_steps or len(run.scheduler),
            batch_size=training.train_batch_size,
            class_labels=range(len(run.class_names)),
            device=accelerator.device,
        )
        in_order = sorted(gather_object(list(images)), key=lambda numbered: numbered[0])
        if accelerator.is_main_process:
            picture = grid(to_pil(torch.stack([image for _, image in in_order])))
            save_picture(picture, self.path)
            track_picture(run, "samples", picture)


class Export(Callback):
    """Writes the pipeline of the averaged weights, in the format of diffusers; those of further averages below it."""

    def __init__(self, folder: Path):
        self.folder = folder

    def on_end(self, run: Run) -> None:
        """Writes it."""
        if run.accelerator.is_main_process:
            for number, ema in enumerate(run.emas):
                run.pipeline(number).save_pretrained(self.folder / ema.name if number else self.folder)


class Evaluations(Callback):
    """Evaluates the averaged model: at the end into `results.json`, on the way into `evaluations.jsonl` and `best/`.

    Args:
        config: The options of the run.
        accelerator: Its processes.
        tell: Told a line about each evaluation.

    Raises:
        ValueError: If what is asked for is not possible: before the training, not after it.
    """

    def __init__(self, config: Config, accelerator: Accelerator, tell: Callable[[str], object]):
        self.folder, self.tell = Path(config.training.output_dir), tell
        self.log = self.folder / "evaluations.jsonl"
        self.every = config.evaluation.eval_steps
        self.evaluator = Evaluator(_request(config), (config.data.channels, *config.data.size), accelerator)
        self.evaluator.count()

    def on_start(self, run: Run) -> None:
        """Makes up for an evaluation that a kill has cut short."""
        if run.accelerator.is_main_process:
            truncate(self.log, run.step)
        run.accelerator.wait_for_everyone()
        if run.step and run.step not in [line["step"] for line in self._lines()]:
            self.on_checkpoint(run)

    def on_checkpoint(self, run: Run) -> None:
        """Evaluates if it is time to, and keeps the model if none before was better."""
        if self.every is None or run.step % self.every or run.stopped_by is not None:
            return
        work = self.folder / ".evaluation"  # not beside the results: its samples are of one step only
        figures = self._evaluate(run, work / "results.json")
        if run.accelerator.is_main_process:
            line = {"step": run.step, **figures}
            if all(self._badness(line) <= self._badness(before) for before in self._lines()):
                self._keep(run, work)
            with self.log.open("a") as file:
                file.write(json.dumps(line) + "\n")
            shutil.rmtree(work)
        numbers = {f"{name}/{key}": value for name, figure in figures.items() for key, value in figure.items()}
        run.accelerator.log(numbers, step=run.step)
        run.accelerator.wait_for_everyone()

    def on_end(self, run: Run) -> None:
        """Evaluates once more, whatever there was on the way: these figures stay."""
        self._evaluate(run, self.folder / "results.json")

    def _evaluate(self, run: Run, output: Path) -> dict[str, dict[str, Any]]:
        options, training = run.config.evaluation, run.config.training
        sampling = Sampling(
            seed=training.seed,
            num_inference_steps=options.eval_inference_steps or len(run.scheduler),
            class_labels=list(run.class_names),
        )
        figures: Figures = {}
        for part in self.evaluator.evaluate(output, sampling, run.pipeline()):
            figures |= scalars(part)
        if figures:
            self.tell(f"step {run.step}: {summary(figures)}")
        return figures

    def _lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def _badness(self, line: dict[str, Any]) -> float:
        """Returns the figure of the first metric, such that less is better."""
        figure = line[self.evaluator.request.chosen[0]]
        score = figure.get("value", figure.get("total_bpd"))
        return -score if self.evaluator.request.chosen[0] == "is" else score

    def _keep(self, run: Run, work: Path) -> None:
        """Puts the model and its figures into `best/`, file by file: there is always a whole model."""
        run.pipeline().save_pretrained(work / "model")
        (work / "results.json").replace(work / "model" / "results.json")
        for file in [path for path in (work / "model").rglob("*") if path.is_file()]:
            target = self.folder / "best" / file.relative_to(work / "model")
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)


class Card(Callback):
    """Writes the model card: what the run, its figures and its pictures say."""

    def __init__(self, folder: Path):
        self.folder = folder

    def on_end(self, run: Run) -> None:
        """Writes it."""
        if run.accelerator.is_main_process:
            write_card(self.folder, license=run.config.hub.license)


def _request(config: Config) -> EvaluateConfig:
    """Returns what `scripts/evaluate.py` would be asked for."""
    data, options = config.data, config.evaluation
    return EvaluateConfig(
        dataset=data.dataset,
        model=config.training.output_dir,
        reference_split=data.split,
        split=options.eval_split,
        floor=options.eval_floor,
        image_column=data.image_column,
        class_column=data.class_column,
        skip_bad_images=data.skip_bad_images,
        metrics=options.eval_metrics,
        extractor=options.eval_extractor,
        num_images=options.eval_num_images,
        levels=data.levels,
        steps_per_image=options.eval_steps_per_image,
        batch_size=config.training.train_batch_size,
    )
