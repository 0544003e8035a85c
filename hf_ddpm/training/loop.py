"""The training loop: Algorithm 1 of the paper."""

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from hf_ddpm.config import Config
from hf_ddpm.data.batches import BatchSource
from hf_ddpm.diffusion.distillation import Distillation
from hf_ddpm.diffusion.gaussian import GaussianDiffusion
from hf_ddpm.diffusion.losses import Objective
from hf_ddpm.images import to_signed
from hf_ddpm.models.unet_2d import UNet2DModel
from hf_ddpm.pipelines.pipeline_ddpm import DDPMPipeline
from hf_ddpm.pipelines.runs import labels_by_number
from hf_ddpm.training.compiling import compile_network
from hf_ddpm.training.optim import EMA, learning_rate
from hf_ddpm.training.randomness import draw, dropout_keys
from hf_ddpm.utils.launch import signals

# A loss scale below this means that the run has diverged; usual scales are above 1.
SMALLEST_SCALE = 2.0**-14


@dataclass
class Run:
    """A training run: its parts and its progress.

    Attributes:
        config: The options.
        accelerator: The accelerator.
        unet: The network.
        emas: Averages of the weights; the first one is used for samples, metrics and the export.
        optimizer: The optimizer.
        scheduler: The sampler of the model: a `DDPMScheduler`, or the sampler of a student.
        diffusion: The process whose timesteps are drawn in training: the scheduler's, or the student's.
        objective: The loss.
        class_names: Names of the classes; empty for an unconditional network.
        num_images: Images per epoch.
        hub_ids: The names in the options that are Hub ids, not paths.
        teacher: Checksum of the teacher of a distillation; None otherwise.
        lengths: History of the run's length: pairs of the step from which it counts, and `max_train_steps`.
        step: Number of optimizer steps done.
        losses: Losses of the last step, per image of this process, on the device.
        t: Timesteps of these images.
        grad_norm: Norm of the last step's gradient before clipping, on the device.
        images_per_second: Speed since the last line of `metrics.jsonl`; None before the first measurement.
        stopped_by: Number of the signal that ended the run early; None otherwise.
    """

    config: Config
    accelerator: Accelerator
    unet: UNet2DModel
    emas: list[EMA]
    optimizer: torch.optim.Optimizer
    scheduler: Any
    diffusion: GaussianDiffusion
    objective: Objective | Distillation
    class_names: tuple[str, ...] = ()
    num_images: int = 0
    hub_ids: list[str] = field(default_factory=list)
    teacher: str | None = None
    lengths: list[tuple[int, int]] = field(default_factory=list)
    step: int = 0
    losses: Tensor = field(default_factory=lambda: torch.empty(0))
    t: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    grad_norm: Tensor = field(default_factory=lambda: torch.tensor(float("nan")))
    images_per_second: float | None = None
    stopped_by: int | None = None

    @property
    def global_batch_size(self) -> int:
        """Images per optimizer step, over all processes."""
        return self.config.training.global_batch_size(self.accelerator.num_processes)

    @property
    def loss(self) -> Tensor:
        """Mean loss of the last step over the images of this process, on the device."""
        return self.losses.mean()

    @property
    def logs_now(self) -> bool:
        """True if a line of `metrics.jsonl` is written after this step."""
        training = self.config.training
        is_last = self.step >= training.max_train_steps or self.stopped_by is not None
        return is_last or self.step % training.log_steps == 0

    def check_finite(self) -> None:
        """Raise a `FloatingPointError` if the run has diverged, so that its weights never replace good checkpoints."""
        sizes = list(torch._foreach_norm([parameter.detach() for parameter in self.unet.parameters()]))
        scaler = self.accelerator.scaler
        if scaler is None:
            sizes.append(self.loss)
        elif scaler.get_scale() < SMALLEST_SCALE:  # each step with infinite gradients is skipped and halves the scale
            sizes.append(torch.full_like(sizes[0], float("nan")))
        is_finite = torch.stack(sizes).isfinite().all().float().reshape(1)
        if not bool(self.accelerator.gather(is_finite).all()):
            rate = self.optimizer.param_groups[0]["lr"]
            raise FloatingPointError(
                f"the run has diverged: loss {self.loss.item():g} and gradient norm {float(self.grad_norm):g} at step "
                f"{self.step} with learning rate {rate:g}; earlier checkpoints are kept; try a lower --learning_rate"
            )

    def pipeline(self, index: int = 0) -> DDPMPipeline:
        """Return the pipeline with the average of this index in `emas`."""
        return DDPMPipeline(
            self.emas[index].model,
            self.scheduler,
            labels_by_number(self.class_names),
            self.config.distillation.student_steps,
        )


