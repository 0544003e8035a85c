"""What a network asks of a device."""

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def count_flops(network: nn.Module, x: Tensor, *inputs: Tensor | int | None) -> tuple[float, float]:
    """Counts the operations of the matrix products and convolutions of a network.

    Args:
        network: The network; afterwards it has no gradients.
        x: Images, shape `(B, C, H, W)`.
        inputs: What else it takes: their times, and their classes.

    Returns:
        Those of an image forward, and forward and backward.
    """
    # Attention in one piece is not counted on every device, in its parts it is.
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            network(x, *inputs)
        with FlopCounterMode(display=False) as both:
            output = network(x, *inputs)
            getattr(output, "sample", output).sum().backward()
    network.zero_grad()
    return forward.get_total_flops() / len(x), both.get_total_flops() / len(x)
