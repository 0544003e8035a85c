"""Reproducible dropout: masks are hashes of image, layer and position, identical on every device."""

import torch
from torch import Tensor, nn

from hf_ddpm.utils.seeds import GOLDEN, mix, scramble


class Dropout(nn.Dropout):
    """Dropout with reproducible masks; needs no random generator and causes no graph break in `torch.compile`.

    Attributes:
        keys: One key per image, int32, shape `(B,)`: the same keys give the same masks. If None, torch draws the masks.
    """

    keys: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """In training mode, set entries to zero with probability `p` and divide the others by `1 - p`."""
        if not self.training or self.p == 0:
            return x
        if self.keys is None:
            return super().forward(x)
        return x * hashed_mask(self.keys, x, 1 - self.p) * (1 / (1 - self.p))


def hashed_mask(keys: Tensor, x: Tensor, keep: float) -> Tensor:
    """Return a channels-last mask for `(B, C, H, W)` whose entries are True with probability `keep`."""
    _, channels, height, width = x.shape
    positions = torch.arange(channels * height * width, dtype=torch.int32, device=x.device)
    positions = positions.view(height, width, channels).permute(2, 0, 1)
    bits = mix(keys.view(-1, 1, 1, 1) ^ (positions * GOLDEN))
    return bits < min(round((keep - 0.5) * 2**32), 2**31 - 1)


def seed_dropout(network: nn.Module, keys: Tensor | None) -> None:
    """Set separate keys for each `Dropout` of a network, derived from a key per image; None restores torch's masks."""
    layers = [module for module in network.modules() if isinstance(module, Dropout)]
    if keys is None:
        layer_keys = [None] * len(layers)
    else:
        indices = torch.arange(1, len(layers) + 1, dtype=torch.int32, device=keys.device)
        layer_keys = scramble(keys ^ (indices[:, None] * GOLDEN)).unbind() if layers else []
    for layer, own_keys in zip(layers, layer_keys, strict=True):
        layer.keys = own_keys
