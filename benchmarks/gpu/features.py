"""Train a small CIFAR-10 classifier whose features give a Frechet distance without Inception weights.

    python benchmarks/gpu/features.py DATASET FOLDER [gpu|cpu|test]

Takes half a minute on an H100 (gpu, the default) or 20 minutes on one CPU core (cpu, a smaller network). `test` trains
a tiny network on 256 images.
"""

import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import ResNetConfig, ResNetForImageClassification

from hf_ddpm.config import DataConfig
from hf_ddpm.data.store import ImageStore, load_images


class Size(NamedTuple):
    """Width and depth per stage of the network, and the length of its training."""

    widths: list[int]
    depths: list[int]
    epochs: int
    batch_size: int
    max_samples: int | None = None


SIZES = {
    "gpu": Size([64, 128, 256, 512], [2, 2, 2, 2], 20, 512),
    "cpu": Size([32, 64, 128, 256], [1, 2, 2, 1], 10, 256),
    "test": Size([16, 32, 64], [2, 2, 2], 2, 64, 256),
}
# Images are upscaled, as the network starts by halving their size twice.
SIDE, MEAN, STD = 48, 0.5, 0.25


def shown(pixels: Tensor) -> Tensor:
    """Return uint8 images as input of the network."""
    return F.interpolate((pixels.float() / 255 - MEAN) / STD, size=SIDE, mode="bilinear", antialias=True)


def learn(network: torch.nn.Module, train: ImageStore, epochs: int, batch: int) -> None:
    """Train on randomly flipped and shifted images, in bfloat16."""
    device, per_epoch = train.device, len(train) // batch
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.4, total_steps=epochs * per_epoch, pct_start=0.2)
    for step in range(epochs * per_epoch):
        if step % per_epoch == 0:
            order = torch.randperm(len(train), device=device)
        chosen = order[step % per_epoch * batch :][:batch]
        x, y = shown(train[chosen]), train.labels[chosen]
        x = torch.where(torch.rand(len(x), 1, 1, 1, device=device) < 0.5, x.flip(-1), x)
        x = torch.roll(x, torch.randint(-4, 5, (2,)).tolist(), (-2, -1))
        with torch.autocast(device.type, torch.bfloat16):
            loss = F.cross_entropy(network(pixel_values=x).logits.float(), y, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy(network: torch.nn.Module, test: ImageStore) -> float:
    """Return the share of correctly classified images."""
    parts = torch.arange(len(test), device=test.device).split(500)
    correct = [network(pixel_values=shown(test[part])).logits.argmax(1) == test.labels[part] for part in parts]
    return torch.cat(correct).float().mean().item()


def main(dataset: str, folder: str, size: str = "gpu") -> None:
    """Train and save the network and its preprocessor."""
    device, (widths, depths, epochs, batch_size, max_samples) = (
        "cuda" if torch.cuda.is_available() else "cpu",
        SIZES[size],
    )
    options = {"resolution": [32], "class_column": "auto", "max_train_samples": max_samples}
    train, test = (
        load_images(DataConfig(dataset, split=split, **options), device=device) for split in ("train", "test")
    )
    torch.manual_seed(0)
    shape = {"embedding_size": widths[0], "hidden_sizes": widths, "depths": depths, "layer_type": "basic"}
    network = ResNetForImageClassification(ResNetConfig(num_channels=3, num_labels=10, **shape))
    network.to(device, memory_format=torch.channels_last).train()
    start = time.time()
    learn(network, train, epochs, batch_size)
    print(f"accuracy {accuracy(network.eval(), test):.4f} in {time.time() - start:.1f} s")
    network.cpu().to(memory_format=torch.contiguous_format).save_pretrained(folder)
    steps = {"do_resize": True, "size": {"height": SIDE, "width": SIDE}, "do_rescale": True, "rescale_factor": 1 / 255}
    steps |= {"do_normalize": True, "image_mean": [MEAN] * 3, "image_std": [STD] * 3}
    preprocessor = {"image_processor_type": "ViTImageProcessor", **steps}
    Path(folder, "preprocessor_config.json").write_text(json.dumps(preprocessor))


if __name__ == "__main__":
    main(*sys.argv[1:])
