"""Generators for places: no random stream of this package depends on what was drawn before."""

import numpy as np
import torch

# What numbers are drawn for. A stream has no two purposes.
(
    ORDER, DIFFUSION, DROPOUT, INITIALIZATION, SAMPLES, BOUND_STEPS, BOUND_NOISE, CROP, SUBSET, METRIC_ORDER, FIGURES,
) = range(11)  # fmt: skip


def derived_seed(seed: int, purpose: int, *place: int) -> int:
    """Mixes a user's seed, a purpose and a place, such as a step or an image, into a seed in [0, 2**63)."""
    sequence = np.random.SeedSequence(seed, spawn_key=(purpose, *place))
    return int(sequence.generate_state(1, np.uint64)[0]) >> 1


def generator(seed: int, purpose: int, *place: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Returns a fresh generator for a place."""
    return torch.Generator(device).manual_seed(derived_seed(seed, purpose, *place))
