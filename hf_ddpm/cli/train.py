"""Trains a DDPM, then samples from it and exports the pipeline.

    accelerate launch scripts/train.py --preset digits --output_dir runs/digits
    accelerate launch scripts/train.py --dataset my_folder --resolution 64 --output_dir runs/mine

The same command goes on from the last checkpoint. `--help` lists the options, hf_ddpm/presets the presets.
"""

from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from functools import cache
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from hf_ddpm.cli.callbacks import Card, Evaluations, Export, Push, SampleGrid
from hf_ddpm.config import Config, parse_config
from hf_ddpm.data.batches import BatchSource
from hf_ddpm.data.decoding import read_report
from hf_ddpm.data.opening import open_images
from hf_ddpm.training.build import build_process, build_run, check_same_step, start_accelerator
from hf_ddpm.training.checkpoints import (
    Checkpoints,
    archive_after,
    find_checkpoint,
    load_checkpoint,
    status_file,
    stored_options,
)
from hf_ddpm.training.dry_run import estimate_cost
from hf_ddpm.training.loop import Callback, Run, train
from hf_ddpm.training.progress import Progress, check_tracker, start_tracker
from hf_ddpm.utils.files import make_folder
from hf_ddpm.utils.launch import Interrupted, exclusive, signals


def start(
    config: Config,
    accelerator: Accelerator,
    checkpoint: Path | None = None,
    report: Path | None = None,
    log: Callable[[str], object] | None = None,
) -> tuple[Run, BatchSource]:
    """Returns a run at step 0 and its images; `checkpoint` is where it will go on from, `report` lists bad images."""
    scheduler, source = build_process(config, checkpoint)  # complains before images are decoded for hours
    images = open_images(
        config.data,
        seed=config.training.seed,
        batch_size=config.training.global_batch_size(accelerator.num_processes),
        device=accelerator.device,
        main_process_first=accelerator.main_process_first(),
        report=report,
        log=log or accelerator.print,
    )
    return build_run(config, accelerator, scheduler, source, images), images


def callbacks_of(config: Config, evaluations: Sequence[Callback], pushes: Sequence[Callback]) -> list[Callback]:
    """Returns what happens beside the training, in this order."""
    folder = Path(config.training.output_dir)
    return [
        Progress(folder / "metrics.jsonl"),
        Checkpoints(folder / "checkpoints", config.training.keep_checkpoints),
        Export(folder),
        Card(folder),
        SampleGrid(folder / "samples.png"),
        *evaluations,
        Card(folder),
        *pushes,
    ]


def print_cost(config: Config, accelerator: Accelerator) -> None:
    """Prints what the run would cost."""
    run, images = start(config, accelerator)
    with closing(images):
        for name, line in estimate_cost(run, images).items():
            accelerator.print(f"{name + ':':16}{line}")
    accelerator.end_training()


def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit code."""
    config = parse_config(argv)
    check_tracker(config.training.tracker)
    accelerator = start_accelerator(config)
    if config.training.dry_run:
        print_cost(config, accelerator)
        return 0

    folder = Path(config.training.output_dir)
    make_folder(folder, "output_dir")
    log = cache(accelerator.print)  # a data set that is opened twice is described once
    with exclusive(folder) if accelerator.is_main_process else nullcontext():
        checkpoint, complaints = find_checkpoint(folder / "checkpoints", config.training.resume)
        if checkpoint is not None:
            config = parse_config(argv, past=stored_options(checkpoint))
        is_pushed = config.hub.push_to_hub and accelerator.is_main_process  # what cannot be done is told first
        pushes = [Push(config, tell=tqdm.write)] if is_pushed else []
        is_evaluated = bool(config.evaluation.eval_metrics)
        evaluations = [Evaluations(config, accelerator, tell=tqdm.write, log=log)] if is_evaluated else []
        listed = folder / "bad_images.jsonl"
        if checkpoint is None and accelerator.is_main_process:
            listed.unlink(missing_ok=True)  # of another run
        accelerator.wait_for_everyone()
        is_told = accelerator.is_main_process or config.data.streaming  # each process streams images of its own
        run, images = start(config, accelerator, checkpoint, listed if is_told else None, log)
        if checkpoint is not None:
            load_checkpoint(run, checkpoint)
        check_same_step(run)  # and all have read before the folder changes
        if accelerator.is_main_process:
            archive_after(folder / "checkpoints", run.step)
            config.save(folder / "config.yaml")
        start_tracker(run)

        origin = "from the start" if checkpoint is None else f"from {checkpoint}"
        accelerator.print(*complaints, sep="\n", end="\n" if complaints else "")
        accelerator.print(
            f"{len(images):,} images, {run.unet.num_parameters():,} parameters, {run.global_batch_size} images a step, "
            f"{accelerator.num_processes} x {accelerator.device}, {torch.get_num_threads()} threads, {origin}"
        )
        share = run.emas[0].initial_share(config.training.max_train_steps)
        if share > 0.5:
            accelerator.print(
                f"ema_decay={run.emas[0].decay}: {share:.0%} of the averaged weights, which are exported, will be "
                "initial weights; --ema_warmup true or a smaller decay avoids it"
            )
        try:
            with status_file(folder / "status.json", run), closing(images):
                train(run, images, callbacks_of(config, evaluations, pushes))
        except Interrupted as interrupted:
            run.stopped_by = interrupted.number
            signals.settle()
        accelerator.end_training()
    skipped = read_report(listed)
    if skipped:
        accelerator.print(f"{len(skipped):,} images or other files are not used: {listed} lists them")
    if run.stopped_by is not None:
        accelerator.print(f"stopped at step {run.step}: with --resume latest the run goes on from its last checkpoint")
        return 128 + run.stopped_by
    accelerator.print(f"{folder / 'samples.png'} shows samples; DDPMPipeline.from_pretrained({str(folder)!r}) loads")
    return 0
