"""From options to a run at step 0."""

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
from hf_ddpm.pipelines.pipeline_ddpm import DDPMPipeline, load_pipeline
from hf_ddpm.schedulers.scheduling_ddpm import DDPMScheduler
from hf_ddpm.training.distillation import open_teacher, student_scheduler
from hf_ddpm.training.loop import Run
from hf_ddpm.training.optim import EMA, adam
from hf_ddpm.utils.launch import use_own_cores
from hf_ddpm.utils.options import require
from hf_ddpm.utils.public import hub_ids
from hf_ddpm.utils.seeds import INITIALIZATION, derived_seed

# Ways of accelerate to train in which each process has the whole network: averages and checkpoints are of that.
REPLICATED = {kind for kind in DistributedType if kind.value == "NO" or kind.value.startswith("MULTI_")}


def join_processes(config: Config) -> PartialState:
    """Return the state of this process among others.

    Raises:
        ValueError: If the processes do not see each other, or are not as many as the options require.
    """
    state, asked = PartialState(cpu=not torch.cuda.is_available()), int(os.environ.get("WORLD_SIZE", 1))
    if state.num_processes != asked:
        raise ValueError(f"{asked} processes were launched, but they do not see each other")
    if config.training.world_size not in (None, asked):
        raise ValueError(f"world_size={config.training.world_size}, but there are {asked} processes")
    return state


def choose_kernels(training: TrainingConfig) -> None:
    """Set the process's threads, rounding and choice of kernels to the options."""
    if training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the first product on a GPU
    torch.use_deterministic_algorithms(training.deterministic)
    torch.backends.cudnn.benchmark = not training.deterministic  # shapes are the same in every step
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = training.tf32
    use_own_cores()


def settle_precision(config: Config, state: PartialState) -> Config:
    """Return the options with the precision that `auto` stands for, and print it. Every process must call it.

    The main process measures a network like that of the run; all take its choice.

    Raises:
        ValueError: If `init_from` or the diffusion process is not usable.
    """
    training = config.training
    if training.mixed_precision != "auto":
        return config
    choose_kernels(training)
    options = network_options(config, build_process(config)[1])

    def choose() -> Choice:
        with torch.random.fork_rng(devices=[]):
            unet = UNet2DModel(**options | {"dropout": config.model.dropout}).to(state.device)
        unet.lay_out_kernels()
        if training.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        shape = (config.data.channels, *config.data.size)
        return choose_precision(unet, shape, training.train_batch_size, training=True)

    choice = on_main_process(choose)
    state.print(choice.line)
    return replace(config, training=replace(training, mixed_precision=choice.precision))


