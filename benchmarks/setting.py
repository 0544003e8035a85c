"""Settings that all contenders share: weights, batches, images, precision and device."""

import io
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from datasets import Dataset, Features
from PIL import Image
from torch import Tensor

from benchmarks.options import BenchmarkConfig
from hf_ddpm.config import Config
from hf_ddpm.data import open_images
from hf_ddpm.data.batches import Batch, BatchSource
from hf_ddpm.data.columns import find_image_column
from hf_ddpm.data.sources import choose, open_split
from hf_ddpm.images import MODES
from hf_ddpm.models.precision import Choice, choose_precision, on_main_process
from hf_ddpm.models.unet_2d import UNet2DModel
from hf_ddpm.pipelines.pipeline_ddpm import DDPMPipeline
from hf_ddpm.schedulers.scheduling_ddpm import DDPMScheduler

SEED = 0

# Number and quality of the JPEG images in the parquet file, and rows per row group.
JPEGS, JPEG_QUALITY, JPEG_GROUP = 2048, 90, 256


class Setting:
    """Settings that all contenders share.

    Args:
        options: Options of the benchmark.
        config: Options of the network, diffusion process, data, batch size and precision.
        folder: A temporary folder.
    """

    def __init__(self, options: BenchmarkConfig, config: Config, folder: Path):
        self.options, self.config, self.folder = options, config, folder
        self.batch = config.training.train_batch_size
        self.shape = (config.data.channels, *config.data.size)
        self.steps = config.training.num_inference_steps or config.diffusion.num_train_timesteps
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        self.allow_tf32(config.training.tf32)
        state = PartialState(cpu=options.device == "cpu" or not torch.cuda.is_available())
        self.device, self.processes, self.is_main_process = state.device, state.num_processes, state.is_main_process
        self.choices: dict[tuple[int, bool], Choice] = {}
        self.global_batch = self.batch * self.processes
        torch.manual_seed(SEED)
        # Outputs are compared, so the last layer must not be zero, as it is in the paper's initialization.
        self.weights = UNet2DModel(**config.unet()).state_dict()

    def allow_tf32(self, allowed: bool) -> None:
        """Allow or forbid TF32 in float32 products and convolutions on a GPU."""
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed

    def precision(self, batch: int, training: bool) -> str:
        """Return the precision of this package; `auto` is replaced by the package's measured choice."""
        option = self.config.training.mixed_precision
        if option != "auto":
            return str(option)
        if (batch, training) not in self.choices:
            network = UNet2DModel(**self.config.unet()).to(self.device)
            network.lay_out_kernels()
            self.choices[batch, training] = on_main_process(
                lambda: choose_precision(
                    network, self.shape, batch, training, self.config.training.compile and not training
                )
            )
        return self.choices[batch, training].precision

    def inputs(self, count: int) -> tuple[Tensor, Tensor]:
        """Return noise, shape `(count, C, H, W)`, and timesteps, int64, shape `(count,)`."""
        source = torch.Generator().manual_seed(SEED)
        x = torch.randn(count, *self.shape, generator=source)
        t = torch.randint(self.config.diffusion.num_train_timesteps, (count,), generator=source)
        return x.to(self.device), t.to(self.device)

    @cached_property
    def model(self) -> Path:
        """Folder of a saved pipeline with the shared weights."""
        unet = UNet2DModel(**self.config.unet())
        unet.load_state_dict(self.weights)
        DDPMPipeline(unet, DDPMScheduler(**self.config.scheduler())).save_pretrained(self.folder / "model")
        return self.folder / "model"

    def images(self) -> BatchSource:
        """Open the training images."""
        return open_images(
            self.config.data,
            seed=SEED,
            batch_size=self.global_batch,
            device=self.device,
            main_process_first=nullcontext(),
        )

    def dataset(self) -> Dataset:
        """Return the same images as a dataset with the column `image`, without an incomplete last global batch."""
        data = self.config.data
        dataset, _ = open_split(data)
        column = find_image_column(dataset.features, data.image_column)
        dataset = (
            dataset.select_columns([column])
            .cast_column(column, datasets.Image())
            .rename_columns({column: "image"} if column != "image" else {})
        )
        chosen = choose(len(dataset), data.max_train_samples, SEED)
        whole = len(chosen) // self.global_batch * self.global_batch
        if not whole:
            raise ValueError(f"--dataset {data.dataset}: expected at least {self.global_batch} images (a global batch)")
        return dataset.select(chosen[:whole])

    @property
    def mode(self) -> str:
        """PIL mode of the images."""
        return MODES[self.config.data.channels]

    @cached_property
    def png_folder(self) -> Path:
        """Folder of these images as PNG files."""
        folder = self.folder / "png"
        folder.mkdir()
        for index, row in enumerate(self.dataset()):
            row["image"].convert(self.mode).save(folder / f"{index:06d}.png")
        return folder

    @cached_property
    def jpegs(self) -> Path:
        """Parquet file of smooth random JPEG images."""
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


def new_accelerator(precision: str, device: torch.device) -> Accelerator:
    """Return an accelerator in any precision, independent of earlier accelerators."""
    with own_precision():
        accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=precision)
    keep_state(accelerator)
    return accelerator


@contextmanager
def own_precision() -> Iterator[None]:
    """Allow a new accelerator in another precision than earlier ones, see `keep_state`."""
    before = dict(AcceleratorState._shared_state)
    AcceleratorState._reset_state()
    try:
        yield
    finally:
        if not AcceleratorState._shared_state:  # no accelerator was created
            AcceleratorState._shared_state.update(before)


def keep_state(accelerator: Accelerator) -> None:
    """Give an accelerator its own state, which accelerate otherwise shares within a process."""
    accelerator.state.__dict__ = dict(accelerator.state.__dict__)


class RandomImages:
    """Random images: a constant batch for training, images by index for the likelihood bound."""

    class_names: tuple[str, ...] = ()
    skipped = 0

    def __init__(self, count: int, setting: Setting):
        self.shape, self.device = setting.shape, setting.device
        source = torch.Generator().manual_seed(SEED)
        self._images = torch.randint(256, (count, *self.shape), dtype=torch.uint8, generator=source).to(self.device)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._images)

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Return images by their indices."""
        return self._images[indices.to(self.device)]

    def batch(self, step: int, rows: slice) -> Batch:
        """Return rows of the batch."""
        return Batch(self._images[rows], None)

    def close(self) -> None:
        """Do nothing."""
