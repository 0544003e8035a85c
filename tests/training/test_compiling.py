import functools
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters

from hf_ddpm import UNet2DModel
from hf_ddpm.training import compiling


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_run_compiles_single_graph_once(run_training, tmp_path, monkeypatch, precision):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(UNet2DModel, "compile", functools.partialmethod(torch.nn.Module.compile, backend=backend))
    torch.compiler.reset()
    counters.clear()
    words = ["--dropout", "0.1", "--max_train_steps", "3", "--gradient_accumulation_steps", "2"]
    run_training(tmp_path, *words, "--mixed_precision", precision, "--compile", "true", "--class_column", "label")
    assert len(graphs) == 1 and not counters["graph_break"]
    convolutions = [node for node in graphs[0].graph.nodes if "conv2d" in str(node.target)]
    network = UNet2DModel.from_pretrained(tmp_path, subfolder="unet")
    assert len(convolutions) == sum(isinstance(module, torch.nn.Conv2d) for module in network.modules())


class RoundedGradient(torch.autograd.Function):
    """Round gradients to fp16, at the scale of a loss that is a mean over 4,096 times as many images."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return (gradient / 4096).half().float() * 4096


@pytest.mark.parametrize("scale", [compiling.SCALE, 1.0])
def test_gradient_check_tolerates_fp16_underflow(monkeypatch, tiny_unet, scale):
    """Eager passes round between layers, compiled ones less; without a loss scale their gradients differ widely."""
    convolutions = [module for module in tiny_unet.modules() if isinstance(module, torch.nn.Conv2d)]
    hooks = [module.register_forward_hook(lambda _, x, y: RoundedGradient.apply(y)) for module in convolutions]
    monkeypatch.setattr(UNet2DModel, "compile", lambda unet: [hook.remove() for hook in hooks])
    monkeypatch.setattr(compiling, "SCALE", scale)
    accelerator = SimpleNamespace(mixed_precision="fp16", device=torch.device("cpu"))
    torch.manual_seed(0)
    if scale > 1:
        compiling.compile_network(tiny_unet, accelerator, 2, (1, 8, 8))
    else:
        with pytest.raises(FloatingPointError, match="wrong gradients"):
            compiling.compile_network(tiny_unet, accelerator, 2, (1, 8, 8))