def start_accelerator(config: Config) -> Accelerator:
    """Return the accelerator; its precision must be settled. Set the process's kernels, see `choose_kernels`.

    Raises:
        ValueError: If the launcher accumulates gradients, which is an option of the run, or shards weights.
    """
    tracker = config.training.tracker
    choose_kernels(config.training)
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != config.training.mixed_precision:
        AcceleratorState._reset_state()  # accelerate keeps the precision of an earlier run in this process
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision=config.training.mixed_precision,
        dynamo_backend="no",  # `compile_network` does it
        log_with=None if tracker == "none" else tracker,
        project_dir=config.training.output_dir,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    if accelerator.distributed_type not in REPLICATED:
        kind = accelerator.distributed_type.value
        raise ValueError(
            f"distributed_type {kind} of the launcher: each process needs whole weights; expected MULTI_GPU"
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError("give gradient_accumulation_steps to the script, not to the launcher")
    return accelerator


def build_process(config: Config, checkpoint: Path | None = None) -> tuple[Any, DDPMPipeline | None]:
    """Returns the diffusion process and, with `init_from`, the pipeline that it is of.

    Args:
        config: The options.
        checkpoint: Where the run goes on from: it knows what `init_from` was.

    Raises:
        ValueError: If the pipeline cannot be loaded or is none of such images, or an option does not fit.
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
        require(part, name, fits, f"at most the {len(scheduler)} of the process")
    if config.distillation.student_steps is not None:
        return student_scheduler(scheduler, config), source
    _objective(config, scheduler)
    return scheduler, source


def network_options(config: Config, source: DDPMPipeline | None) -> dict[str, Any]:
    """Return the options of the run's network, but for its classes, whose embedding is small."""
    return config.unet() if source is None else {**_unet_of(source, config), "num_class_embeds": None}


def _unet_of(source: DDPMPipeline, config: Config) -> dict[str, Any]:
    """Return the options of a network that starts from another one; a student learns no variance."""
    options = {**source.unet.config, "dropout": config.model.dropout}
    return options if config.distillation.teacher is None else options | {"out_channels": options["in_channels"]}


def build_run(
    config: Config,
    accelerator: Accelerator,
    scheduler: Any,
    source: DDPMPipeline | None,
    images: BatchSource,
) -> Run:
    """Returns a run at step 0; its initial weights depend on the seed alone, or are those of `source`."""
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
        for name in ("conv_out.weight", "conv_out.bias"):  # of a student, without those of a learned variance
            weights[name] = weights[name][: unet.config.out_channels]
        unet.load_state_dict(weights)
    unet.to(accelerator.device)
    unet.lay_out_kernels()  # before averages, the optimizer and DDP copy the layout
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
    """Raises a `ValueError` unless the process ends in noise, which sampling starts from, or the options allow it."""
    options, signal = config.diffusion, scheduler.diffusion.alphas_cumprod[-1].item()
    if signal > NOISE_SIGNAL and not options.allow_terminal_signal:
        prior_bits = -0.5 * math.log2(1 - signal)
        betas = f"beta_start={options.beta_start:g}, beta_end={options.beta_end:g}"
        raise ValueError(
            f"{betas} with num_train_timesteps={options.num_train_timesteps}: x_T keeps {signal:.1%} of the variance "
            f"of images (L_T up to {prior_bits:.2g} bits/dim), but sampling starts from noise; leave the betas out "
            "(they are scaled to the number of steps), or set allow_terminal_signal=true"
        )


def _start(config: Config) -> tuple[str, str | None]:
    """Return the option that names the pipeline to start from, and its value."""
    option = "init_from" if config.distillation.teacher is None else "teacher"
    return option, config.start_from


def _check_source(source: DDPMPipeline, config: Config) -> None:
    """Raises a `ValueError` unless the pipeline to go on from makes images like those of the run."""
    option, name = _start(config)
    if type(source.unet) is not UNet2DModel:
        raise ValueError(f"{option}={name!r} is not allowed: its U-Net is a {type(source.unet).__name__} of diffusers")
    channels, *size = source.image_shape
    if tuple(size) != config.data.size:
        raise ValueError(f"resolution={config.data.resolution} is not allowed: {option}={name!r} is for {size}")
    if channels != config.data.channels:
        raise ValueError(f"channels={config.data.channels} is not allowed: {option}={name!r} has {channels}")


def _check_classes(source: DDPMPipeline, config: Config, class_names: tuple[str, ...]) -> None:
    """Raises a `ValueError` unless the embeddings of the pipeline are those of the classes of the run."""
    (option, name), has = _start(config), source.unet.config.num_class_embeds
    needs = config.num_class_embeds(len(class_names))
    if has != needs:
        raise ValueError(
            f"{option}={name!r} has num_class_embeds={has}, but {len(class_names)} classes with "
            f"class_dropout={config.data.class_dropout} need {needs}"
        )
    if source.class_names and source.class_names != list(class_names):
        raise ValueError(f"{option}={name!r} knows the classes {source.class_names}, the data {list(class_names)}")


def check_same_step(run: Run) -> None:
    """Raises a `ValueError` on all processes unless all stand at the same step, with the same checkpoint read."""
    steps = run.accelerator.gather(torch.tensor([run.step], device=run.accelerator.device)).tolist()
    if len(set(steps)) > 1:
        raise ValueError(f"the processes found checkpoints of different steps {steps}: output_dir must be shared")
