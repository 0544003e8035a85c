"""Trains a DDPM, then samples from it and exports the pipeline.

    accelerate launch scripts/train.py --preset digits --output_dir runs/digits
    accelerate launch scripts/train.py --dataset my_folder --resolution 64 --output_dir runs/mine

The same command goes on from the last checkpoint. `--help` lists the options, hf_ddpm/presets the presets.
"""

from contextlib import closing, nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from hf_ddpm.config import Config, parse_config
from hf_ddpm.data.batches import BatchSource
from hf_ddpm.data.opening import open_images
from hf_ddpm.images import grid, save_picture, to_pil
from hf_ddpm.launch import Interrupted, run_script, sole_run
from hf_ddpm.sampling import sample_images
from hf_ddpm.training.build import build_process, build_run, check_same_step, start_accelerator
from hf_ddpm.training.dry_run import estimate_cost
from hf_ddpm.training.loop import Callback, Run, train
from hf_ddpm.training.progress import Progress
from hf_ddpm.training.state import Checkpoints, find_checkpoint, load_checkpoint, set_aside, status_file
from hf_ddpm.training.trackers import check_tracker, start_tracker, track_picture


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


def start(config: Config, accelerator: Accelerator, checkpoint=None, report=None) -> tuple[Run, BatchSource]:
    """Returns a run at step 0 and its images."""
    scheduler, source = build_process(config, checkpoint)  # complains before images are decoded for hours
    images = open_images(
        config.data,
        seed=config.training.seed,
        batch_size=config.training.global_batch_size(accelerator.num_processes),
        device=accelerator.device,
        one_first=accelerator.main_process_first(),
        report=report,
    )
    return build_run(config, accelerator, scheduler, source, images), images


def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit code."""
    config = parse_config(argv)
    check_tracker(config.training.tracker)
    accelerator = start_accelerator(config)
    if config.training.dry_run:
        for name, line in estimate_cost(*start(config, accelerator)).items():
            accelerator.print(f"{name + ':':16}{line}")
        accelerator.end_training()
        return 0

    folder = Path(config.training.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with sole_run(folder) if accelerator.is_main_process else nullcontext():
        checkpoint, complaints = find_checkpoint(folder / "checkpoints", config.training.resume)
        run, images = start(config, accelerator, checkpoint, folder / "bad_images.jsonl")
        if checkpoint is not None:
            load_checkpoint(run, checkpoint)
        check_same_step(run)  # and all have read before the folder changes
        if accelerator.is_main_process:
            set_aside(folder / "checkpoints", run.step)
            config.save(folder / "config.yaml")
        start_tracker(run)

        origin = "from the start" if checkpoint is None else f"from {checkpoint}"
        accelerator.print(*complaints, sep="\n", end="\n" if complaints else "")
        accelerator.print(
            f"{len(images):,} images, {run.unet.num_parameters():,} parameters, {run.global_batch_size} images a step, "
            f"{accelerator.num_processes} x {accelerator.device}, {torch.get_num_threads()} threads, {origin}"
        )
        callbacks = [
            Progress(folder / "metrics.jsonl"),
            Checkpoints(folder / "checkpoints", config.training.keep_checkpoints),
            Export(folder),
            SampleGrid(folder / "samples.png"),
        ]
        try:
            with status_file(folder / "status.json", run), closing(images):
                train(run, images, callbacks)
        except Interrupted as interrupted:
            run.stopped_by = interrupted.number
        accelerator.end_training()
    if images.skipped:
        accelerator.print(f"{images.skipped:,} images could not be used: {folder / 'bad_images.jsonl'} lists them")
    if run.stopped_by is not None:
        accelerator.print(f"stopped at step {run.step}: with --resume latest the run goes on from its last checkpoint")
        return 128 + run.stopped_by
    accelerator.print(f"{folder / 'samples.png'} shows samples; DDPMPipeline.from_pretrained({str(folder)!r}) loads")
    return 0


if __name__ == "__main__":
    run_script(main)
