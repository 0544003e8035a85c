"""Compiling a network, and seeing that its gradients survive it: some compilers have lost them without a word."""

import torch
from accelerate import Accelerator
from torch import Tensor

from hf_ddpm.models.unet_2d import UNet2DModel
from hf_ddpm.training.randomness import draw, dropout_keys

# Largest error of a parameter's gradient beside its norm, by the precision of the passes.
TOLERANCES = {"no": 1e-2, "bf16": 0.2, "fp16": 0.1}
# Factor of the loss in fp16, whose gradients underflow without it: where accelerate's scaler starts.
SCALE = 2.0**16


def compile_network(unet: UNet2DModel, accelerator: Accelerator, batch: int, shape: tuple[int, ...]) -> None:
    """Compile a network in place: its parameters and their names stay.

    Args:
        unet: The network, in training, prepared by the accelerator: passes are in its precision.
        accelerator: Says how passes are made.
        batch: Images a pass, for which the code is made.
        shape: Theirs, `(C, H, W)`.

    Raises:
        FloatingPointError: If the gradients of the compiled network are not those of the network.
    """
    kept = [parameter.detach().clone() for parameter in unet.parameters()]
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))  # the paper's initialization has gradients of zero
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
        for (name, _), right, found in zip(unet.named_parameters(), eager, compiled, strict=True)
        # Gradients that are rounding, such as those of the keys' biases, have no relative error.
        if not (found - right).norm() <= tolerance * right.norm() + 1e-5 * largest
    ]
    if wrong:
        raise FloatingPointError(
            f"compile=True: the compiled network has wrong gradients for {len(wrong)} of {len(kept)} parameters, "
            f"{wrong[0]} the first; train without it"
        )


def _gradients(unet: UNet2DModel, accelerator: Accelerator, batch: int, shape: tuple[int, ...]) -> list[Tensor]:
    """Return the gradients of Eq. 14 on noise: any input will do."""
    draws = draw(0, 0, range(batch), shape, 1000, accelerator.device)
    classes = draws.t.clamp(max=0) if unet.config["num_class_embeds"] else None
    unet.train()
    unet.seed_dropout(dropout_keys(0, 0, range(batch), accelerator.device))
    loss = unet(draws.noise, draws.t, classes).sample.float().square().mean()
    scale = SCALE if accelerator.mixed_precision == "fp16" else 1.0
    gradients = torch.autograd.grad(loss * scale, list(unet.parameters()))
    return [gradient.float() / scale for gradient in gradients]
