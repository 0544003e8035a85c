"""Compare the training loop with a manual Algorithm 1: diffusers' network, and formulas of Adam, clipping and EMA."""

import json

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from safetensors.torch import load_file

from hf_ddpm.config import DataConfig, parse_config
from hf_ddpm.data.batches import batch_indices
from hf_ddpm.data.store import load_images
from hf_ddpm.training.randomness import draw
from hf_ddpm.utils.seeds import DROPOUT, INITIALIZATION, derived_seed
from tests.conftest import TINY_RUN

STEPS, BATCH, LR, WARMUP, BETA2, CLIP, DECAY = 6, 8, 5e-3, 4, 0.95, 0.3, 0.8
WORDS = [
    *("--max_train_steps", str(STEPS), "--train_batch_size", str(BATCH), "--learning_rate", str(LR), "--seed", "5"),
    *("--warmup_steps", str(WARMUP), "--adam_beta2", str(BETA2), "--max_grad_norm", str(CLIP)),
    *("--ema_decay", str(DECAY), "0.1", "--ema_warmup", "true", "--horizontal_flip", "true", "--dropout", "0.2"),
    *("--levels", "256", "--beta_schedule", "linear", "--log_steps", "1"),
]


def initial_network():
    """Return diffusers' network with the initial weights of the run."""
    from hf_ddpm import UNet2DModel
    from hf_ddpm.models.blocks import initialize_like_paper

    options = parse_config([*TINY_RUN, *WORDS]).unet()
    torch.manual_seed(derived_seed(5, INITIALIZATION))
    ours = UNet2DModel(**options)
    initialize_like_paper(ours)
    network = diffusers.UNet2DModel(**options)
    network.load_state_dict(ours.state_dict())
    for resnet in [module for module in network.modules() if isinstance(module, ResnetBlock2D)]:
        resnet.dropout = Dropout()
    return network.train()


class Dropout(torch.nn.Module):
    """Dropout of 0.2 by a hash of step, row of the global batch, layer and position."""

    def forward(self, x):
        step, layer = self.place
        of_step = np.int64(derived_seed(5, DROPOUT, step) >> 31) - 2**31
        rows = scrambled(golden(np.arange(BATCH)) ^ of_step)
        keys = scrambled(rows ^ golden(np.int64(layer + 1)))
        channel, row, column = np.ogrid[: x.shape[1], : x.shape[2], : x.shape[3]]
        place = (row * x.shape[3] + column) * x.shape[1] + channel
        kept = mixed(keys[:, None, None, None] ^ golden(place)) < 0.3 * 2**32  # 0.8 - 0.5, as the hash is signed
        return torch.where(torch.from_numpy(kept), x / 0.8, 0)


def signed(bits):
    return (bits + 2**31) % 2**32 - 2**31


def golden(numbers):
    return signed(numbers.astype(np.int64) * 0x9E3779B9)


def scrambled(bits):
    """The hash in 64-bit integers, truncated to 32 bits after each operation; shifts are signed."""
    return mixed(signed(bits ^ (bits >> 16)))


def mixed(bits):
    bits = signed(bits * 0x7FEB352D)
    bits = signed(bits ^ (bits >> 15))
    return signed(bits * (0x846CA68B - 2**32))


def train_by_hand(prediction_type):
    network, images = initial_network(), load_images(DataConfig("digits", resolution=[8], channels=1))
    weights = dict(network.named_parameters())
    averages = {decay: {name: weight.detach().clone() for name, weight in weights.items()} for decay in (DECAY, 0.1)}
    first, second = ({name: torch.zeros_like(weight) for name, weight in weights.items()} for _ in range(2))
    alpha_bars = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    lines = []
    for step in range(STEPS):
        x0 = images[batch_indices(5, step, BATCH, 898)].double() / 127.5 - 1
        draws = draw(5, step, range(BATCH), (1, 8, 8), 1000, "cpu")
        x0 = torch.stack([x[:, :, range(7, -1, -1)] if flip else x for x, flip in zip(x0, draws.flip, strict=True)])
        a = alpha_bars[draws.t].view(-1, 1, 1, 1)
        x_t = a.sqrt() * x0 + (1 - a).sqrt() * draws.noise
        target = draws.noise if prediction_type == "epsilon" else a.sqrt() * draws.noise - (1 - a).sqrt() * x0

        for layer, dropout in enumerate(m for m in network.modules() if isinstance(m, Dropout)):
            dropout.place = (step, layer)
        losses = ((network(x_t.float(), draws.t).sample - target.float()) ** 2).mean((1, 2, 3))
        loss = losses.mean()
        gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
        norm = torch.stack([(g**2).sum() for g in gradients.values()]).sum().sqrt()
        lr = LR * min(1, (step + 1) / WARMUP)
        quarters = [losses[(250 * i <= draws.t) & (draws.t < 250 * (i + 1))] for i in range(4)]
        by_quarter = {f"loss_q{i + 1}": q.mean().item() if len(q) else None for i, q in enumerate(quarters)}
        lines.append({"loss": loss.item(), **by_quarter, "grad_norm": norm.item(), "learning_rate": lr})
        for name, gradient in gradients.items():
            g = gradient * min(1, CLIP / norm)
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = BETA2 * second[name] + (1 - BETA2) * g**2
            m, v = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - BETA2 ** (step + 1))
            with torch.no_grad():
                weights[name] -= lr * m / (v.sqrt() + 1e-8)
            for full_decay, average in averages.items():
                decay = min(full_decay, (1 + step) / (10 + step))
                average[name] = decay * average[name] + (1 - decay) * weights[name].detach()
    return {name: weight.detach() for name, weight in weights.items()}, averages, lines


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_loop_matches_algorithm_1(run_training, tmp_path, prediction_type):
    run_training(tmp_path, *WORDS, "--prediction_type", prediction_type)
    weights, averages, lines = train_by_hand(prediction_type)
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert max(line["grad_norm"] for line in lines) > CLIP  # gradients are clipped
    for actual, expected in zip(metrics, lines, strict=True):
        assert {name: actual[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    checkpoint = tmp_path / "checkpoints" / f"step-{STEPS:09d}"
    for file, expected in [("unet", weights), *((f"ema-{decay}", average) for decay, average in averages.items())]:
        for name, value in load_file(checkpoint / f"{file}.safetensors").items():
            if name.endswith("to_k.bias"):
                continue  # softmax cancels it: its gradient is zero but for rounding, which Adam amplifies
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
