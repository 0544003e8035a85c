"""The U-Net with hooks of accelerate, diffusers and FSDP2, which replace the inputs and outputs of its stages."""

import copy
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module

from hf_ddpm import UNet2DModel
from tests.conftest import LIMIT, TINY_UNET

CPU = torch.device("cpu")
VARIANTS = {
    "plain": {},
    "resnet resampling": {"downsample_type": "resnet", "upsample_type": "resnet", "layers_per_block": 2},
    "no middle, classes": {"mid_block_type": None, "num_class_embeds": 3},
}


def align_stages(unet, folder):
    for stage in [*unet.down_blocks, unet.mid_block, *unet.up_blocks]:
        if stage is not None:
            add_hook_to_module(stage, AlignDevicesHook(execution_device=CPU))


def dispatch(unet, folder):
    devices = {name: ("cpu", "disk")[i % 2] for i, (name, _) in enumerate(unet.named_children())}
    dispatch_model(unet, devices, main_device="cpu", offload_dir=folder, force_hooks=True)


def offload_weights(unet, folder):
    cpu_offload(unet, execution_device=CPU)


def offload_groups(unet, folder):
    unet.enable_group_offload(CPU, CPU, offload_type="block_level", num_blocks_per_group=1)


def offload_leaves(unet, folder):
    unet.enable_group_offload(CPU, CPU, offload_type="leaf_level")


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("hook", [align_stages, dispatch, offload_weights, offload_groups, offload_leaves])
def test_networks_with_hooks_equal_those_of_diffusers(hook, changes, tmp_path):
    options = {**TINY_UNET, **changes}
    stock, ours = diffusers.UNet2DModel(**options).eval(), UNet2DModel(**options).eval()
    ours.load_state_dict(stock.state_dict())
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 700])
    labels = torch.tensor([0, 2]) if "num_class_embeds" in changes else None
    with torch.no_grad():
        expected = stock(x, t, labels).sample
        hook(ours, tmp_path)
        for _ in range(2):
            torch.testing.assert_close(ours(x, t, labels).sample, expected, rtol=0, atol=2e-6)


def test_stages_do_not_change_their_inputs(tiny_unet):
    for stage, channels in ((tiny_unet.up_blocks[0], (16, 16, 8)), (tiny_unet.up_blocks[1], (16, 8, 8))):
        skips = tuple(torch.randn(1, width, 4, 4) for width in reversed(channels[1:]))
        before = copy.deepcopy(skips)
        stage(torch.randn(1, channels[0], 4, 4), skips, torch.randn(1, 32))
        assert len(skips) == len(before) and all(torch.equal(a, b) for a, b in zip(skips, before, strict=True))


# Train a network, sharded with two processes, and save its weights from the first one. With SGD, the weights depend on
# the size of the gradients.
TRAIN = """
import os
import sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from hf_ddpm import UNet2DModel

model, output, rendezvous, rank, world = sys.argv[1:]
rank, world = int(rank), int(world)
unet = UNet2DModel.from_pretrained(model).train()
if world > 1:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    for stage in [*unet.down_blocks, unet.mid_block, *unet.up_blocks]:
        fully_shard(stage)
    fully_shard(unet)
    assert sum(p.to_local().numel() for p in unet.parameters()) < 0.6 * unet.num_parameters()
optimizer = torch.optim.SGD(unet.parameters(), lr=0.1)
for step in range(2):
    x, eps = torch.randn(2, 4, 1, 8, 8, generator=torch.Generator().manual_seed(step))
    t, part = torch.tensor([1, 10, 100, 900]), slice(rank * 4 // world, (rank + 1) * 4 // world)
    (unet(x[part], t[part]).sample - eps[part]).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
weights = get_model_state_dict(unet, options=StateDictOptions(full_state_dict=True))
if rank == 0:
    torch.save(weights, output)
if world > 1:
    dist.barrier()
    dist.destroy_process_group()
os._exit(0)  # skip the destruction of gloo's threads, which sometimes fails
"""


@pytest.mark.slow
def test_training_sharded_network_equals_one_process(tmp_path):
    torch.manual_seed(0)
    unet = UNet2DModel(**{**TINY_UNET, "dropout": 0.0})
    unet.save_pretrained(tmp_path / "model")

    def train(output, world):
        arguments = [str(tmp_path / name) for name in ("model", output, f"{output}.rendezvous")]
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", TRAIN, *arguments, str(rank), str(world)],
                cwd=Path(__file__).parents[2], stderr=subprocess.PIPE, text=True,
            )
            for rank in range(world)
        ]  # fmt: skip
        for process in processes:
            errors = process.communicate(timeout=LIMIT)[1]
            assert process.returncode == 0, errors
        return torch.load(tmp_path / output)

    single, sharded, before = train("single", 1), train("sharded", 2), unet.state_dict()
    assert set(sharded) == set(single)
    for name, value in single.items():
        torch.testing.assert_close(sharded[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
        assert "to_k.bias" in name or (value - before[name]).abs().max() > 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_first_pass_on_gpu_lays_out_kernels():
    network = UNet2DModel(**TINY_UNET).cuda()
    with torch.inference_mode():
        network(torch.randn(2, 1, 8, 8, device="cuda"), 3)
    weight = network.down_blocks[0].resnets[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_inference()
    network(torch.randn(2, 1, 8, 8, device="cuda"), 3).sample.sum().backward()
