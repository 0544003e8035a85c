import copy

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from hf_ddpm import UNet2DModel
from hf_ddpm.cli.presets import preset_config
from tests.conftest import TINY_UNET

pytestmark = pytest.mark.gpu


def passed(network, x, t, precision=None):
    """Return the output and gradients of a pass, as float64 on the CPU; with a float64 network, the reference."""
    network.seed_dropout(torch.arange(len(x), dtype=torch.int32, device=x.device))
    with torch.autocast(x.device.type, precision or torch.bfloat16, enabled=precision is not None):
        output = network(x, t).sample
    loss = (output.double() * torch.linspace(-1, 1, output.numel(), device=x.device).view(output.shape)).mean()
    gradients = torch.autograd.grad(loss, list(network.parameters()))
    return [value.detach().cpu().double() for value in (output, *gradients)]


@pytest.mark.parametrize(("precision", "tolerance"), [(None, 1e-5), (torch.bfloat16, 5e-2)])
def test_output_and_gradients_match_float64(device, without_tf32, precision, tolerance):
    torch.manual_seed(0)
    network = UNet2DModel(**TINY_UNET).train()
    x, t = torch.randn(8, 1, 8, 8), torch.arange(0, 800, 100)
    exact = passed(copy.deepcopy(network).double(), x.double(), t)
    actual = passed(network.to(device), x.to(device), t.to(device), precision)
    gradients = [torch.cat([value.flatten() for value in values[1:]]) for values in (exact, actual)]
    for right, mine in ((exact[0], actual[0]), gradients):
        assert (mine - right).norm() <= tolerance * right.norm()


def test_dropout_masks_match_cpu(device):
    from hf_ddpm.models.dropout import hashed_mask

    keys, x = torch.arange(16, dtype=torch.int32), torch.empty(16, 8, 8, 8)
    assert torch.equal(hashed_mask(keys.to(device), x.to(device), 0.9).cpu(), hashed_mask(keys, x, 0.9))


def test_normalizations_and_convolutions_run_in_half_precision(device):
    network, dtypes = UNet2DModel(**TINY_UNET).train().to(device), set()
    for module in network.modules():
        if isinstance(module, torch.nn.GroupNorm | torch.nn.Conv2d):
            module.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    with torch.autocast(device.type, torch.bfloat16):
        network(torch.randn(2, 1, 8, 8, device=device), torch.tensor([1, 2], device=device))
    assert dtypes == {torch.bfloat16}


def test_convolutions_convert_no_layouts(cuda):
    """The CIFAR-10 network, not compiled: normalizations may convert layouts, but convolutions must not."""
    network = UNet2DModel(**preset_config("cifar10").unet()).to(cuda).train()
    network.lay_out_kernels()
    x, t = torch.randn(8, 3, 32, 32, device=cuda), torch.zeros(8, dtype=torch.int64, device=cuda)
    with torch.autocast("cuda", torch.bfloat16):
        network(x, t).sample.float().square().mean().backward()  # chooses kernels
        with profile(activities=[ProfilerActivity.CUDA]) as record:
            network(x, t).sample.float().square().mean().backward()
            torch.cuda.synchronize()
    kernels = {event.key for event in record.key_averages()}
    assert kernels and not [name for name in kernels if "nchwToNhwc" in name or "nhwcToNchw" in name]
