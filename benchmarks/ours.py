"""This package, as it is used."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count

from benchmarks.contender import Contender, for_worker_counts
from benchmarks.measure import Workload
from benchmarks.setting import SEED, RandomImages
from hf_ddpm.config import DataConfig
from hf_ddpm.data.batches import BatchSource
from hf_ddpm.data.streaming.stream import open_stream
from hf_ddpm.evaluation.nll import variational_bound
from hf_ddpm.images import to_signed
from hf_ddpm.models.unet_2d import UNet2DModel
from hf_ddpm.pipelines.pipeline_ddpm import DDPMPipeline
from hf_ddpm.schedulers.scheduling_ddpm import DDPMScheduler
from hf_ddpm.training.build import build_run
from hf_ddpm.training.loop import Callback, Run, train
from hf_ddpm.training.progress import Progress
from hf_ddpm.utils.launch import Interrupted

# Timesteps of an image's likelihood bound that are evaluated.
BOUND_STEPS = 10


class Ours(Contender):
    """The tasks with this package."""

    name = "hf_ddpm"
    statement = "from hf_ddpm import DDPMPipeline"
    network_class = UNet2DModel
    pipeline_class = DDPMPipeline

    def train_step(self) -> list[Workload]:
        """Steps of the training loop on a constant batch."""
        return [self._training(RandomImages(self.setting.global_batch, self.setting), [])]

    def training(self) -> list[Workload]:
        """The training loop with its data and its progress bar."""
        metrics = self.setting.folder / "metrics.jsonl"
        metrics.unlink(missing_ok=True)
        return [self._training(self.setting.images(), [Progress(metrics)])]

    def data_memory(self) -> list[Workload]:
        """Batches of images that were decoded once."""
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
        """The likelihood bound, and beside it the network alone."""
        setting, pipe, images = self.setting, self.pipeline(), RandomImages(self.setting.batch, self.setting)
        steps = min(BOUND_STEPS, len(pipe.scheduler))

        def run() -> None:
            with setting.autocast():
                variational_bound(
                    pipe,
                    images,  # type: ignore[arg-type]
                    range(setting.batch),
                    seed=SEED,
                    batch_size=setting.batch,
                    levels=setting.config.data.levels,
                    steps_per_image=steps,
                )

        notes = ("images are evaluations of the network",)
        bound = self.work(run, setting.batch, self.flops[0], unit="batch", count=steps, notes=notes)
        return [bound, replace(self.forward()[0], subject=f"{self.name}, forward alone", unit="batch")]

    def _training(self, images: BatchSource, callbacks: Sequence[Callback]) -> Workload:
        setting, steps = self.setting, self.setting.options.steps_per_turn
        total = (setting.options.rounds + 1) * steps
        training = replace(
            setting.config.training,
            max_train_steps=total,
            checkpointing_steps=total,
            log_steps=steps,
            output_dir=str(setting.folder),
        )
        config = replace(setting.config, training=training)
        run = build_run(config, setting.accelerator(), DDPMScheduler(**config.scheduler()), None, images)
        for network in (run.unet, *(ema.model for ema in run.emas)):
            network.load_state_dict(setting.weights)

        def lead(others: Callable[[], None]) -> None:
            train(run, images, [*callbacks, _Turns(steps, others)])
            if run.stopped_by is not None:
                raise Interrupted(run.stopped_by)

        return self.steps(lambda: lead(lambda: None), lead=lead, close=images.close)

    def _batches(self, images: BatchSource, levels: int) -> Workload:
        steps, rows = count(), slice(0, self.setting.batch)

        def run() -> None:
            to_signed(images.batch(next(steps), rows).images, levels)

        return self.work(run, self.setting.batch, unit="batch", close=images.close)


class _Turns(Callback):
    """Gives the others their turns before the first step and after each turn of our own."""

    def __init__(self, steps: int, others: Callable[[], None]):
        self.steps, self.others = steps, others

    def on_start(self, run: Run) -> None:
        self.others()

    def on_step(self, run: Run) -> None:
        if run.step % self.steps == 0:
            self.others()
