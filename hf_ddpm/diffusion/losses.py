"""Training objectives, an image at a time."""

from torch import Tensor


def simple_loss(prediction: Tensor, target: Tensor) -> Tensor:
    r"""The simplified objective of the paper.

    .. math:: L_\text{simple} = \mathbb{E}_{t, x_0, \epsilon} \| \epsilon - \epsilon_\theta(x_t, t) \|^2 \tag{14}

    as a mean, not a sum, over the dimensions of an image.

    Args:
        prediction: Output of the network, shape `(B, C, H, W)`.
        target: What it should have been, such as :math:`\epsilon`, same shape.

    Returns:
        The loss of each image, float32, shape `(B,)`.
    """
    return (prediction.float() - target.float()).square().flatten(1).mean(dim=1)
