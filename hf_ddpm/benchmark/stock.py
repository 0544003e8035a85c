"""diffusers, and the training script of its examples."""

from collections.abc import Iterator
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from datasets import Dataset
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from hf_ddpm.benchmark.library import Library, endless, with_workers, worker_counts
from hf_ddpm.benchmark.setting import RandomImages, Setting
from hf_ddpm.benchmark.timing import Work
from hf_ddpm.benchmark.transforms import transforms
from hf_ddpm.images import to_signed
from hf_ddpm.sampling.generate import PRECISIONS

# The script's defaults.
ADAM = {"lr": 1e-4, "betas": (0.95, 0.999), "weight_decay": 1e-6, "eps": 1e-8}
EMA = {"decay": 0.9999, "use_ema_warmup": True, "inv_gamma": 1.0, "power": 0.75}
WARMUP_STEPS, EPOCHS = 500, 100


class Stock(Library):
    """What diffusers does in each task."""

    name = "diffusers"
    statement = "from diffusers import DDPMPipeline"
    network_class = diffusers.UNet2DModel
    pipeline_class = diffusers.DDPMPipeline

    def train_step(self) -> list[Work]:
        """Steps of the script's loop, on a batch that is always there."""
        images = RandomImages(self.setting.batch, self.setting).batch(0, slice(None)).images
        return [self._script([{"input": to_signed(images)}] * 100)]

    def training(self) -> list[Work]:
        """The script's loop, with its data loader and its progress bar."""
        return [self._script(self._loader(self.setting.dataset()))]

    def data_memory(self) -> list[Work]:
        """Batches of the script's data loader: images are decoded each time."""
        return [self._batches(self._loader(self.setting.dataset()))]

    def data_jpeg(self) -> list[Work]:
        """The same, of JPEG."""
        dataset = Dataset.from_parquet(str(self.setting.jpegs), cache_dir=str(self.setting.folder / "cache"))
        return [with_workers(self._batches(self._loader(dataset, workers)), workers) for workers in worker_counts()]

    def _script(self, batches: Any) -> Work:
        loop = script_loop(self.setting, self.network(trained=True), batches)
        steps = self.setting.options.steps_per_turn

        def run() -> None:
            for _ in range(steps):
                next(loop)

        return self.steps(run, notes=("the loop of its script, without a tracker",))

    def _loader(self, dataset: Dataset, workers: int = 0) -> DataLoader:
        kinds, data, mode = transforms(), self.setting.config.data, self.setting.mode
        flip = kinds.RandomHorizontalFlip() if data.horizontal_flip else kinds.Lambda(lambda image: image)
        size = data.size[0] if data.size[0] == data.size[1] else data.size
        augment = kinds.Compose(
            [kinds.Resize(size), kinds.CenterCrop(size), flip, kinds.ToTensor(), kinds.Normalize([0.5], [0.5])]
        )
        dataset = dataset.with_transform(
            lambda rows: {"input": [augment(image.convert(mode)) for image in rows["image"]]}
        )
        return DataLoader(dataset, batch_size=self.setting.batch, shuffle=True, num_workers=workers)

    def _batches(self, loader: DataLoader) -> Work:
        batches, device = endless(loader), self.setting.device
        return self.work(lambda: next(batches)["input"].to(device), self.setting.batch, unit="batch")


def script_loop(setting: Setting, model: Any, batches: Any) -> Iterator[None]:
    """Does what `examples/unconditional_image_generation/train_unconditional.py` of diffusers does, with its defaults.

    Args:
        setting: What is shared.
        model: The network.
        batches: Its data loader.

    Yields:
        After each step.
    """
    accelerator = setting.accelerator()
    weight_dtype = PRECISIONS[accelerator.mixed_precision]
    noise_scheduler = diffusers.DDPMScheduler.from_pretrained(setting.model / "scheduler")
    optimizer = torch.optim.AdamW(model.parameters(), **ADAM)
    lr_scheduler = get_scheduler(
        "cosine", optimizer, num_warmup_steps=WARMUP_STEPS, num_training_steps=EPOCHS * len(batches)
    )
    ema_model = EMAModel(model.parameters(), **EMA, model_cls=type(model), model_config=model.config)
    model, optimizer, batches, lr_scheduler = accelerator.prepare(model, optimizer, batches, lr_scheduler)
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
