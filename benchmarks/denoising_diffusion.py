"""denoising-diffusion-pytorch: its own network of similar size, its process and its trainer."""

from dataclasses import replace
from functools import cached_property
from importlib import import_module
from itertools import repeat
from pathlib import Path
from typing import Any

import torch

from benchmarks.contender import Contender
from benchmarks.measure import Workload
from benchmarks.setting import RandomImages
from benchmarks.stock import importable_torchvision
from hf_ddpm.images import save_picture, to_pil

MODULE = "denoising_diffusion_pytorch"

# Its trainer expects at least so many files, read or not.
LEAST_FILES = 100


class DenoisingDiffusion(Contender):
    """The tasks with denoising-diffusion-pytorch."""

    name = "denoising-diffusion-pytorch"
    statement = f"from {MODULE} import GaussianDiffusion"
    load_time = None  # type: ignore[assignment]  # it has no model format

    @cached_property
    def module(self) -> Any:
        """The library."""
        with importable_torchvision():
            return import_module(MODULE)

    def plain_network(self) -> Any:
        """Returns its network with about as many parameters as ours."""
        return self.module.Unet(**self._options)

    def train_step(self) -> list[Workload]:
        """Steps of its trainer, on a constant batch."""
        images = RandomImages(max(LEAST_FILES, self.setting.batch), self.setting)
        folder = self.setting.folder / "few_images"
        folder.mkdir(exist_ok=True)
        for index, picture in enumerate(to_pil(images.batch(0, slice(LEAST_FILES)).images)):
            save_picture(picture, folder / f"{index}.png")
        trainer = self._trainer(folder)
        trainer.dl = repeat(images.batch(0, slice(self.setting.batch)).images / 255)
        return [self._training(trainer)]

    def training(self) -> list[Workload]:
        """Its trainer with its data loader and its progress bar."""
        return [self._training(self._trainer(self.setting.png_folder), "its loader has a process for each core")]

    def chain(self, batch: int) -> Workload:
        """Returns the whole reverse process of a batch."""
        setting, diffusion = self.setting, self._diffusion(self.network()).eval()

        def run() -> None:
            with setting.autocast():
                diffusion.sample(batch_size=batch).cpu()

        notes = ("fewer steps by DDIM with eta 1, its only way",) if diffusion.is_ddim_sampling else ()
        return self.work(run, batch, self.flops[0] * setting.steps, unit="chain", at_once=True, notes=notes)

    def work(self, *args: Any, **more: Any) -> Workload:
        """Returns a workload, as in `Contender`."""
        work = super().work(*args, **more)
        return replace(work, notes=("its own network of like size", *work.notes)) if work.parameters else work

    @cached_property
    def _options(self) -> dict[str, Any]:
        config = self.setting.config
        first, *_ = channels = config.model.block_out_channels
        options = {
            "dim_mults": tuple(max(1, round(width / first)) for width in channels),
            "channels": config.data.channels,
            "full_attn": tuple(config.attends),
            "dropout": config.model.dropout,
        }
        wanted = sum(value.numel() for value in self.setting.weights.values())

        def distance(dim: int) -> int:
            with torch.device("meta"):
                network = self.module.Unet(dim, **options)
            return abs(sum(parameter.numel() for parameter in network.parameters()) - wanted)

        return {"dim": min(range(4, 4 * first + 1, 4), key=distance), **options}

    def _diffusion(self, network: Any) -> Any:
        setting = self.setting
        diffusion = self.module.GaussianDiffusion(
            network,
            image_size=setting.config.data.size,
            timesteps=setting.config.diffusion.num_train_timesteps,
            sampling_timesteps=setting.steps,
            ddim_sampling_eta=1.0,
            objective="pred_noise",
            beta_schedule="linear",
        )
        return diffusion.to(setting.device)

    def _trainer(self, folder: Path) -> Any:
        setting, precision = self.setting, self.setting.config.training.mixed_precision
        return self.module.Trainer(
            self._diffusion(self.network(trained=True)),
            folder,
            train_batch_size=setting.global_batch,
            augment_horizontal_flip=setting.config.data.horizontal_flip,
            train_num_steps=0,
            save_and_sample_every=10**9,
            results_folder=str(setting.folder / "results"),
            amp=precision != "no",
            mixed_precision_type=precision,
            calculate_fid=False,
        )

    def _training(self, trainer: Any, *notes: str) -> Workload:
        def run() -> None:
            trainer.train_num_steps += self.setting.options.steps_per_turn
            trainer.train()

        return self.steps(run, notes=notes)
