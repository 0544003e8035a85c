import functools

import pytest
import torch
from torch._dynamo.utils import counters

from hf_ddpm import UNet2DModel


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_run_compiles_one_graph_once(run_training, tmp_path, monkeypatch, precision):
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
