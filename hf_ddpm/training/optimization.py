"""The learning rate as a function of the step, and Adam."""

import math

import torch
from torch import nn

from hf_ddpm.config import TrainingConfig


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Returns the learning rate of optimizer step `step`, counted from 0: whatever the number of processes.

    It rises over `warmup_steps` steps in equal parts, then stays or falls along half a cosine to zero.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / max(1, config.max_train_steps - config.warmup_steps)
    return config.learning_rate * (1 + math.cos(math.pi * progress)) / 2


def adam(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """Returns Adam for a network, whose step is one kernel for all weights."""
    return torch.optim.Adam(model.parameters(), lr=config.learning_rate, betas=(0.9, config.adam_beta2), fused=True)
