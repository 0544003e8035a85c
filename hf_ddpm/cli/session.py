"""Training from options to an exported, evaluated and pushed model."""

import shlex
from collections.abc import Callable
from contextlib import closing, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from hf_ddpm.cli.callbacks import Card, Evaluations, Export, Push, SampleGrid
from hf_ddpm.config import Config
from hf_ddpm.data import check_exists, open_images
from hf_ddpm.data.batches import BatchSource
from hf_ddpm.data.decoding import read_report
from hf_ddpm.training import loop
from hf_ddpm.training.build import (
    build_process,
    build_run,
    check_same_step,
    join_processes,
    resolve_precision,
    start_accelerator,
)
from hf_ddpm.training.checkpoints import Checkpoints, archive_after, load_checkpoint
from hf_ddpm.training.dry_run import measure_cost
from hf_ddpm.training.loop import Callback, Run
from hf_ddpm.training.memory import MemoryPlan, fit_memory, out_of_memory_explained
from hf_ddpm.training.optim import describe_length
from hf_ddpm.training.progress import Progress, StatusFile, check_tracker, start_tracker
from hf_ddpm.utils.files import count_of, make_folder
from hf_ddpm.utils.launch import Interrupted, exclusive, signals
from hf_ddpm.utils.runs import find_checkpoint, lengths_of, read_state, stored_options

Log = Callable[[str], object]


def train(config: Config | None = None, **options: Any) -> Path:
    """Train a DDPM, sample from it and export the pipeline: `hf-ddpm train` in Python.

    The same call resumes from the last checkpoint of the run. With a launcher, every process must call it. It sets
    `torch.backends.cuda.matmul.allow_tf32` to the option `tf32`, and `torch.use_deterministic_algorithms` and
    `torch.backends.cudnn.benchmark` according to `deterministic`. Simultaneous calls need separate processes.

    Args:
        config: All options, such as `hf_ddpm.Config.of(preset="digits")`; instead of `options`.
        options: Options by their command-line names, such as `preset="digits"`; instead of `config`.

    Returns:
        The folder of the run, for `hf_ddpm.DDPMPipeline.from_pretrained`. With `dry_run` it is not created.

    Raises:
        ValueError: If an option, the data or a checkpoint is unusable; the message is one line.
        OSError: If a file cannot be written.
        FloatingPointError: If the run diverges.
        KeyboardInterrupt: If SIGTERM or Ctrl-C stops the run; a checkpoint is written first.
    """
    if config is None:
        config = Config.of(**options)
    elif options:
        raise ValueError(f"options {', '.join(options)}: not used with config; expected either config or options")
    if not isinstance(config, Config):
        raise ValueError(f"config={config!r}: expected a hf_ddpm.Config, such as Config.of(config='file.yaml')")
    if config.training.dry_run:
        check_tracker(config.training.tracker)
        check_exists(config.data)
        config = resolve_precision(config, join_processes(config))
        accelerator = start_accelerator(config)
        print_cost(config, accelerator)
        accelerator.end_training()
        return Path(config.training.output_dir)
    run = train_session(config)
    run.accelerator.end_training()
    print_end(run)
    if run.stopped_by is not None:
        raise Interrupted(run.stopped_by)
    return Path(config.training.output_dir)


def train_session(config: Config) -> Run:
    """Train to the end or until a signal, which is then stored in `stopped_by` of the returned run.

    The process group stays open for further runs.

    Raises:
        ValueError, OSError, FloatingPointError: See `train`.
    """
    check_tracker(config.training.tracker)
    check_exists(config.data)  # before the folder is created and the precision measured
    folder, state = Path(config.training.output_dir), join_processes(config)
    make_folder(folder, "output_dir")
    with exclusive(folder) if state.is_main_process else nullcontext():
        checkpoint, warnings = find_checkpoint(folder / "checkpoints", config.training.resume)
        if checkpoint is not None:
            config = config.resumed(stored_options(checkpoint))
        elif state.is_main_process:
            print(*config.notes, sep="\n", end="\n" if config.notes else "")
        config = resolve_precision(config, state)
        accelerator = start_accelerator(config)
        config = fit_memory(config, accelerator, checkpoint)
        log = cache(accelerator.print)  # describes a dataset once, even if it is opened twice
        evaluations, pushes = evaluations_and_pushes(config, accelerator, log)
        run, images = open_run(config, accelerator, checkpoint, log)
        with closing(images):
            prepare_folder(run)
            print_start(run, len(images), checkpoint, warnings)
            print_length(run, checkpoint)
            take_steps(run, images, callbacks_of(config, evaluations, pushes))
    return run


def print_cost(config: Config, accelerator: Accelerator) -> None:
    """Print the estimated cost of a run: its memory, then the measured speed if it fits into memory."""

    def show(lines: dict[str, str]) -> None:
        for name, line in lines.items():
            accelerator.print(f"{name + ':':16}{line}")

    accelerator.print(*config.notes, sep="\n", end="\n" if config.notes else "")
    plan = MemoryPlan(config, accelerator)
    show(plan.describe())
    rejection = plan.rejection()
    if rejection is not None:
        show({"not measured": rejection})
        return
    try:
        with out_of_memory_explained(plan.config):
            run, images = start(plan.config, accelerator, accelerator.print)
            with closing(images):
                show(measure_cost(run, images))
    except MemoryError as error:
        show({"not measured": f"not enough memory; {error}"})


def evaluations_and_pushes(config: Config, accelerator: Accelerator, log: Log) -> tuple[list[Evaluations], list[Push]]:
    """Return the callbacks that check their options at once: call this before images are decoded."""
    is_pushed = config.hub.push_to_hub and accelerator.is_main_process
    pushes = [Push(config, log=tqdm.write)] if is_pushed else []
    is_evaluated = bool(config.evaluation.eval_metrics)
    evaluations = [Evaluations(config, accelerator, log=tqdm.write, data_log=log)] if is_evaluated else []
    return evaluations, pushes


