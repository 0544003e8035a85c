import copy

import diffusers
import pytest
import torch

from hf_ddpm import UNet2DModel
from hf_ddpm.config import parse_config
from hf_ddpm.models.blocks import initialize_like_paper
from hf_ddpm.models.dropout import Dropout
from tests.conftest import TINY_UNET

VARIANTS = {
    "plain": {},
    "swish": {"act_fn": "swish"},
    "paper": {"downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6},
    "heads": {"attention_head_dim": 4},
    "resnet resampling": {
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
    },
    "scale and shift": {"resnet_time_scale_shift": "scale_shift"},
    "scale and shift, norm": {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 2},
    "no attention": {
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "add_attention": False,
    },
    "no middle": {"mid_block_type": None},
    "scaled middle": {"mid_block_scale_factor": 2**0.5},
    "three levels": {
        "block_out_channels": (4, 8, 12),
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 2,
    },
    "classes": {"num_class_embeds": 5},
    "centered, six channels": {"center_input_sample": True, "in_channels": 3, "out_channels": 6},
    "embedding size": {"time_embedding_dim": 20},
    "rectangle": {"sample_size": (8, 16)},
}


def pair(**changes):
    """Return our network and the diffusers network, both constructed with seed 0."""
    networks = []
    for kind in (UNet2DModel, diffusers.UNet2DModel):
        torch.manual_seed(0)
        networks.append(kind(**{**TINY_UNET, **changes}))
    return networks


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_network_equals_that_of_diffusers(changes):
    ours, theirs = pair(**changes)
    weights, expected = ours.state_dict(), theirs.state_dict()
    assert list(weights) == list(expected)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    assert dict(ours.config) == dict(theirs.config)

    size = ours.config.sample_size
    x = torch.randn(3, ours.config.in_channels, *((size, size) if isinstance(size, int) else size))
    labels = torch.tensor([0, 4, 2]) if ours.config.num_class_embeds else None
    t = torch.tensor([0, 17, 999])
    ours.eval(), theirs.eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(x, t, labels).sample, theirs(x, t, labels).sample, rtol=0, atol=2e-6)
        for t in (3, 3.0, torch.tensor(3), torch.tensor([3])):
            (output,) = ours(x, t, labels, return_dict=False)
            torch.testing.assert_close(output, theirs(x, t, labels).sample, rtol=0, atol=2e-6)


def test_gradients_equal_those_of_diffusers():
    ours, theirs = pair(dropout=0.0)
    x, t = torch.randn(4, 1, 8, 8), torch.tensor([1, 10, 100, 900])
    for network in (ours, theirs):
        network(x, t).sample.square().mean().backward()
    for (name, actual), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(
            actual.grad, expected.grad, rtol=1e-4, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_dropout_layers_are_those_of_diffusers():
    ours, theirs = pair(dropout=0.5)
    x, t = torch.randn(4, 1, 8, 8), torch.tensor([1, 10, 100, 900])
    ours.seed_dropout(torch.arange(4, dtype=torch.int32))
    # Layers are registered in the same order. They get the same hashed masks, as torch's depend on the memory layout.
    names = [name for name, module in theirs.named_modules() if isinstance(module, torch.nn.Dropout) and module.p]
    layers = [module for module in ours.modules() if isinstance(module, Dropout)]
    for name, layer in zip(names, layers, strict=True):
        theirs.set_submodule(name, copy.deepcopy(layer))
    outputs = [network.train()(x, t).sample for network in (ours, theirs)]
    torch.testing.assert_close(*outputs, rtol=0, atol=2e-6)
    assert (outputs[0] - ours.eval()(x, t).sample).abs().max() > 0.1
    ours.seed_dropout(None)
    assert not torch.equal(ours.train()(x, t).sample, ours(x, t).sample)  # torch's masks differ in every pass


def test_kernels_and_feature_maps_are_channels_last(tmp_path):
    network = UNet2DModel(**TINY_UNET)
    network.save_pretrained(tmp_path)
    layouts = []
    for loaded in (network, UNet2DModel.from_pretrained(tmp_path)):
        assert all(parameter.is_contiguous() for parameter in loaded.parameters())  # required by FSDP2
        loaded.lay_out_kernels()
        for module in loaded.modules():
            if isinstance(module, torch.nn.Conv2d) and module is not loaded.conv_in:
                assert module.weight.is_contiguous(memory_format=torch.channels_last)
                module.register_forward_hook(lambda m, x, y: layouts.append(y))
        loaded(torch.randn(2, 1, 8, 8), 3)
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in layouts) and len(layouts) > 20


def test_network_of_paper_has_its_size_and_keys_of_diffusers():
    options = parse_config(["--preset", "cifar10"]).unet()
    with torch.device("meta"):
        ours, theirs = UNet2DModel(**options), diffusers.UNet2DModel(**options)
    assert ours.num_parameters() == 35_746_307
    shapes = [{name: tensor.shape for name, tensor in network.state_dict().items()} for network in (ours, theirs)]
    assert shapes[0] == shapes[1] and len(shapes[0]) == 328


