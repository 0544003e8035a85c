"""Feature extractors: networks that map images to the features compared by the metrics.

Results of different extractors, or of different weights, are not comparable. Each result includes the `name` and the
`checksum` of the extractor.
"""

from abc import ABC, abstractmethod
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn import functional as F

from hf_ddpm.provenance import weights_checksum

SIZE, CLASSES = 8, 10  # image size and number of classes of the digits


class Extracted(NamedTuple):
    """Features of a batch of images.

    Attributes:
        features: Float32, shape `(B, D)`.
        probabilities: Class probabilities, float32, shape `(B, C)`; None if the extractor is not a classifier.
    """

    features: Tensor
    probabilities: Tensor | None = None


class Extractor(ABC):
    """A feature network in eval mode, for uint8 images of shape `(B, C, H, W)`.

    Attributes:
        name: Name for `load_extractor`.
        checksum: SHA-256 of the names and values of all weights, in hex.
        recipe: Settings of the image preprocessing, if they vary between networks of a class.
        classifies: If true, the extractor returns class probabilities, which the Inception score needs.
        channels: Supported numbers of channels. Grayscale images are repeated to three channels if needed.
        size: Required height and width; None for any size.
    """

    recipe = ""
    classifies = False
    channels: tuple[int, ...] = (1, 3)
    size: int | None = None

    def __init__(self, name: str, network: nn.Module, device: torch.device | str):
        self.name = name
        self.checksum = weights_checksum(network)
        self.network = network.eval().requires_grad_(False).to(device)
        self.device = torch.device(device)

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise a `ValueError` unless images of shape `(C, H, W)` are supported."""
        channels, height, width = shape
        if channels not in self.channels:
            allowed = " or ".join(map(str, self.channels))
            hint = "" if channels in (1, 3) else ", or metric nll, which takes any number"
            raise ValueError(f"extractor {self.name!r}: images with {channels} channels; expected {allowed}{hint}")
        if self.size is not None and (height, width) != (self.size, self.size):
            size = f"{self.size}x{self.size}"
            raise ValueError(f"extractor {self.name!r}: images of {height}x{width} pixels; expected {size}")

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Extracted:
        """Extract features of images, uint8, shape `(B, C, H, W)`; raise a `ValueError` for another type or shape."""
        if pixels.dtype != torch.uint8 or pixels.ndim != 4:
            kind = f"{str(pixels.dtype).removeprefix('torch.')} of shape {tuple(pixels.shape)}"
            raise ValueError(f"images: {kind}; expected uint8 of shape (images, channels, height, width)")
        self.check(tuple(pixels.shape[1:]))
        if pixels.shape[1] < max(self.channels):
            pixels = pixels.expand(-1, max(self.channels), -1, -1)
        return self._extract(pixels)

    @abstractmethod
    def _extract(self, pixels: Tensor) -> Extracted:
        """Extract features of images of a supported shape, with the maximum number of channels."""


class DigitsClassifier(nn.Module):
    """A small convolutional network that maps 8x8 digits to 64 features and ten logits.

    Its weights, `digits.safetensors` in this folder, were trained on the training half of the embedded digits by
    `python scripts/train_digits_classifier.py`. They must never change, since all distances depend on them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 32, 3, padding=1)
        self.hidden = nn.Linear(32 * (SIZE // 4) ** 2, 64)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(64, CLASSES)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return features, at least 0, shape `(B, 64)`, and logits, shape `(B, 10)`, of digits, `(B, 1, 8, 8)`."""
        x = F.relu(self.conv1(pixels.float() / 255))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.max_pool2d(F.relu(self.conv3(x)), 2)
        features = F.relu(self.hidden(x.flatten(1)))
        return features, self.head(self.dropout(features))


class DigitsExtractor(Extractor):
    """The classifier of this package for 8x8 grayscale digits: 64 features, ten classes."""

    classifies = True
    channels = (1,)
    size = SIZE

    def __init__(self, device: torch.device | str = "cpu"):
        with torch.device("meta"):
            network = DigitsClassifier()
        weights = (resources.files("hf_ddpm.evaluation") / "digits.safetensors").read_bytes()
        network.load_state_dict(load(weights), assign=True)
        super().__init__("digits", network, device)

    def _extract(self, pixels: Tensor) -> Extracted:
        features, logits = self.network(pixels.to(self.device))
        return Extracted(features, logits.softmax(dim=1))


class TransformersExtractor(Extractor):
    """An image model of transformers, such as DINOv2.

    The features are the pooled output, or the first token if the model has no pooler. Images are preprocessed by the
    model's own processor, but without cropping: whole images are resized to its final size. For DINOv2, this is
    224x224, bicubic, with ImageNet's mean and standard deviation, as for FD-DINOv2 in Stein et al. 2023
    (arXiv 2306.04675). Resizing is done by PIL, with antialiasing, on the CPU.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu"):
        from transformers import AutoImageProcessor, AutoModel

        try:
            # The default backend needs torchvision, and resizes slightly differently.
            self._processor: Any = AutoImageProcessor.from_pretrained(name, backend="pil", trust_remote_code=False)
            network, report = AutoModel.from_pretrained(name, output_loading_info=True, trust_remote_code=False)
        except (OSError, ValueError, ImportError) as error:
            reason = str(error).strip().split("\n")[0].split(". ")[0]
            message = f"cannot be loaded ({reason}); expected {', '.join(NAMES)}, or an image model"
            raise ValueError(f"extractor {name!r}: {message}") from error
        if network.main_input_name != "pixel_values":
            raise ValueError(f"extractor {name!r}: input is {network.main_input_name}; expected an image model")
        # Classifiers often have no pooler; transformers then adds one with random weights.
        missing = sorted(report["missing_keys"])
        self._is_pooled = not missing
        if any("pooler" not in key for key in missing):
            raise ValueError(f"extractor {name!r}: weights {missing[0]} are missing; expected a complete model")
        crops = getattr(self._processor, "do_center_crop", False)
        size = self._processor.crop_size if crops else self._processor.size
        if not (size.get("height") and size.get("width")):
            raise ValueError(f"extractor {name!r}: the processor has no fixed image size; expected height and width")
        self._size = {"height": size["height"], "width": size["width"]}
        self.recipe = self._processor.to_json_string()
        super().__init__(name, network.float(), device)

    def transform(self, pixels: Tensor) -> Tensor:
        """Convert images, uint8, shape `(B, 3, H, W)`, to network input, float32, shape `(B, 3, height, width)`."""
        inputs = self._processor(
            list(pixels.cpu().numpy()),
            size=self._size,
            do_resize=True,
            do_center_crop=False,
            input_data_format="channels_first",
            return_tensors="pt",
        )
        pixel_values: Tensor = inputs["pixel_values"]
        return pixel_values

    def _extract(self, pixels: Tensor) -> Extracted:
        output = self.network(pixel_values=self.transform(pixels).to(self.device))
        pooled = getattr(output, "pooler_output", None)
        if pooled is None or not self._is_pooled:
            pooled = output.last_hidden_state[:, 0]
        return Extracted(pooled.flatten(1).float())


class InceptionExtractor(Extractor):
    """The Inception network used in publications, as ported by torch-fidelity: 2048 features, 1008 classes."""

    classifies = True

    def __init__(self, device: torch.device | str = "cpu", weights: str | None = None):
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise ValueError(
                "extractor 'inception' needs torch-fidelity: pip install -c constraints.txt -e \".[inception]\" in a "
                "clone of hf_ddpm, or use an image model of transformers as extractor, such as facebook/dinov2-small"
            ) from error
        if weights is not None and not Path(weights).is_file():
            raise ValueError(f"weights={weights!r}: file does not exist; expected a weights file of inception")
        # The original code computes the Inception score from logits without bias.
        outputs = ["2048", "logits_unbiased"]
        network = FeatureExtractorInceptionV3("inception-v3-compat", outputs, feature_extractor_weights_path=weights)
        super().__init__("inception", network, device)

    def _extract(self, pixels: Tensor) -> Extracted:
        features, logits = self.network(pixels.to(self.device))
        return Extracted(features, logits.softmax(dim=1))


NAMES = ("digits", "inception")


def load_extractor(name: str, device: torch.device | str = "cpu", *, weights: str | None = None) -> Extractor:
    """Load an extractor.

    Args:
        name: `digits`, `inception`, or a folder or Hub id of an image model of transformers.
        device: Device of the network.
        weights: Weights file of `inception`; downloaded by torch-fidelity if None.

    Returns:
        The extractor.

    Raises:
        ValueError: If the extractor is unknown or cannot be loaded; one line.
    """
    if weights is not None and name != "inception":
        raise ValueError(f"weights={weights!r}: does not apply to extractor {name!r}; expected extractor 'inception'")
    if name == "digits":
        return DigitsExtractor(device)
    if name == "inception":
        return InceptionExtractor(device, weights)
    return TransformersExtractor(name, device)
