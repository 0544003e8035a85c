"""Where the layers of our U-Net stand in it: what tables of foreign names are made from."""

import re
from dataclasses import dataclass

import torch

from hf_ddpm.models.unet_2d import UNet2DModel

_BLOCK = re.compile(r"(down|mid|up)_blocks?(?:\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Place:
    """The place of a layer in a block.

    Args:
        stage: `down`, `mid` or `up`.
        index: Number of the resolution in that direction; 0 in the middle.
        kind: `resnets`, `attentions`, `downsamplers` or `upsamplers`.
        number: Number among those of the kind.
        layer: Name in the block, such as `conv1`.
    """

    stage: str
    index: int
    kind: str
    number: int
    layer: str


def place_of(path: str) -> Place | None:
    """Returns the place of a layer, or None if it stands outside of blocks, as `conv_in` does."""
    found = _BLOCK.fullmatch(path)
    if found is None:
        return None
    stage, index, kind, number, layer = found.groups()
    return Place(stage, int(index or 0), kind, int(number), layer)


def empty_unet(**options: object) -> UNet2DModel:
    """Returns a U-Net without values, on the meta device."""
    with torch.device("meta"):
        return UNet2DModel(**options)  # type: ignore[arg-type]
