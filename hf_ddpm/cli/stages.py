"""Stages of a distillation, each a training run, and the export of the last one."""

import io
import json
import shutil
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import ClassLabel, Dataset, Features, Image

from hf_ddpm.cli.distill import DistillConfig, check_arguments
from hf_ddpm.cli.export import write_model
from hf_ddpm.cli.session import print_cost, print_end, train_session
from hf_ddpm.config import (
    PARTS,
    Config,
    DataConfig,
    DiffusionConfig,
    ModelConfig,
    Sources,
    arguments_of,
    parse_config,
)
from hf_ddpm.hub.stages import stage_folders
from hf_ddpm.pipelines.loading import load_pipeline
from hf_ddpm.pipelines.pipeline_ddpm import DDPMPipeline
from hf_ddpm.pipelines.runs import average_name
from hf_ddpm.sampling.generate import fill_folder
from hf_ddpm.sampling.options import Sampling
from hf_ddpm.training.build import join_processes, resolve_precision, start_accelerator
from hf_ddpm.utils.files import atomic_write, count_of, make_folder, write_text
from hf_ddpm.utils.jsonl import to_json
from hf_ddpm.utils.launch import Interrupted, exclusive
from hf_ddpm.utils.options import given_options, require, require_value
from hf_ddpm.utils.runs import checkpoints, find_checkpoint, lengths_of, read_state, run_folder

# Default limit of the sampling steps of the first halving.
FIRST_STAGE = 64
# Length of a stage by its target, as a multiple of the length of the model's run or, at most, of `RUN_LENGTH` steps.
LENGTHS, RUN_LENGTH = {"images": 2, "teacher": 1 / 4}, 100_000
# Options of the model's run that are defaults of its distillation, in addition to the data options.
INHERITED = (
    *("seed", "train_batch_size", "gradient_accumulation_steps", "learning_rate", "adam_beta1", "adam_beta2"),
    *("max_grad_norm", "ema_decay", "tf32", "deterministic", "gradient_checkpointing", "keep_checkpoints"),
    *("checkpointing_steps", "log_steps", "num_samples"),
    *("eval_split", "eval_floor", "eval_extractor", "eval_num_images", "license"),
)


def distill(model: Path | str, steps: int, output: Path | str, **options: Any) -> Path:
    """Distill a DDPM into one that samples in few steps: `hf-ddpm distill` in Python.

    The same call resumes. With a launcher, every process must call it.

    Args:
        model: Folder or Hub id of a DDPM pipeline (hf_ddpm or diffusers).
        steps: Sampling steps of the distilled model; a divisor of the model's number of diffusion steps.
        output: Folder of the distilled model; its stages are in subfolders.
        options: Further options by their command-line names, such as `max_train_steps=2000`.

    Returns:
        The folder, for `DDPMPipeline.from_pretrained` of hf_ddpm or diffusers.

    Raises:
        ValueError: If the model, an option, the data or a checkpoint is unusable; the message is one line.
        OSError: If a file cannot be written.
        FloatingPointError: If a stage diverges.
        KeyboardInterrupt: If SIGTERM or Ctrl-C stops a stage; a checkpoint is written first.
    """
    own = {field.name for field in fields(DistillConfig)}
    config = DistillConfig(str(model), steps, str(output), **{k: v for k, v in options.items() if k in own})
    return run_stages(config, arguments_of({name: value for name, value in options.items() if name not in own}))


def run_stages(options: DistillConfig, arguments: list[str]) -> Path:
    """Run the remaining stages, and export the last one; see `distill`.

    Args:
        options: Model, steps and folder.
        arguments: Options of the training runs, as command-line arguments.
    """
    check_arguments(arguments)
    pipe = load_pipeline(options.model, "cpu")
    stages = plan_stages(options, pipe)
    configs = [stage_config(options, arguments, pipe, stages, number) for number in range(len(stages))]
    folder, state = Path(options.output), join_processes(configs[0])
    check_output(folder)
    check_lengths(folder, configs, state.num_processes)
    if configs[0].training.dry_run:
        print_costs(options, configs, state)
        return folder
    make_folder(folder, "output")
    with exclusive(folder, "output") if state.is_main_process else nullcontext():
        if options.data_free:
            draw_images(options, pipe, configs, state)
        for number, config in enumerate(configs, start=1):
            teacher, steps = config.distillation.teacher, count_of(config.distillation.student_steps or 1, "step")
            state.print(f"stage {number} of {len(configs)}: {steps}, from {teacher}")
            run = train_session(config)
            print_end(run)
            if run.stopped_by is not None:
                run.accelerator.end_training()
                raise Interrupted(run.stopped_by)
            for tracker in run.accelerator.trackers:
                tracker.finish()
        if state.is_main_process:
            checkpoint, _ = find_checkpoint(Path(configs[-1].training.output_dir) / "checkpoints", "latest")
            assert checkpoint is not None
            write_model(checkpoint, average_name(read_state(checkpoint)), folder)
        state.wait_for_everyone()
    run.accelerator.end_training()
    state.print(f"load the distilled model with DDPMPipeline.from_pretrained({str(folder)!r})")
    return folder


