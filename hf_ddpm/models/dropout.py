"""Dropout whose masks are a hash of image, layer and place: no generator, no graph break, the same on every device."""

import torch
from torch import Tensor, nn

from hf_ddpm.utils.seeds import GOLDEN, mix, scramble


class Dropout(nn.Dropout):
    """Dropout in training, at any shape.

    Attributes:
        keys: A key per image, int32, shape `(B,)`: the same keys give the same masks. Masks are torch's own if None.
    """

    keys: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Set entries to zero with probability `p`, and divide the others by 1 - p."""
        if not self.training or self.p == 0:
            return x
        if self.keys is None:
            return super().forward(x)
        return x * hashed_mask(self.keys, x, 1 - self.p) * (1 / (1 - self.p))


def hashed_mask(keys: Tensor, x: Tensor, keep: float) -> Tensor:
    """Return a mask for `(B, C, H, W)`, channels-last, that is True with probability `keep`."""
    _, channels, height, width = x.shape
    places = torch.arange(channels * height * width, dtype=torch.int32, device=x.device)
    places = places.view(height, width, channels).permute(2, 0, 1)
    bits = mix(keys.view(-1, 1, 1, 1) ^ (places * GOLDEN))
    return bits < min(round((keep - 0.5) * 2**32), 2**31 - 1)


def seed_dropout(network: nn.Module, keys: Tensor | None) -> None:
    """Give each `Dropout` of a network keys of its own, mixed from a key per image; None returns to torch's masks."""
    layers = [module for module in network.modules() if isinstance(module, Dropout)]
    if keys is None:
        own = [None] * len(layers)
    else:
        numbers = torch.arange(1, len(layers) + 1, dtype=torch.int32, device=keys.device)
        own = scramble(keys ^ (numbers[:, None] * GOLDEN)).unbind() if layers else []
    for layer, mixed in zip(layers, own, strict=True):
        layer.keys = mixed
