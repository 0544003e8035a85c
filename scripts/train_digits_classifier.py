"""Train the digits classifier, the feature extractor of digits metrics, in a few seconds.

    python scripts/train_digits_classifier.py --output digits.safetensors

The file in the package was made with this script, on one CPU thread. The same machine reproduces the same bytes. On
another machine, the last digits of the weights and of the metrics may differ, so only the file of the package gives
comparable metrics.
"""

if __name__ == "__main__":  # before slow imports
    from hf_ddpm.utils.launch import end_quietly

    end_quietly()

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from hf_ddpm.config import DataConfig
from hf_ddpm.data.sources import open_split
from hf_ddpm.data.store import load_images
from hf_ddpm.evaluation.features import SIZE, DigitsClassifier
from hf_ddpm.utils.files import atomic_write
from hf_ddpm.utils.launch import run_script
from hf_ddpm.utils.options import option, parse_options

EPOCHS = 20
BATCH_SIZE = 64
LEARNING_RATE = 5e-3
LABEL_SMOOTHING = 0.05
SEED = 0


@dataclass
class ClassifierConfig:
    """Output."""

    output: str = option("file of the weights")


def main(argv: list[str]) -> int:
    """Run the command line; return the exit code."""
    (config,) = parse_options(argv, ClassifierConfig)
    torch.set_num_threads(1)
    network = train(*load("train"))
    weights = save(network.state_dict(), metadata={"format": "pt"})
    with atomic_write(Path(config.output)) as partial:
        partial.write_bytes(weights)
    pixels, labels = load("test")
    with torch.no_grad():
        accuracy = (network(pixels)[1].argmax(dim=1) == labels).double().mean().item()
    print(f"test accuracy {accuracy:.4f}, sha256 {hashlib.sha256(weights).hexdigest()}")
    return 0


def load(split: str) -> tuple[Tensor, Tensor]:
    """Return the images and the labels of a split of the digits."""
    data = DataConfig("digits", split=split, resolution=[SIZE], channels=1)
    images = load_images(data)
    labels = torch.tensor(open_split(data)[0]["label"][:])
    return images[torch.arange(len(images))], labels


def train(pixels: Tensor, labels: Tensor) -> DigitsClassifier:
    """Return a classifier trained on digits, in eval mode."""
    torch.manual_seed(SEED)
    network = DigitsClassifier()
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE)
    batches = -(-len(pixels) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=EPOCHS * batches)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(pixels)).split(BATCH_SIZE):
            loss = F.cross_entropy(network(pixels[chosen])[1], labels[chosen], label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


if __name__ == "__main__":
    run_script(main)
