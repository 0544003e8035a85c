"""The contender diffusers, with its example training script."""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, partial, reduce
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from datasets import Dataset
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image, ImageOps
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from benchmarks.contender import Contender, endless, for_worker_counts
from benchmarks.measure import Workload
from benchmarks.setting import RandomImages
from hf_ddpm.images import to_signed
from hf_ddpm.models.precision import PRECISIONS

# Defaults of the script.
ADAM = {"lr": 1e-4, "betas": (0.95, 0.999), "weight_decay": 1e-6, "eps": 1e-8}
EMA = {"decay": 0.9999, "use_ema_warmup": True, "inv_gamma": 1.0, "power": 0.75}
WARMUP_STEPS, EPOCHS = 500, 100


class Stock(Contender):
    """diffusers."""

    name = "diffusers"
    statement = "from diffusers import DDPMPipeline"
    network_class = diffusers.UNet2DModel
    pipeline_class = diffusers.DDPMPipeline

    @cached_property
    def trained(self) -> Any:
        """The network of all tasks with gradients, prepared and then compiled, as by accelerate's launcher."""
        model = self.accelerator().prepare_model(self.plain_network())
        if self.compiled:
            model.compile()
        return model

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype of the images in training."""
        return PRECISIONS[self.precision(self.setting.batch, training=True)]

    def train_step(self) -> list[Workload]:
        """Steps of the script's loop on a constant batch."""
        images = RandomImages(self.setting.batch, self.setting).batch(0, slice(None)).images
        return [self._script([{"input": to_signed(images)}] * 100)]

    def training(self) -> list[Workload]:
        """The script's loop with its data loader and progress bar."""
        return [self._script(self._loader(self.setting.dataset()))]

    def data_memory(self) -> list[Workload]:
        """Batches of the script's data loader, which decodes images each time."""
        return [self._batches(self._loader(self.setting.dataset()))]

    def data_jpeg(self) -> list[Workload]:
        """The same for JPEG files."""
        dataset = Dataset.from_parquet(str(self.setting.jpegs), cache_dir=str(self.setting.folder / "cache"))
        return for_worker_counts(lambda workers: self._batches(self._loader(dataset, workers)))

    def _script(self, batches: Any) -> Workload:
        model = self.trained
        loop = script_loop(self.accelerator(), model, batches, self.setting.model / "scheduler")
        steps = self.setting.options.steps_per_turn

        def run() -> None:
            for _ in range(steps):
                next(loop)

        return self.steps(run, notes=("the loop of its script, without a tracker",))

    def _loader(self, dataset: Dataset, workers: int = 0) -> DataLoader:
        with importable_torchvision():
            from torchvision import transforms as T
        data, mode = self.setting.config.data, self.setting.mode
        flip = T.RandomHorizontalFlip() if data.horizontal_flip else T.Lambda(lambda image: image)
        size = data.size[0] if data.size[0] == data.size[1] else data.size
        augment = T.Compose([T.Resize(size), T.CenterCrop(size), flip, T.ToTensor(), T.Normalize([0.5], [0.5])])
        dataset = dataset.with_transform(
            lambda rows: {"input": [augment(image.convert(mode)) for image in rows["image"]]}
        )
        return DataLoader(dataset, batch_size=self.setting.batch, shuffle=True, num_workers=workers)

    def _batches(self, loader: DataLoader) -> Workload:
        batches, device = endless(loader), self.setting.device
        return self.work(lambda: next(batches)["input"].to(device), self.setting.batch, unit="batch")


def script_loop(accelerator: Accelerator, model: Any, batches: Any, scheduler: Path) -> Iterator[None]:
    """Run the loop of diffusers' `train_unconditional.py` with its defaults; yield after each step.

    The accelerator must have prepared the model.
    """
    weight_dtype = PRECISIONS[accelerator.mixed_precision]
    noise_scheduler = diffusers.DDPMScheduler.from_pretrained(scheduler)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAM)
    lr_scheduler = get_scheduler(
        "cosine", optimizer, num_warmup_steps=WARMUP_STEPS, num_training_steps=EPOCHS * len(batches)
    )
    network = accelerator.unwrap_model(model)
    ema_model = EMAModel(model.parameters(), **EMA, model_cls=type(network), model_config=network.config)
    optimizer, batches, lr_scheduler = accelerator.prepare(optimizer, batches, lr_scheduler)
    ema_model.to(accelerator.device)
    global_step = 0
    while True:
        model.train()
        progress_bar = tqdm(total=len(batches), disable=not accelerator.is_local_main_process)
        for batch in batches:
            clean_images = batch["input"].to(weight_dtype)
            noise = torch.randn(clean_images.shape, dtype=weight_dtype, device=clean_images.device)
            num_timesteps = noise_scheduler.config.num_train_timesteps
            timesteps = torch.randint(0, num_timesteps, (len(clean_images),), device=clean_images.device).long()
            noisy_images = noise_scheduler.add_noise(clean_images, noise, timesteps)

            with accelerator.accumulate(model):
                model_output = model(noisy_images, timesteps).sample
                loss = F.mse_loss(model_output.float(), noise.float())
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()

            if accelerator.sync_gradients:
                ema_model.step(model.parameters())
                progress_bar.update(1)
                global_step += 1
            logs = {"loss": loss.detach().item(), "lr": lr_scheduler.get_last_lr()[0], "step": global_step}
            logs["ema_decay"] = ema_model.cur_decay_value
            progress_bar.set_postfix(**logs)
            accelerator.log(logs, step=global_step)
            yield
        progress_bar.close()


@contextmanager
def importable_torchvision() -> Iterator[None]:
    """Make torchvision's transforms importable if torchvision is missing, as the same steps in numpy and PIL."""
    if find_spec("torchvision") is not None:
        yield
        return
    sys.modules["torchvision"] = SimpleNamespace(transforms=STAND_IN, utils=None)  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torchvision"]


def _resize(size: int | tuple[int, int], image: Image.Image) -> Image.Image:
    """Resize the shorter side to `size`, or the image to (height, width)."""
    if isinstance(size, int):
        size = round(image.height * size / min(image.size)), round(image.width * size / min(image.size))
    return image if image.size == size[::-1] else image.resize(size[::-1], Image.Resampling.BILINEAR)


def _center_crop(size: int | tuple[int, int], image: Image.Image) -> Image.Image:
    height, width = (size, size) if isinstance(size, int) else size
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _to_tensor(image: Image.Image) -> torch.Tensor:
    """Convert uint8 to floats in [0, 1], shape `(C, H, W)`."""
    pixels = torch.from_numpy(np.array(image, np.uint8)).view(image.height, image.width, len(image.getbands()))
    return pixels.permute(2, 0, 1).contiguous().float().div(255)


def _normalize(mean: list[float], std: list[float], image: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values, dtype=image.dtype).view(-1, 1, 1) for values in (mean, std))
    return image.clone().sub_(mean).div_(std)


STAND_IN = SimpleNamespace(
    Compose=lambda steps: lambda image: reduce(lambda value, step: step(value), steps, image),
    Lambda=lambda function: function,
    Resize=lambda size: partial(_resize, size),
    CenterCrop=lambda size: partial(_center_crop, size),
    RandomHorizontalFlip=lambda: lambda image: ImageOps.mirror(image) if random.random() < 0.5 else image,
    ToTensor=lambda: _to_tensor,
    Normalize=lambda mean, std: partial(_normalize, mean, std),
)