def train_steps(network, count):
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        x, eps = torch.randn(2, 8, 1, 8, 8, generator=generator)
        loss = (network(x, torch.randint(1000, (8,), generator=generator)).sample - eps).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def changed_by_training(network, count):
    before = {name: value.clone() for name, value in network.state_dict().items()}
    train_steps(network, count)
    return {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}


def test_first_step_changes_all_weights_initialized_as_in_diffusers(tiny_unet):
    assert changed_by_training(tiny_unet, 1) == set(tiny_unet.state_dict())


def test_few_steps_change_all_weights_initialized_as_in_paper(tiny_unet):
    # The last layers of the network and of all branches are zero, so gradients reach earlier layers only step by step.
    initialize_like_paper(tiny_unet)
    assert changed_by_training(tiny_unet, 1) == {"conv_out.weight", "conv_out.bias"}
    assert changed_by_training(tiny_unet, 4) == set(tiny_unet.state_dict())


def test_initialization_of_paper_gives_zero_output_and_keeps_variance():
    network = UNet2DModel(**{**TINY_UNET, "block_out_channels": (32, 64)})
    initialize_like_paper(network)
    assert network(torch.randn(2, 1, 8, 8), 5).sample.abs().max() == 0
    weight = network.down_blocks[1].resnets[0].conv1.weight
    assert weight.var().item() == pytest.approx(2 / (32 * 9 + 64 * 9), rel=0.05)
    assert weight.abs().max().item() == pytest.approx((6 / (32 * 9 + 64 * 9)) ** 0.5, rel=0.01)  # uniform, not normal
    assert network.down_blocks[0].resnets[0].conv2.weight.abs().max() == 0
    assert network.mid_block.attentions[0].to_out[0].weight.abs().max() == 0


def test_gradient_checkpointing_does_not_change_gradients(tiny_unet):
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([1, 500])
    gradients = []
    for enable in (False, True):
        if enable:
            tiny_unet.enable_gradient_checkpointing()
        tiny_unet.zero_grad()
        tiny_unet(x, t).sample.square().mean().backward()
        gradients.append([p.grad.clone() for p in tiny_unet.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_gradient_checkpointing_recomputes_residual_blocks(tiny_unet, monkeypatch):
    calls = []
    forward = type(tiny_unet.mid_block.resnets[0]).forward
    monkeypatch.setattr(
        type(tiny_unet.mid_block.resnets[0]), "forward", lambda self, *args: (calls.append(1), forward(self, *args))[1]
    )
    for enable in (False, True):
        calls.clear()
        if enable:
            tiny_unet.enable_gradient_checkpointing()
        tiny_unet(torch.randn(2, 1, 8, 8, requires_grad=True), 5).sample.sum().backward()
        blocks = sum(
            len(stage.resnets) for stage in [*tiny_unet.down_blocks, tiny_unet.mid_block, *tiny_unet.up_blocks]
        )
        assert len(calls) == blocks * (2 if enable else 1)


def test_unsupported_architectures_are_rejected():
    for name, value in {
        "down_block_types": ("SkipDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "SkipUpBlock2D"),
        "time_embedding_type": "fourier",
        "act_fn": "mish",
        "class_embed_type": "timestep",
        "resnet_time_scale_shift": "spatial",
        "downsample_padding": 2,
    }.items():
        message = rf"{name}=.*: not supported .*; expected .*pass unet=diffusers.UNet2DModel.from_pretrained"
        with pytest.raises(ValueError, match=message):
            UNet2DModel(**{**TINY_UNET, name: value})
    with pytest.raises(ValueError, match="expected the same number of entries, one per resolution"):
        UNet2DModel(**{**TINY_UNET, "block_out_channels": (4, 8, 8)})
    with pytest.raises(ValueError, match="expected multiples of norm_num_groups=3"):
        UNet2DModel(**{**TINY_UNET, "norm_num_groups": 3})
    with pytest.raises(ValueError, match="attention_head_dim=32: expected at most 16, the channels of that block"):
        UNet2DModel(**{**TINY_UNET, "attention_head_dim": 32})


def test_invalid_inputs_are_rejected(tiny_unet):
    with pytest.raises(ValueError, match="images of 7x8: expected height and width to be multiples of 2"):
        tiny_unet(torch.randn(1, 1, 7, 8), 3)
    with pytest.raises(ValueError, match="class_labels: expected None, since the U-Net is unconditional"):
        tiny_unet(torch.randn(1, 1, 8, 8), 3, torch.tensor([0]))
    with pytest.raises(ValueError, match="class_labels are missing: the U-Net is class-conditional"):
        UNet2DModel(**TINY_UNET, num_class_embeds=3)(torch.randn(1, 1, 8, 8), 3)
