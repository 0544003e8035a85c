"""This package, as it is used."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count

from hf_ddpm.benchmark.library import Library, with_workers, worker_counts
from hf_ddpm.benchmark.setting import SEED, RandomImages
from hf_ddpm.benchmark.timing import Work
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

# Steps of the bound of an image that are evaluated, of all that it has.
BOUND_STEPS = 10


class Ours(Library):
    """What this package does in each task."""

    name = "hf_ddpm"
    statement = "from hf_ddpm import DDPMPipeline"
    network_class = UNet2DModel
    pipeline_class = DDPMPipeline

    def train_step(self) -> list[Work]:
        """Steps of the training loop, on a batch that is always there."""
        return [self._training(RandomImages(self.setting.batch * self.setting.processes, self.setting), [])]

    def training(self) -> list[Work]:
        """The training loop, with its data and its progress."""
        metrics = self.setting.folder / "metrics.jsonl"
        metrics.unlink(missing_ok=True)
        return [self._training(self.setting.images(), [Progress(metrics)])]

    def data_memory(self) -> list[Work]:
        """Batches of images that were decoded once."""
        return [self._batches(self.setting.images(), self.setting.config.data.levels)]

    def data_jpeg(self) -> list[Work]:
        """Batches of a stream of JPEG, decoded in this process and, if it has several threads, in as many processes."""
        works, data = [], self.setting.config.data
        for workers in worker_counts():
            stream = open_stream(
                DataConfig(str(self.setting.jpegs), resolution=data.resolution, channels=data.channels),
                seed=SEED,
                batch_size=self.setting.batch,
                device=self.setting.device,
                workers=workers,
            )
            works.append(with_workers(self._batches(stream, 256), workers))
        return works

    def nll(self) -> list[Work]:
        """The bound on the likelihood, and beside it the network alone."""
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

        more = {"unit": "batch", "count": steps, "notes": ("images are evaluations of the network",)}
        alone = replace(self.forward()[0], subject=f"{self.name}, forward alone", unit="batch")
        return [self.work(run, setting.batch, self.flops[0], **more), alone]

    def _training(self, images: BatchSource, callbacks: Sequence[Callback]) -> Work:
        setting, options = self.setting, self.setting.options
        total = (options.rounds + 1) * options.steps_per_turn
        training = replace(
            setting.config.training,
            max_train_steps=total,
            checkpointing_steps=total,
            log_steps=options.steps_per_turn,
            output_dir=str(setting.folder),
        )
        config = replace(setting.config, training=training)
        run = build_run(config, setting.accelerator(), DDPMScheduler(**config.scheduler()), None, images)
        for network in (run.unet, *(ema.model for ema in run.emas)):
            network.load_state_dict(setting.weights)

        def lead(others: Callable[[], None]) -> None:
            train(run, images, [*callbacks, _Turns(options.steps_per_turn, others)])
            if run.stopped_by is not None:
                raise Interrupted(run.stopped_by)

        return self.steps(lambda: lead(lambda: None), lead=lead, close=images.close)

    def _batches(self, images: BatchSource, levels: int) -> Work:
        steps, batch = count(), self.setting.batch

        def run() -> None:
            to_signed(images.batch(next(steps), slice(0, batch)).images, levels)

        return self.work(run, batch, unit="batch", close=images.close)


class _Turns(Callback):
    """Lets others go on when a turn of so many steps is over."""

    def __init__(self, steps: int, others: Callable[[], None]):
        self.steps, self.others = steps, others

    def on_start(self, run: Run) -> None:
        self.others()

    def on_step(self, run: Run) -> None:
        if run.step % self.steps == 0:
            self.others()
