"""Compile a network for training and check its gradients, which some compiler versions drop silently."""

import torch
from accelerate import Accelerator
from torch import Tensor

from hf_ddpm.models.unet_2d import UNet2DModel
from hf_ddpm.training.randomness import draw, dropout_keys

# Largest error of a parameter's gradient relative to its norm, by precision.
TOLERANCES = {"no": 1e-2, "bf16": 0.2, "fp16": 0.1}
# Loss scale in fp16, where gradients underflow without one: the initial scale of accelerate's scaler.
SCALE = 2.0**16


def compile_network(unet: UNet2DModel, accelerator: Accelerator, batch: int, shape: tuple[int, ...]) -> None:
    """Compile a network in place; its parameters keep their values and names.

    Args:
        unet: The network, in training mode, prepared by the accelerator so that it runs in the accelerator's precision.
        accelerator: The accelerator.
        batch: Batch size of a forward pass, for which the code is compiled.
        shape: Shape of an image, `(C, H, W)`.

    Raises:
        FloatingPointError: If the gradients of the compiled network differ from the original network's.
    """
    kept = [parameter.detach().clone() for parameter in unet.parameters()]
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))  # some gradients are zero at the paper's initialization
    eager = _gradients(unet, accelerator, batch, shape)
    unet.compile()
    compiled = _gradients(unet, accelerator, batch, shape)
    with torch.no_grad():
        for parameter, value in zip(unet.parameters(), kept, strict=True):
            parameter.copy_(value)

    largest = max(gradient.norm() for gradient in eager)
    tolerance = TOLERANCES[accelerator.mixed_precision]
    wrong = [
        name
        for (name, _), expected, actual in zip(unet.named_parameters(), eager, compiled, strict=True)
        # Gradients that are zero but for rounding, such as of the keys' biases, have no useful relative error.
        if not (actual - expected).norm() <= tolerance * expected.norm() + 1e-5 * largest
    ]
    if wrong:
        raise FloatingPointError(
            f"--compile true: the compiled network has wrong gradients for {len(wrong)} of {len(kept)} parameters, "
            f"such as {wrong[0]}; train with --compile false"
        )


def _gradients(unet: UNet2DModel, accelerator: Accelerator, batch: int, shape: tuple[int, ...]) -> list[Tensor]:
    """Return the gradients of a simple loss on noise inputs."""
    draws = draw(0, 0, range(batch), shape, 1000, accelerator.device)
    classes = draws.t.clamp(max=0) if unet.config["num_class_embeds"] else None
    unet.train()
    unet.seed_dropout(dropout_keys(0, 0, range(batch), accelerator.device))
    loss = unet(draws.noise, draws.t, classes).sample.float().square().mean()
    scale = SCALE if accelerator.mixed_precision == "fp16" else 1.0
    gradients = torch.autograd.grad(loss * scale, list(unet.parameters()))
    return [gradient.float() / scale for gradient in gradients]
