"""The contender hf_ddpm."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from itertools import count
from typing import Any

import torch
from torch import Tensor

from benchmarks.contender import Contender, for_worker_counts
from benchmarks.measure import Workload
from benchmarks.setting import SEED, RandomImages
from hf_ddpm.config import Config, DataConfig
from hf_ddpm.data.batches import BatchSource
from hf_ddpm.data.streaming.stream import open_stream
from hf_ddpm.evaluation.nll import variational_bound
from hf_ddpm.images import to_signed
from hf_ddpm.models.unet_2d import UNet2DModel
from hf_ddpm.pipelines.loading import load_pipeline
from hf_ddpm.pipelines.pipeline_ddpm import DDPMPipeline
from hf_ddpm.sampling.generate import cast_for_sampling
from hf_ddpm.schedulers.scheduling_ddpm import DDPMScheduler
from hf_ddpm.training.build import build_run
from hf_ddpm.training.loop import Callback, Run, train
from hf_ddpm.training.progress import Progress
from hf_ddpm.utils.launch import Interrupted

# Evaluated timesteps per image of the likelihood bound.
BOUND_STEPS = 10


class Ours(Contender):
    """The tasks with this package."""

    name = "hf_ddpm"
    statement = "from hf_ddpm import DDPMPipeline"
    network_class = UNet2DModel
    pipeline_class = DDPMPipeline
    _last: Run | None = None  # run of the previous task

    def precision(self, batch: int, training: bool = False) -> str:
        """Return the precision of the network; `auto` is replaced by the package's choice."""
        return self.setting.precision(batch, training)

    def plain_pipeline(self) -> Any:
        """Return a new pipeline, loaded as the commands do."""
        return load_pipeline(str(self.setting.model), self.setting.device)

    def network_of(self, batch: int) -> Any:
        """Return the network for forward passes of this batch size."""
        return self.sampler(batch).unet

    def sampler(self, batch: int) -> Any:
        """Return the pipeline for the reverse process of this batch size; weights are cast once, as in sampling."""
        precision = self.precision(batch)
        if precision not in self._samplers:
            self._samplers[precision] = pipe = self.plain_pipeline()
            pipe.set_progress_bar_config(disable=True)
            pipe.unet = cast_for_sampling(self.network, precision)
        return self._samplers[precision]

    def passes(self, batch: int) -> AbstractContextManager[Any]:
        """Return an empty context, as the weights already have the precision of the passes."""
        return nullcontext()

    @cached_property
    def _samplers(self) -> dict[str, Any]:
        return {"no": self.pipeline}

    def timesteps(self, t: Tensor) -> Tensor:
        """Return the first timestep, as the reverse process passes it to the network."""
        return t[:1]

    def train_step(self) -> list[Workload]:
        """Steps of the training loop on a constant batch."""
        return [self._training(RandomImages(self.setting.global_batch, self.setting), [])]

    def training(self) -> list[Workload]:
        """The training loop with data loading and progress bar."""
        metrics = self.setting.folder / "metrics.jsonl"
        metrics.unlink(missing_ok=True)
        return [self._training(self.setting.images(), [Progress(metrics)])]

    def data_memory(self) -> list[Workload]:
        """Batches of images that were decoded in advance."""
        return [self._batches(self.setting.images(), self.setting.config.data.levels)]

    def data_jpeg(self) -> list[Workload]:
        """Batches of a stream of JPEG files."""
        setting, data = self.setting, self.setting.config.data
        jpegs = DataConfig(str(setting.jpegs), resolution=data.resolution, channels=data.channels)

        def batches(workers: int) -> Workload:
            stream = open_stream(jpegs, seed=SEED, batch_size=setting.batch, device=setting.device, workers=workers)
            return self._batches(stream, 256)

        return for_worker_counts(batches)

    def nll(self) -> list[Workload]:
        """The likelihood bound, and passes of the network alone for comparison."""
        setting, pipe, images = self.setting, self.pipeline, RandomImages(self.setting.batch, self.setting)
        steps, precision = min(BOUND_STEPS, len(pipe.scheduler)), self.precision(self.setting.batch)

        def run() -> None:
            variational_bound(
                pipe,
                images,  # type: ignore[arg-type]
                range(setting.batch),
                seed=SEED,
                batch_size=setting.batch,
                levels=setting.config.data.levels,
                steps_per_image=steps,
                precision=precision,
            )

        more = {"count": steps, "brief_steps": steps, "precision": precision}
        notes = ("images are evaluations of the network",)
        bound = self.work(run, setting.batch, self.flops[0], unit="batch", notes=notes, **more)
        return [bound, replace(self.forward()[0], subject=f"{self.name}, forward alone", unit="batch")]

    def _training(self, images: BatchSource, callbacks: Sequence[Callback]) -> Workload:
        setting, steps = self.setting, self.setting.options.steps_per_turn
        total = (setting.options.rounds + 1) * steps + (setting.options.profile is not None)
        training = replace(
            setting.config.training,
            mixed_precision=self.precision(setting.batch, training=True),
            compile=self.compiled,
            max_train_steps=total,
            checkpointing_steps=total,
            log_steps=steps,
            output_dir=str(setting.folder),
        )
        run = self._run(replace(setting.config, training=training), images)
        for network in (run.unet, *(ema.model for ema in run.emas)):
            network.load_state_dict(setting.weights)

        def lead(others: Callable[[], None]) -> None:
            torch.backends.cudnn.benchmark = True  # as in a run of the package
            try:
                train(run, images, [*callbacks, _Turns(steps, others)])
            finally:
                torch.backends.cudnn.benchmark = False
            if run.stopped_by is not None:
                raise Interrupted(run.stopped_by)

        return self.steps(lambda: lead(lambda: None), lead=lead, close=images.close)

    def _run(self, config: Config, images: BatchSource) -> Run:
        """Return a run at step 0; in one process it reuses the network of the previous task, which is compiled."""
        accelerator = self.accelerator()
        if self._last is None or self.setting.processes > 1:
            self._last = build_run(config, accelerator, DDPMScheduler(**config.scheduler()), None, images)
        else:
            self._last = replace(self._last, config=config, num_images=len(images), step=0)
        return self._last

    def _batches(self, images: BatchSource, levels: int) -> Workload:
        steps, rows = count(), slice(0, self.setting.batch)

        def run() -> None:
            to_signed(images.batch(next(steps), rows).images, levels)

        return self.work(run, self.setting.batch, unit="batch", close=images.close)


class _Turns(Callback):
    """Run the other contenders' turns before the first step, after each of our turns, and after the last step."""

    def __init__(self, steps: int, others: Callable[[], None]):
        self.steps, self.others = steps, others

    def on_start(self, run: Run) -> None:
        self._give()

    def on_step(self, run: Run) -> None:
        if run.step % self.steps == 0 or run.step == run.config.training.max_train_steps:
            self._give()

    def _give(self) -> None:
        torch.backends.cudnn.benchmark = False  # as in the scripts of the others
        self.others()
        torch.backends.cudnn.benchmark = True