class Callback:
    """Base class of callbacks of the training loop; every process calls them at the same steps."""

    def on_start(self, run: Run) -> None:
        """Called before the first step."""

    def on_step(self, run: Run) -> None:
        """Called after each step."""

    def on_checkpoint(self, run: Run) -> None:
        """Called every `checkpointing_steps` steps, and after the last step of this session."""

    def on_pause(self, run: Run) -> None:
        """Called after each checkpoint except the last one of the session; a signal interrupts this method at once."""

    def on_end(self, run: Run) -> None:
        """Called when all steps are done; not called if a signal has ended the session."""

    def close(self) -> None:
        """Called last, also after an error or a signal."""


def train(run: Run, images: BatchSource, callbacks: Sequence[Callback] = ()) -> None:
    r"""Train a network (Algorithm 1) from the run's current step to `max_train_steps`.

    The loss is the run's objective, by default $\| \epsilon - \epsilon_\theta(x_t, t) \|^2$.

    Args:
        run: The run; its weights, averages, optimizer and step are updated in place.
        images: The training images.
        callbacks: Callbacks, called in this order.
    """
    config, data, accelerator, diffusion = run.config.training, run.config.data, run.accelerator, run.diffusion
    times = diffusion.timesteps.to(accelerator.device)  # the network's input for each index t
    network, optimizer = accelerator.prepare(run.unet, run.optimizer)
    if config.compile:  # after `prepare`, so that it is compiled once, in its final precision
        compile_network(run.unet, accelerator, config.train_batch_size, images.shape)
    network.train()
    weights = list(network.parameters())

    # This process's rows of each global batch.
    share = run.global_batch_size // accelerator.num_processes
    mine = range(accelerator.process_index * share, (accelerator.process_index + 1) * share)

    with signals.handled(deferred=True), ExitStack() as last:
        with signals.at_once():
            for callback in callbacks:
                callback.on_start(run)
                last.callback(callback.close)
        while run.step < config.max_train_steps and run.stopped_by is None:  # Algorithm 1, line 1: repeat
            step = run.step
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)

            # Line 2: x_0 ~ q(x_0)
            batch = images.batch(step, slice(mine.start, mine.stop))
            x_start = to_signed(batch.images, data.levels)
            # Line 3: t ~ Uniform({1, ..., T}), counted from 0 here. Line 4: eps ~ N(0, I)
            draws = draw(config.seed, step, mine, images.shape, len(diffusion), accelerator.device)
            classes = batch.labels
            if classes is not None:
                classes = classes.masked_fill(draws.hide < data.class_dropout, len(images.class_names))
            if data.horizontal_flip:
                x_start = torch.where(draws.flip.view(-1, 1, 1, 1), x_start.flip(-1), x_start)
            # sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, always in float32
            x_t = diffusion.q_sample(x_start, draws.t, draws.noise)

            # Line 5: take a gradient descent step on || eps - eps_theta(x_t, t) ||^2, or another objective;
            # gradients are accumulated over several passes.
            losses = []
            for start in range(0, share, config.train_batch_size):
                part = slice(start, start + config.train_batch_size)
                run.unet.seed_dropout(dropout_keys(config.seed, step, mine[part], accelerator.device))
                is_last = part.stop == share
                with nullcontext() if is_last else accelerator.no_sync(network):
                    labels = None if classes is None else classes[part]
                    output = network(x_t[part], times[draws.t[part]], labels).sample
                    inputs = x_start[part], draws.t[part], draws.noise[part], x_t[part], labels
                    loss = run.objective(diffusion, output, *inputs)
                    accelerator.backward(loss.mean() / config.gradient_accumulation_steps)
                losses.append(loss.detach())
            run.grad_norm = accelerator.clip_grad_norm_(weights, config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            for ema in run.emas:
                ema.update(step)

            run.step, run.losses, run.t = step + 1, torch.cat(losses), draws.t
            run.stopped_by = received_signal(accelerator)
            for callback in callbacks:
                callback.on_step(run)
            is_done = run.step == config.max_train_steps or run.stopped_by is not None
            if is_done or run.step % config.checkpointing_steps == 0:
                run.check_finite()
                for callback in callbacks:
                    callback.on_checkpoint(run)
                if not is_done:
                    with signals.at_once():
                        for callback in callbacks:
                            callback.on_pause(run)
        # Line 6: until converged
        if run.stopped_by is None:
            with signals.at_once():
                for callback in callbacks:
                    callback.on_end(run)


def received_signal(accelerator: Accelerator) -> int | None:
    """Return the number of a signal received by any process, the same on all; every process must call this function."""
    number = signals.number
    if accelerator.num_processes > 1:
        flag = torch.tensor(number)  # on the CPU, so that no step waits for the GPU
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, _cpu_group(torch.distributed.group.WORLD))
        number = int(flag)
    return number or None


@cache
def _cpu_group(world: Any) -> Any:
    return world if torch.distributed.get_backend(world) == "gloo" else torch.distributed.new_group(backend="gloo")