def check_output(folder: Path) -> None:
    """Raise a `ValueError` if the output folder contains another run or model, which the result would replace."""
    is_model = (folder / "model_index.json").exists() and not stage_folders(folder)
    is_free = not is_model and not (folder / "checkpoints").exists()
    allowed = "folder contains another model or run; expected a new folder, or the folder of this distillation"
    require_value("output", str(folder), is_free, allowed)


def check_lengths(folder: Path, configs: list[Config], processes: int) -> None:
    """Raise a `ValueError` if a stage would become longer although a later stage was trained from its result."""
    existing = stage_folders(folder)
    for config in configs:
        steps, kept = config.distillation.student_steps, checkpoints(Path(config.training.output_dir, "checkpoints"))
        later = [path for fewer, path in existing.items() if steps is not None and fewer < steps]
        if not kept or not later:
            continue
        state = read_state(kept[-1])
        most, length = lengths_of(state)[-1][1], config.training.counted(state["data"]["images"], processes)
        reason = f"{later[0]} was trained from {steps}-steps with {count_of(most, 'training step')}; "
        allowed = f"{reason}expected at most {most}, or another --output"
        require_value("max_train_steps", length.max_train_steps, int(length.max_train_steps) <= most, allowed)


def print_costs(options: DistillConfig, configs: list[Config], state: PartialState) -> None:
    """Print the estimated cost of each stage, measured with the model as the teacher of all; write no files."""
    require(options, "data_free", not options.data_free, "false with --dry_run, which samples no images")
    for number, config in enumerate(configs, start=1):
        state.print(f"stage {number} of {len(configs)}: {count_of(config.distillation.student_steps or 1, 'step')}")
        config = replace(config, distillation=replace(config.distillation, teacher=options.model))
        accelerator = start_accelerator(resolve_precision(config, state))
        print_cost(config, accelerator)
    accelerator.end_training()


