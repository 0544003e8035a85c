"""The classifier of 8x8 handwritten digits whose features measure sets of them, for evaluation without a network.

Its weights, `digits.safetensors` beside this file, were trained on the training half of the embedded digits by
`python scripts/train_digits_classifier.py`. Distances depend on them: they are never to change.
"""

from importlib import resources

import torch
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn import functional as F

SIZE = 8
CLASSES = 10


class DigitsClassifier(nn.Module):
    """A small convolutional network: digits to 64 features and ten logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 32, 3, padding=1)
        self.hidden = nn.Linear(32 * (SIZE // 4) ** 2, 64)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(64, CLASSES)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns features and logits.

        Args:
            pixels: Digits, uint8, shape `(B, 1, 8, 8)`.

        Returns:
            Features, at least 0, shape `(B, 64)`, and logits, shape `(B, 10)`; float32.
        """
        x = F.relu(self.conv1(pixels.float() / 255))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.max_pool2d(F.relu(self.conv3(x)), 2)
        features = F.relu(self.hidden(x.flatten(1)))
        return features, self.head(self.dropout(features))


def load_digits_classifier() -> DigitsClassifier:
    """Returns the classifier with the weights of the package, on the CPU."""
    with torch.device("meta"):
        network = DigitsClassifier()
    weights = (resources.files("hf_ddpm.evaluation") / "digits.safetensors").read_bytes()
    network.load_state_dict(load(weights), assign=True)
    return network
