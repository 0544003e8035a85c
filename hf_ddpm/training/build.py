"""Build a run at step 0 from its options."""

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType

from hf_ddpm.config import Config, TrainingConfig
from hf_ddpm.data.batches import BatchSource
from hf_ddpm.diffusion.gaussian import NOISE_SIGNAL
from hf_ddpm.diffusion.losses import Objective
from hf_ddpm.models.blocks import initialize_like_paper
from hf_ddpm.models.precision import Choice, choose_precision, on_main_process
from hf_ddpm.models.unet_2d import UNet2DModel
from hf_ddpm.pipelines.loading import load_pipeline
from hf_ddpm.pipelines.pipeline_ddpm import DDPMPipeline
from hf_ddpm.schedulers.scheduling_ddpm import DDPMScheduler
from hf_ddpm.training.distillation import open_teacher, student_scheduler
from hf_ddpm.training.loop import Run
from hf_ddpm.training.optim import EMA, adam
from hf_ddpm.utils.launch import use_own_cores
from hf_ddpm.utils.options import require
from hf_ddpm.utils.public import hub_ids
from hf_ddpm.utils.seeds import INITIALIZATION, derived_seed

# Distributed types of accelerate in which each process holds the whole network, as averages and checkpoints require.
REPLICATED = {kind for kind in DistributedType if kind.value == "NO" or kind.value.startswith("MULTI_")}


def join_processes(config: Config) -> PartialState:
    """Return accelerate's state of this process.

    Raises:
        ValueError: If the processes are not connected, or their number differs from `world_size`.
    """
    state, launched = PartialState(cpu=not torch.cuda.is_available()), int(os.environ.get("WORLD_SIZE", 1))
    if state.num_processes != launched:
        raise ValueError(
            f"WORLD_SIZE {launched}: only {state.num_processes} of the processes are connected; "
            "start them with `accelerate launch` or torchrun"
        )
    if config.training.world_size not in (None, launched):
        raise ValueError(f"--world_size {config.training.world_size}: expected {launched}, the number of processes")
    return state


def choose_kernels(training: TrainingConfig) -> None:
    """Set this process's threads, TF32 rounding and deterministic kernels as the options say."""
    if training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the first matrix product on a GPU
    torch.use_deterministic_algorithms(training.deterministic)
    torch.backends.cudnn.benchmark = not training.deterministic  # shapes are the same in every step
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = training.tf32
    use_own_cores()


def resolve_precision(config: Config, state: PartialState) -> Config:
    """Replace the precision `auto` by a measured choice, and print it. Every process must call this function.

    The main process times a network with the run's options; all processes use its choice.

    Returns:
        The options with the precision; unchanged if it was not `auto`.

    Raises:
        ValueError: If the model of `init_from` is unusable, or the options of the diffusion process are invalid.
    """
    training = config.training
    if training.mixed_precision != "auto":
        return config
    choose_kernels(training)
    options = network_options(config, build_process(config)[1])

    def choose() -> Choice:
        with torch.random.fork_rng(devices=[]):
            unet = UNet2DModel(**options).to(state.device)
        unet.lay_out_kernels()
        if training.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        shape = (config.data.channels, *config.data.size)
        return choose_precision(unet, shape, training.train_batch_size, training=True)

    choice = on_main_process(choose)
    state.print(choice.line)
    return replace(config, training=replace(training, mixed_precision=choice.precision))


