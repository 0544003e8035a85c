"""Adam, the learning rate schedule, and exponential moving averages (EMA) of the weights."""

import copy
import dataclasses
import math

import torch
from torch import nn

from hf_ddpm.config import TrainingConfig


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Return the learning rate of optimizer step `step`, counted from 0, for any number of processes.

    It increases linearly over `warmup_steps` steps. Then it stays constant or decays to zero at `max_train_steps`: as
    half a cosine, linearly, or as a power (`lr_power`) of the linear decay.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / max(1, config.max_train_steps - config.warmup_steps)
    if config.lr_schedule == "cosine":
        return config.learning_rate * (1 + math.cos(math.pi * progress)) / 2
    return config.learning_rate * (1 - progress) ** (config.lr_power if config.lr_schedule == "polynomial" else 1)


def describe_length(config: TrainingConfig, step: int, earlier: int) -> str | None:
    """Return a log line if a run is resumed at `step` with `max_train_steps` other than `earlier`; None otherwise."""
    steps = config.max_train_steps
    if steps == earlier:
        return None
    line = f"max_train_steps: {earlier:,} -> {steps:,}"
    if config.lr_schedule == "constant":
        return line
    before = learning_rate(dataclasses.replace(config, max_train_steps=earlier, num_train_epochs=None), step)
    if steps == step:
        return f"{line}; the {config.lr_schedule} learning rate ends at {before:.3g} instead of 0"
    rate = learning_rate(config, step)
    return f"{line}; the {config.lr_schedule} learning rate at step {step:,} is {rate:.3g} (was {before:.3g})"


def adam(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """Return a fused Adam optimizer, or AdamW if `weight_decay` is not 0."""
    betas, decay = (config.adam_beta1, config.adam_beta2), config.weight_decay
    if decay == 0:
        return torch.optim.Adam(model.parameters(), lr=config.learning_rate, betas=betas, fused=True)
    return torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=betas, weight_decay=decay, fused=True)


class EMA:
    r"""Exponential moving average of weights, $\bar\theta \leftarrow \bar\theta + (1 - d)(\theta - \bar\theta)$.

    Args:
        model: The trained network, on its final device.
        decay: $d$ in [0, 1).
        warmup: If true, the decay after `n` steps is at most $(1 + n) / (10 + n)$, for short runs.
    """

    def __init__(self, model: nn.Module, decay: float, warmup: bool = False):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.name = f"ema-{decay}"
        self.warmup = warmup
        self._averages, self._weights = list(self.model.parameters()), list(model.parameters())

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the average after optimizer step `step`, counted from 0."""
        torch._foreach_lerp_(self._averages, self._weights, 1 - self._decay(step))

    def initial_share(self, steps: int) -> float:
        """Return the share of the initial weights in the average after `steps` steps, in [0, 1]."""
        return math.prod(self._decay(step) for step in range(steps))

    def _decay(self, step: int) -> float:
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
