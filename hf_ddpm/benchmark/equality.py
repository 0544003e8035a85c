"""Those whose outputs differ are not compared in speed."""

from typing import Any

import torch
from torch import Tensor

from hf_ddpm.benchmark.device import full_precision
from hf_ddpm.benchmark.library import Library
from hf_ddpm.benchmark.setting import SEED

# Beside the largest entry; and of pixels in [0, 1] after a short chain. The tables of diffusers have float32 errors of
# some 1e-4 at the last steps.
TOLERANCES = {"network": 1e-4, "gradients": 1e-4, "images": 1e-3}
STEPS = 10


def check_equal(ours: Library, theirs: Library) -> dict[str, dict[str, Any]]:
    """Compares networks and their gradients on the same input, and images of the same seed in a few steps.

    Returns:
        By `network`, `gradients` and `images`, in float32: `difference`, the largest one, its `tolerance`, and whether
        they are `equal`.
    """
    checks = {}
    with full_precision():
        for name, outputs in {"network": _predictions, "gradients": _gradients, "images": _images}.items():
            right, found = outputs(ours), outputs(theirs)
            scale = 1.0 if name == "images" else right.abs().max().item()
            difference = (found - right).abs().max().item() / scale
            checks[name] = {
                "difference": difference,
                "tolerance": TOLERANCES[name],
                "equal": difference <= TOLERANCES[name],  # which no NaN is
            }
    return checks


def refusal(checks: dict[str, dict[str, Any]]) -> str | None:
    """Returns why those who were checked are not to be compared, or None."""
    for name, check in checks.items():
        if not check["equal"]:
            return f"not compared: its {name} differ by {check['difference']:.2g}, {check['tolerance']:g} is allowed"
    return None


@torch.no_grad()
def _predictions(library: Library) -> Tensor:
    return library.network().eval()(*library.setting.inputs(2)).sample.clone()  # a CUDA graph writes there again


def _gradients(library: Library) -> Tensor:
    """Returns the gradients of a loss, all in a row; a compiler may lose some without a word."""
    network = library.network(trained=True).eval()
    network(*library.setting.inputs(2)).sample.square().mean().backward()
    zero = torch.zeros(1, device=library.setting.device)
    by_name = sorted(network.named_parameters())
    return torch.cat([zero.expand(p.numel()) if p.grad is None else p.grad.flatten() for _, p in by_name])


def _images(library: Library) -> Tensor:
    setting, source = library.setting, torch.Generator(library.setting.device).manual_seed(SEED)
    steps = min(STEPS, setting.steps)
    pipe = library.pipeline()
    return torch.from_numpy(pipe(batch_size=2, generator=source, num_inference_steps=steps, output_type="np").images)