def start_accelerator(config: Config) -> Accelerator:
    """Return the accelerator, and set this process's kernels, see `choose_kernels`. The precision must not be `auto`.

    Raises:
        ValueError: If the launcher shards weights, or sets the gradient accumulation, which is an option of the run.
    """
    tracker = config.training.tracker
    choose_kernels(config.training)
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != config.training.mixed_precision:
        AcceleratorState._reset_state()  # accelerate keeps the precision of an earlier run in this process
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision=config.training.mixed_precision,
        dynamo_backend="no",  # `compile_network` compiles instead
        log_with=None if tracker == "none" else tracker,
        project_dir=config.training.output_dir,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    if accelerator.distributed_type not in REPLICATED:
        kind = accelerator.distributed_type.value
        raise ValueError(
            f"distributed_type {kind} of the launcher: each process needs the whole weights; expected MULTI_GPU"
        )
    if accelerator.gradient_accumulation_steps != 1:
        steps = accelerator.gradient_accumulation_steps
        raise ValueError(
            f"gradient_accumulation_steps {steps} of the launcher: expected 1; "
            f"use --gradient_accumulation_steps {steps} of the training command instead"
        )
    return accelerator


def build_process(config: Config, checkpoint: Path | None = None) -> tuple[Any, DDPMPipeline | None]:
    """Return the scheduler of the run and the pipeline that the run starts from, if any.

    Args:
        config: The options.
        checkpoint: The checkpoint that the run resumes from. It is loaded instead of `init_from` or the teacher, which
            may be gone by now.

    Returns:
        The scheduler: a `DDPMScheduler`, or the sampler of a student. The pipeline named by `init_from` or `teacher`;
        None without these options.

    Raises:
        ValueError: If the pipeline cannot be loaded or is for other image sizes or channels, or an option does not fit
            the process.
    """
    source, scheduler = None, DDPMScheduler(**config.scheduler())
    if config.start_from is None and checkpoint is None:
        _check_terminal_signal(config, scheduler)
    if config.start_from is not None:
        source = load_pipeline(config.start_from if checkpoint is None else str(checkpoint), "cpu")
        _check_source(source, config)
        scheduler = DDPMScheduler.from_config(source.scheduler.config)
    options = [(config.training, "num_inference_steps")]
    if config.evaluation.eval_metrics:
        options += [(config.evaluation, "eval_inference_steps"), (config.evaluation, "eval_steps_per_image")]
    for part, name in options:
        fits = (getattr(part, name) or 1) <= len(scheduler)
        require(part, name, fits, f"at most {len(scheduler)}, the number of diffusion steps")
    if config.distillation.student_steps is not None:
        return student_scheduler(scheduler, config), source
    _objective(config, scheduler)
    return scheduler, source


def network_options(config: Config, source: DDPMPipeline | None) -> dict[str, Any]:
    """Return the options of the run's network, without class embeddings, which are small."""
    return config.unet() if source is None else {**_unet_of(source, config), "num_class_embeds": None}


def _unet_of(source: DDPMPipeline, config: Config) -> dict[str, Any]:
    """Return the options of a network that starts from the weights of `source`; a student learns no variance."""
    options = {**source.unet.config, "dropout": config.model.dropout}
    return options if config.distillation.teacher is None else options | {"out_channels": options["in_channels"]}


def build_run(
    config: Config,
    accelerator: Accelerator,
    scheduler: Any,
    source: DDPMPipeline | None,
    images: BatchSource,
) -> Run:
    """Return a run at step 0; its initial weights depend only on the seed, or are copied from `source`."""
    config = replace(config, training=config.training.counted(len(images), accelerator.num_processes))
    if source is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(config.training.seed, INITIALIZATION))
            unet = UNet2DModel(**config.unet(len(images.class_names)))
            initialize_like_paper(unet)
    else:
        _check_classes(source, config, images.class_names)
        unet = UNet2DModel.from_config(_unet_of(source, config))
        weights = source.unet.state_dict()
        for name in ("conv_out.weight", "conv_out.bias"):  # a student drops the channels of a learned variance
            weights[name] = weights[name][: unet.config.out_channels]
        unet.load_state_dict(weights)
    unet.to(accelerator.device)
    unet.lay_out_kernels()  # before the averages, the optimizer and DDP copy the memory layout
    if config.training.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if config.distillation.teacher is None:
        diffusion, objective, teacher = scheduler.diffusion, _objective(config, scheduler), None
    else:
        diffusion, objective, teacher = open_teacher(config, accelerator)
    return Run(
        config=config,
        accelerator=accelerator,
        unet=unet,
        emas=[EMA(unet, decay, config.training.ema_warmup) for decay in config.training.ema_decay],
        optimizer=adam(unet, config.training),
        scheduler=scheduler,
        diffusion=diffusion,
        objective=objective,
        class_names=images.class_names,
        num_images=len(images),
        hub_ids=hub_ids(config.data.dataset, config.start_from, config.evaluation.eval_extractor),
        teacher=teacher,
        lengths=[(0, config.training.max_train_steps)],
    )


