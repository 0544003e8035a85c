"""What all who are compared share: weights, batches, images, precision and device."""

import io
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset, Features
from PIL import Image
from torch import Tensor

from hf_ddpm.benchmark.options import BenchmarkConfig
from hf_ddpm.config import Config
from hf_ddpm.data import open_images
from hf_ddpm.data.batches import Batch, BatchSource
from hf_ddpm.data.columns import find_image_column
from hf_ddpm.data.sources import choose, open_split
from hf_ddpm.images import MODES
from hf_ddpm.models.unet_2d import UNet2DModel
from hf_ddpm.pipelines.pipeline_ddpm import DDPMPipeline
from hf_ddpm.schedulers.scheduling_ddpm import DDPMScheduler

SEED = 0

# Of the parquet file that is made to be read.
JPEGS, JPEG_QUALITY, JPEG_GROUP = 2048, 90, 256


class Setting:
    """What is shared.

    Args:
        options: What is timed.
        config: Network, process, data, batch and precision.
        folder: Where files may be put; it is gone afterwards.
    """

    def __init__(self, options: BenchmarkConfig, config: Config, folder: Path):
        self.options, self.config, self.folder = options, config, folder
        self.batch = config.training.train_batch_size
        self.shape = (config.data.channels, *config.data.size)
        self.steps = config.training.num_inference_steps or config.diffusion.num_train_timesteps
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.training.tf32
        self._accelerator = self.accelerator()
        self.device, self.processes = self._accelerator.device, self._accelerator.num_processes
        torch.manual_seed(SEED)
        # Not the paper's initialization, whose last layer is zero: outputs are to be compared.
        self.weights = UNet2DModel(**config.unet()).state_dict()

    def accelerator(self) -> Accelerator:
        """Returns an accelerator: each who trains has one, since it keeps what it prepares."""
        on_cpu = self.options.device == "cpu" or not torch.cuda.is_available()
        return Accelerator(cpu=on_cpu, mixed_precision=self.config.training.mixed_precision)

    @cached_property
    def not_compiled(self) -> "Setting":
        """The same for networks that are not compiled."""
        training = replace(self.config.training, compile=False)
        folder = self.folder / "not_compiled"
        folder.mkdir()
        return Setting(self.options, replace(self.config, training=training), folder)

    def autocast(self) -> AbstractContextManager[Any]:
        """Returns what passes are made in."""
        return self._accelerator.autocast()

    def inputs(self, count: int) -> tuple[Tensor, Tensor]:
        """Returns noise, shape `(count, C, H, W)`, and times, int64, shape `(count,)`."""
        source = torch.Generator().manual_seed(SEED)
        x = torch.randn(count, *self.shape, generator=source)
        t = torch.randint(self.config.diffusion.num_train_timesteps, (count,), generator=source)
        return x.to(self.device), t.to(self.device)

    def pipeline(self) -> DDPMPipeline:
        """Returns the pipeline of the weights."""
        scheduler = DDPMScheduler(**self.config.scheduler())
        unet = UNet2DModel(**self.config.unet())
        unet.load_state_dict(self.weights)
        return DDPMPipeline(unet, scheduler)

    @cached_property
    def model(self) -> Path:
        """The folder of that pipeline."""
        self.pipeline().save_pretrained(self.folder / "model")
        return self.folder / "model"

    def images(self) -> BatchSource:
        """Opens the images as training does."""
        return open_images(
            self.config.data,
            seed=SEED,
            batch_size=self.batch * self.processes,
            device=self.device,
            main_process_first=nullcontext(),
        )

    def dataset(self) -> Dataset:
        """Returns as many of the same images as make whole global batches, encoded, as the column `image`."""
        data = self.config.data
        dataset, _ = open_split(data)
        column = find_image_column(dataset.features, data.image_column)
        dataset = (
            dataset.select_columns([column])
            .cast_column(column, datasets.Image())
            .rename_columns({column: "image"} if column != "image" else {})
        )
        chosen = choose(len(dataset), data.max_train_samples, SEED)
        batch = self.batch * self.processes
        whole = len(chosen) // batch * batch
        if not whole:
            raise ValueError(f"dataset {data.dataset!r} holds no batch of {batch} images")
        return dataset.select(chosen[:whole])

    @property
    def mode(self) -> str:
        """What PIL calls images of so many channels."""
        return MODES[self.config.data.channels]

    @cached_property
    def pictures(self) -> Path:
        """A folder of those images as PNG files."""
        folder = self.folder / "pictures"
        folder.mkdir()
        for number, row in enumerate(self.dataset()):
            row["image"].convert(self.mode).save(folder / f"{number:06d}.png")
        return folder

    @cached_property
    def jpegs(self) -> Path:
        """A parquet file of smooth random images of the resolution, as JPEG."""
        height, width = self.config.data.size
        channels = 1 if self.config.data.channels == 1 else 3
        random = np.random.default_rng(SEED)
        rows = []
        for _ in range(JPEGS):
            rough = Image.fromarray(random.integers(256, size=(4, 4, channels), dtype=np.uint8).squeeze())
            file = io.BytesIO()
            rough.resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=JPEG_QUALITY)
            rows.append({"bytes": file.getvalue(), "path": None})
        dataset = Dataset.from_dict({"image": rows}, Features({"image": datasets.Image()}))
        dataset.to_parquet(self.folder / "jpegs.parquet", batch_size=JPEG_GROUP)
        return self.folder / "jpegs.parquet"


class RandomImages:
    """Random bytes as images: a batch that is always the same for training, and images by number for the bound."""

    class_names: tuple[str, ...] = ()
    skipped = 0

    def __init__(self, count: int, setting: Setting):
        self.shape, self.device = setting.shape, setting.device
        source = torch.Generator().manual_seed(SEED)
        self._images = torch.randint(256, (count, *self.shape), dtype=torch.uint8, generator=source).to(self.device)

    def __len__(self) -> int:
        """Returns their number."""
        return len(self._images)

    def __getitem__(self, numbers: Tensor) -> Tensor:
        """Returns images by their numbers."""
        return self._images[numbers.to(self.device)]

    def batch(self, step: int, rows: slice) -> Batch:
        """Returns the rows of the batch."""
        return Batch(self._images[rows], None)

    def close(self) -> None:
        """Does nothing."""