def open_run(config: Config, accelerator: Accelerator, checkpoint: Path | None, log: Log) -> tuple[Run, BatchSource]:
    """Return a run in the state of its checkpoint, and its images; in its folder, only the report is written."""
    listed = bad_images(config)
    if checkpoint is None and accelerator.is_main_process:
        listed.unlink(missing_ok=True)  # of another run
    accelerator.wait_for_everyone()
    reports = accelerator.is_main_process or config.data.streaming  # each process streams its own images
    run, images = start(config, accelerator, log, checkpoint, listed if reports else None)
    if checkpoint is not None:
        load_checkpoint(run, checkpoint)
    check_same_step(run)  # also a barrier: all processes have read the folder before it changes
    return run, images


def start(
    config: Config, accelerator: Accelerator, log: Log, checkpoint: Path | None = None, report: Path | None = None
) -> tuple[Run, BatchSource]:
    """Return a run at step 0 and its images; it will resume from `checkpoint`, and list bad images in `report`."""
    scheduler, source = build_process(config, checkpoint)  # reports errors before images are decoded for hours
    images = open_images(
        config.data,
        seed=config.training.seed,
        batch_size=config.training.global_batch_size(accelerator.num_processes),
        device=accelerator.device,
        main_process_first=accelerator.main_process_first(),
        report=report,
        log=log,
    )
    return build_run(config, accelerator, scheduler, source, images), images


def prepare_folder(run: Run) -> None:
    """Archive later checkpoints, write the options, start the tracker."""
    folder = Path(run.config.training.output_dir)
    if run.accelerator.is_main_process:
        archive_after(folder / "checkpoints", run.step)
        run.config.save(folder / "config.yaml")
    start_tracker(run)


def callbacks_of(config: Config, evaluations: list[Evaluations], pushes: list[Push]) -> list[Callback]:
    """Return the callbacks of a run, in the order of their calls."""
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


def take_steps(run: Run, images: BatchSource, callbacks: list[Callback]) -> None:
    """Train to the end or until a signal, which is then stored in `run.stopped_by`."""
    try:
        status = StatusFile(Path(run.config.training.output_dir) / "status.json", run)
        with status, out_of_memory_explained(run.config), torch.enable_grad():  # a notebook may have disabled gradients
            loop.train(run, images, [callbacks[0], status, *callbacks[1:]])
    except Interrupted as interrupted:
        run.stopped_by = interrupted.number
        signals.settle()


def print_start(run: Run, images: int, checkpoint: Path | None, warnings: list[str]) -> None:
    """Print the number of images, parameters and processes, and the checkpoint."""
    accelerator, origin = run.accelerator, "from the start" if checkpoint is None else f"from {checkpoint}"
    if run.step == run.config.training.max_train_steps:
        origin += ", all steps are done (a larger --max_train_steps extends the run)"
    accelerator.print(*warnings, sep="\n", end="\n" if warnings else "")
    accelerator.print(
        f"{count_of(images, 'image')}, {run.unet.num_parameters():,} parameters, "
        f"{count_of(run.global_batch_size, 'image')} per step, {accelerator.num_processes} x {accelerator.device}, "
        f"{count_of(torch.get_num_threads(), 'thread')}, {origin}"
    )
    share = run.emas[0].initial_share(run.config.training.max_train_steps)
    if share > 0.5:
        accelerator.print(
            f"--ema_decay {run.emas[0].decay}: {share:.0%} of the exported average will be initial weights; use "
            "--ema_warmup true or a smaller decay"
        )


def print_length(run: Run, checkpoint: Path | None) -> None:
    """Print how a changed length affects a resumed run."""
    if checkpoint is not None:
        then = lengths_of(read_state(checkpoint))[-1][1]
        line = describe_length(run.config.training, run.step, then)
        run.accelerator.print(*([line] if line else []), sep="", end="\n" if line else "")


def print_end(run: Run) -> None:
    """Print how many images were not used, and how the run ended."""
    log, folder, listed = run.accelerator.print, Path(run.config.training.output_dir), bad_images(run.config)
    skipped = read_report(listed)
    if skipped:
        log(f"unused images and other files: {len(skipped):,}; see {listed}")
    if run.stopped_by is not None:
        log(f"stopped at step {run.step}", *commands_of(run), sep="\n")
    else:
        log(f"samples: {folder / 'samples.png'}; load the model with DDPMPipeline.from_pretrained({str(folder)!r})")


def commands_of(run: Run) -> list[str]:
    """Return lines with commands for a stopped run."""
    folder = Path(run.config.training.output_dir)
    program = "hf-ddpm" if run.accelerator.num_processes == 1 else "accelerate launch -m hf_ddpm"
    latest = "" if run.config.training.resume == "latest" else " --resume latest"
    resume = f"{program} train --config {shlex.quote(str(folder / 'config.yaml'))}{latest}"
    model = shlex.quote(str(folder))
    if run.config.distillation.teacher is not None:
        return ["  resume:      run the same hf-ddpm distill command", f"  export:      hf-ddpm export {model}"]
    return [
        f"  resume:      {resume}",
        f"  end it here: {resume} --max_train_steps {run.step}",
        f"  sample:      hf-ddpm sample --model {model} --output {shlex.quote(str(folder / 'images'))} "
        f"--num_images 16 --num_inference_steps {min(100, run.pipeline().default_steps)}",
        f"  export:      hf-ddpm export {model}",
    ]


def bad_images(config: Config) -> Path:
    """Return the file that lists unusable images."""
    return Path(config.training.output_dir) / "bad_images.jsonl"