def _objective(config: Config, scheduler: DDPMScheduler) -> Objective:
    return Objective(
        config.training.objective,
        prediction_type=scheduler.config.prediction_type,
        variance_type=scheduler.variance_type,
        levels=config.data.levels,
    )


def _check_terminal_signal(config: Config, scheduler: DDPMScheduler) -> None:
    """Raise a `ValueError` if x_T still contains signal, unless `allow_terminal_signal` is set."""
    options, signal = config.diffusion, scheduler.diffusion.alphas_cumprod[-1].item()
    if signal > NOISE_SIGNAL and not options.allow_terminal_signal:
        prior_bits = -0.5 * math.log2(1 - signal)
        betas = f"--beta_start {options.beta_start:g} --beta_end {options.beta_end:g}"
        raise ValueError(
            f"{betas} --num_train_timesteps {options.num_train_timesteps}: x_T keeps {signal:.1%} of the variance "
            f"of the images (L_T up to {prior_bits:.2g} bits/dim), but sampling starts from pure noise; omit the betas "
            "(the defaults are scaled to the number of steps), or set --allow_terminal_signal true"
        )


def _start(config: Config) -> tuple[str, str | None]:
    """Return the name of the option for the pipeline to start from (`init_from` or `teacher`), and its value."""
    option = "init_from" if config.distillation.teacher is None else "teacher"
    return option, config.start_from


def _check_source(source: DDPMPipeline, config: Config) -> None:
    """Raise a `ValueError` unless the pipeline to start from fits the image size and channels of the run."""
    option, name = _start(config)
    if type(source.unet) is not UNet2DModel:
        kind = type(source.unet).__name__
        raise ValueError(f"--{option} {name}: its U-Net is a diffusers {kind}; expected hf_ddpm's UNet2DModel")
    channels, *size = source.image_shape
    if tuple(size) != config.data.size:
        given = " ".join(map(str, config.data.resolution))
        raise ValueError(f"--resolution {given}: expected {' '.join(map(str, size))}, as in --{option} {name}")
    if channels != config.data.channels:
        raise ValueError(f"--channels {config.data.channels}: expected {channels}, as in --{option} {name}")


def _check_classes(source: DDPMPipeline, config: Config, class_names: tuple[str, ...]) -> None:
    """Raise a `ValueError` unless the class embeddings of the pipeline fit the classes of the run."""
    (option, name), has = _start(config), source.unet.config.num_class_embeds
    needs = config.num_class_embeds(len(class_names))
    if has != needs:
        raise ValueError(
            f"--{option} {name}: model has num_class_embeds={has}; expected {needs} for {len(class_names)} classes "
            f"with --class_dropout {config.data.class_dropout}"
        )
    if source.class_names and source.class_names != list(class_names):
        raise ValueError(
            f"--{option} {name}: its classes are {source.class_names}; expected {list(class_names)}, as in the data"
        )


def check_same_step(run: Run) -> None:
    """Raise a `ValueError` on all processes unless all have loaded the checkpoint of the same step."""
    steps = run.accelerator.gather(torch.tensor([run.step], device=run.accelerator.device)).tolist()
    if len(set(steps)) > 1:
        raise ValueError(
            f"--output_dir {run.config.training.output_dir}: the processes found checkpoints of different steps "
            f"{steps}; expected a folder that all machines share"
        )
