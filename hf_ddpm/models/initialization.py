"""The initialization of the paper's code, which training starts from."""

from torch import nn

# The layers that end a residual branch: starting at zero, each block starts as the identity.
ZERO = ("conv2", "to_out.0", "conv_out")


def initialize_like_paper(unet: nn.Module) -> None:
    r"""Initializes a U-Net in place, as Ho et al. do.

    Convolutions and linear layers get uniform weights of variance :math:`2 / (n_\text{in} + n_\text{out})` and zero
    biases; the last layer of each residual block, of each attention and of the network gets zero weights. The
    constructor itself starts as diffusers does, whose checkpoints need no other.

    Args:
        unet: The network, on any device.
    """
    for name, module in unet.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.zeros_(module.bias)
            if name.endswith(ZERO):
                nn.init.zeros_(module.weight)
            else:
                # Drawn in the order of the shape: the same weights, however they lie in memory.
                module.weight.data.copy_(nn.init.xavier_uniform_(module.weight.new_empty(module.weight.shape)))