def plan_stages(options: DistillConfig, pipe: DDPMPipeline) -> list[tuple[int, str]]:
    """Return the steps and the target of each stage, descending to the steps of the distilled model.

    Raises:
        ValueError: If a number of steps is too large or is not a divisor of the model's steps, or the guidance does not
            fit the model.
    """
    total = int(pipe.scheduler.config.num_train_timesteps)
    # A distilled model samples well only with the number of steps that it was trained for.
    most = pipe.default_steps // 2
    require(options, "steps", total % options.steps == 0, f"a divisor of the {total} diffusion steps of the model")
    require(options, "steps", options.steps <= most, f"at most {most}, half of the steps of the model")
    start = options.start_steps
    if start is None:
        start, largest = options.steps, most if pipe.is_distilled else min(most, FIRST_STAGE)
        while 2 * start <= largest:
            start *= 2
    powers = [options.steps << halvings for halvings in range(most.bit_length())]
    require_value("start_steps", start, start in powers, f"--steps {options.steps} times 1, 2, 4, ...")
    allowed = f"{most}, half of the steps that the model was distilled to"
    require_value("start_steps", start, start == most or not pipe.is_distilled, allowed)
    require_value("start_steps", start, start <= most, f"at most {most}, half of the steps of the model")
    is_learned = options.guidance_scale == 1 or pipe.null_class is not None
    require(options, "guidance_scale", is_learned, "1, because the model was not trained for guidance")
    kind = pipe.scheduler.config.prediction_type
    converts = kind in ("epsilon", "mean") if options.convert is None else options.convert
    halvings = [(start >> halving, "teacher") for halving in range((start // options.steps).bit_length())]
    return [*([(2 * start, "images")] if converts else []), *halvings]


def stage_config(
    options: DistillConfig, arguments: list[str], pipe: DDPMPipeline, stages: list[tuple[int, str]], number: int
) -> Config:
    """Return the options of the training run of a stage, counted from 0.

    Raises:
        ValueError: If the dataset is not given, or the value of an option is invalid.
    """
    given = given_options(arguments, (*PARTS, Sources))
    base = base_options(options, pipe)
    folder, (steps, target) = Path(options.output), stages[number]
    base["max_train_steps"] = max(1, int(LENGTHS[target] * base["max_train_steps"]))
    if "num_train_epochs" in given:
        del base["max_train_steps"]
    is_first_halving = target == "teacher" and (number == 0 or stages[number - 1][1] == "images")
    decided = {
        "output_dir": folder / f"{steps}-steps",
        "teacher": options.model if number == 0 else folder / f"{stages[number - 1][0]}-steps",
        "student_steps": steps,
        "student_target": target,
        "teacher_guidance": options.guidance_scale if is_first_halving else 1.0,
        "prediction_type": options.prediction_type,
    }
    if options.data_free:
        names = {"dataset": folder / "teacher-images", "split": "train", "levels": 256}
        decided |= names | ({"class_column": "label"} if pipe.unet.config.num_class_embeds else {})
    elif not base["dataset"] and "dataset" not in given:
        raise ValueError(
            f"--dataset is missing: --model {options.model} is not the folder of a run with a dataset; expected "
            "--dataset NAME or --data_free true"
        )
    return parse_config([*arguments_of(base), *arguments, *arguments_of(decided)])


def base_options(options: DistillConfig, pipe: DDPMPipeline) -> dict[str, Any]:
    """Return the default options of a stage: the options of the model's run, if there is one."""
    channels, height, width = pipe.image_shape
    unet = pipe.unet.config
    base: dict[str, Any] = {
        "dataset": None,
        "block_out_channels": list(unet.block_out_channels),
        "norm_num_groups": unet.norm_num_groups,
        "class_dropout": 0.1 if pipe.null_class is not None else 0.0,
        "max_train_steps": RUN_LENGTH,
    }
    path = run_folder(options.model) / "config.yaml"
    if path.is_file():
        run = parse_config(["--config", str(path)]).to_dict()
        names = [field.name for part in (DataConfig, ModelConfig, DiffusionConfig) for field in fields(part)]
        base |= {name: run[name] for name in (*names, *INHERITED)}
        metrics = [metric for metric in run["eval_metrics"].split(",") if metric not in ("", "nll")]
        base["eval_metrics"] = ",".join(metrics) if metrics and not options.data_free else None
        base["max_train_steps"] = min(run["max_train_steps"] or length_of(path.parent), RUN_LENGTH)
    return base | {
        "resolution": [height, width],
        "channels": channels,
        "init_from": None,
        "variance_type": None,
        "rescale_betas_zero_snr": None,
        "dropout": 0.0,
        "lr_schedule": "cosine",
        "warmup_steps": 0,
    }


def length_of(folder: Path) -> int:
    """Return the optimizer steps of a run whose options give epochs instead; `RUN_LENGTH` if unknown."""
    try:
        return int(json.loads((folder / "status.json").read_text(encoding="utf-8"))["max_train_steps"])
    except (OSError, ValueError, TypeError, KeyError):
        return RUN_LENGTH


def draw_images(options: DistillConfig, pipe: DDPMPipeline, configs: list[Config], state: PartialState) -> None:
    """Sample images with the model and save them, with their classes, as a dataset; reuse existing samples."""
    folder, count = Path(options.output), options.free_images
    classes: list[str] = pipe.class_names or [str(i) for i in range(pipe.unet.config.num_class_embeds or 0)]
    halvings = [config.distillation for config in configs if config.distillation.student_target == "teacher"]
    steps, seed = 2 * int(halvings[0].student_steps or 1), configs[0].training.seed
    sampling = Sampling(seed, steps, class_labels=classes, guidance_scale=options.guidance_scale, mixed_precision="no")
    pipe = pipe.to(state.device)
    pipe.set_progress_bar_config(desc="Steps", leave=False, disable=not state.is_main_process)
    samples = fill_folder(
        pipe,
        folder / "teacher-samples",
        count,
        sampling,
        model=options.model,
        batch_size=min(count, 64),
        state=state,
    )
    target = folder / "teacher-images"
    settings = {name: value for name, value in samples.settings.items() if name != "model"}  # a path, may be relative
    record = to_json({"num_images": count, **settings}, indent=2) + "\n"
    file = target / "sampling.json"
    if state.is_main_process and not (file.is_file() and file.read_bytes() == record.encode()):
        pixels = samples[torch.arange(count)].permute(0, 2, 3, 1).numpy()
        columns: dict[str, Any] = {"image": [{"bytes": _npy(image), "path": None} for image in pixels]}
        features = Features(image=Image())
        if classes:
            columns["label"] = [number % len(classes) for number in range(count)]
            features["label"] = ClassLabel(names=classes)
        shutil.rmtree(target, ignore_errors=True)  # made from other samples, or from another number of them
        with atomic_write(target) as partial:
            Dataset.from_dict(columns, features=features).save_to_disk(str(partial))
            write_text(partial / "sampling.json", record)
    state.wait_for_everyone()


def _npy(image: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, image, allow_pickle=False)
    return content.getvalue()
