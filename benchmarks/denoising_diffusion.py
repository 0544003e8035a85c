"""The contender denoising-diffusion-pytorch, with its own network of similar size, process and trainer."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from importlib import import_module
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.contender import Contender
from benchmarks.measure import Workload
from benchmarks.setting import RandomImages, keep_state, own_precision
from benchmarks.stock import importable_torchvision
from hf_ddpm.images import save_picture, to_pil
from hf_ddpm.sampling.generate import compile_for_sampling

MODULE = "denoising_diffusion_pytorch"

# Its trainer requires at least this many files, even if they are not read.
LEAST_FILES = 100


class DenoisingDiffusion(Contender):
    """denoising-diffusion-pytorch."""

    name = "denoising-diffusion-pytorch"
    statement = f"from {MODULE} import GaussianDiffusion"
    load_time = None  # type: ignore[assignment]  # it has no model format

    @cached_property
    def module(self) -> Any:
        """The library."""
        with importable_torchvision():
            return import_module(MODULE)

    def plain_network(self) -> Any:
        """Return its network, with about as many parameters as ours."""
        return self.module.Unet(**self._options).to(self.setting.device)

    @cached_property
    def network(self) -> Any:  # type: ignore[override]
        """The network of all tasks without gradients; it has no pipeline."""
        network = self.plain_network()
        if self.compiled:
            compile_for_sampling(network)
        return network

    @cached_property
    def trained(self) -> Any:
        """The network of all tasks with gradients."""
        network = self.plain_network()
        if self.compiled:
            network.compile()
        return network

    @contextmanager
    def passes(self, batch: int) -> Iterator[None]:
        """The context for forward passes without gradients, in inference mode as in its reverse process."""
        with torch.inference_mode(), super().passes(batch):
            yield

    def timesteps(self, t: Tensor) -> Tensor:
        """Return the first timestep for all images, as its reverse process passes it to the network."""
        return t[:1].expand(len(t)).contiguous()

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
        """Its trainer with its data loader and progress bar."""
        return [self._training(self._trainer(self.setting.png_folder), "its data loader uses one process per core")]

    def chain(self, batch: int) -> Workload:
        """Return the whole reverse process of a batch."""
        diffusion = self._diffusion(self.network).eval()

        def run(steps: int) -> None:
            diffusion.sampling_timesteps = steps
            diffusion.is_ddim_sampling = steps < diffusion.num_timesteps
            with self.passes(batch):
                diffusion.sample(batch_size=batch).cpu()

        notes = ("fewer steps by DDIM with eta 1, its only option",) if diffusion.is_ddim_sampling else ()
        return self.chain_work(run, batch, notes=notes)

    def work(self, *args: Any, **more: Any) -> Workload:
        """Return a workload, as in `Contender`."""
        work = super().work(*args, **more)
        return replace(work, notes=("its own network of similar size", *work.notes)) if work.parameters else work

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
        ours = sum(value.numel() for value in self.setting.weights.values())

        def distance(dim: int) -> int:
            with torch.device("meta"):
                network = self.module.Unet(dim, **options)
            return abs(sum(parameter.numel() for parameter in network.parameters()) - ours)

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
        setting = self.setting
        precision = self.precision(setting.batch, training=True)
        with own_precision():
            trainer = self.module.Trainer(
                self._diffusion(self.trained),
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
        keep_state(trainer.accelerator)
        return trainer

    def _training(self, trainer: Any, *notes: str) -> Workload:
        def run() -> None:
            trainer.train_num_steps += self.setting.options.steps_per_turn
            trainer.train()

        return self.steps(run, notes=notes)
