"""Generators for places: no random stream of this package depends on what was drawn before."""

import numpy as np
import torch


def derived_seed(*place: int) -> int:
    """Mixes numbers that name a place, such as a run's seed, a purpose and a step, into a seed in [0, 2**63)."""
    return int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0] >> 1)


def generator(*place: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Returns a fresh generator for a place."""
    return torch.Generator(device).manual_seed(derived_seed(*place))
