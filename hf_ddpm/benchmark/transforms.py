"""What the others' loaders do to a PIL image, where torchvision, which they take for it, is not installed.

The same steps, with numpy and PIL; the names are torchvision's.
"""

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


class Compose:
    """One after the other."""

    def __init__(self, transforms: Sequence[Callable[[Any], Any]]):
        self.transforms = transforms

    def __call__(self, image: Any) -> Any:
        """Returns what comes out last."""
        for transform in self.transforms:
            image = transform(image)
        return image


class Lambda:
    """A function."""

    def __init__(self, function: Callable[[Any], Any]):
        self.function = function

    def __call__(self, image: Any) -> Any:
        """Returns what the function does."""
        return self.function(image)


class Resize:
    """The smaller side to a number of pixels, or both to two; nothing if they are so."""

    def __init__(self, size: int | Sequence[int]):
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        """Returns the image, resized."""
        if isinstance(self.size, int):
            scale = self.size / min(image.size)
            size = (round(image.width * scale), round(image.height * scale))
        else:
            size = (self.size[1], self.size[0])
        return image if image.size == size else image.resize(size, Image.Resampling.BILINEAR)


class CenterCrop:
    """The middle."""

    def __init__(self, size: int | Sequence[int]):
        self.height, self.width = (size, size) if isinstance(size, int) else size

    def __call__(self, image: Image.Image) -> Image.Image:
        """Returns the image, cut."""
        left, top = (image.width - self.width) // 2, (image.height - self.height) // 2
        return image.crop((left, top, left + self.width, top + self.height))


class RandomHorizontalFlip:
    """A mirror, for half of the images."""

    def __call__(self, image: Image.Image) -> Image.Image:
        """Returns the image, mirrored or not."""
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else image


class ToTensor:
    """Bytes to floats in [0, 1], shape `(C, H, W)`."""

    def __call__(self, image: Image.Image) -> Tensor:
        """Returns the tensor."""
        pixels = torch.from_numpy(np.array(image, np.uint8)).view(image.height, image.width, len(image.getbands()))
        return pixels.permute(2, 0, 1).contiguous().float().div(255)


class Normalize:
    """Floats to other floats, by mean and standard deviation."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        self.mean, self.std = mean, std

    def __call__(self, image: Tensor) -> Tensor:
        """Returns the tensor."""
        mean, std = (torch.tensor(values, dtype=image.dtype).view(-1, 1, 1) for values in (self.mean, self.std))
        return image.clone().sub_(mean).div_(std)


def transforms() -> Any:
    """Returns torchvision's transforms if they are there, else this module."""
    if find_spec("torchvision") is None:
        return sys.modules[__name__]
    from torchvision import transforms

    return transforms


@contextmanager
def in_place_of_torchvision() -> Iterator[None]:
    """Lets others import these transforms as torchvision's, if that is not installed."""
    if find_spec("torchvision") is not None:
        yield
        return
    stand_in = ModuleType("torchvision")
    stand_in.transforms = sys.modules[__name__]  # type: ignore[attr-defined]
    stand_in.utils = ModuleType("torchvision.utils")  # type: ignore[attr-defined]
    sys.modules["torchvision"] = stand_in
    try:
        yield
    finally:
        del sys.modules["torchvision"]
