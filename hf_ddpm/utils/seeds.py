"""Stateless random numbers: derived seeds, fresh generators, and a hash of indices."""

import math

import numpy as np
import torch
from torch import Tensor

# Purposes of random numbers. Each purpose has its own stream.
(
    ORDER, DIFFUSION, DROPOUT, INITIALIZATION, SAMPLES, BOUND_STEPS, BOUND_NOISE, CROP, SUBSET, METRIC_ORDER, FIGURES,
) = range(11)  # fmt: skip


def derived_seed(seed: int, purpose: int, *place: int) -> int:
    """Mix the user's seed, a purpose and indices, such as of a step or an image, into a seed in [0, 2**63)."""
    sequence = np.random.SeedSequence(seed, spawn_key=(purpose, *place))
    return int(sequence.generate_state(1, np.uint64)[0]) >> 1


def generator(seed: int, purpose: int, *place: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a new generator, seeded with the `derived_seed`."""
    return torch.Generator(device).manual_seed(derived_seed(seed, purpose, *place))


# Odd multipliers of 32-bit hashes, as signed integers: of Fibonacci hashing, and of "lowbias32" (C. Wellons 2018).
GOLDEN, FIRST, SECOND = 0x9E3779B9 - 2**32, 0x7FEB352D, 0x846CA68B - 2**32


def scramble(bits: Tensor) -> Tensor:
    """Hash int32 tensors in place, one to one."""
    bits ^= bits >> 16
    return mix(bits)


def mix(bits: Tensor) -> Tensor:
    """Second half of `scramble`, in place, one to one; sufficient for the bits of a hash."""
    bits *= FIRST
    bits ^= bits >> 15
    bits *= SECOND
    return bits


def hashed_keys(seed: int, *places: Tensor) -> Tensor:
    """Hash a derived seed and indices, int32 tensors of one shape, into keys of that shape; equal on all devices."""
    keys: Tensor | int = (seed >> 31) - 2**31  # the upper half of 63 bits, as a signed number
    for place in places:
        keys = scramble((place * GOLDEN) ^ keys)
    return torch.as_tensor(keys)


def normal_noise(keys: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return float32 standard normal numbers, shape `(B, *shape)`, from int32 keys, shape `(B,)`, by Box-Muller."""
    count = math.prod(shape)
    half = -(-count // 2)
    places = torch.arange(2 * half, dtype=torch.int32, device=keys.device)
    uniform = scramble((places * GOLDEN) ^ keys[:, None]).float().mul_(2**-32).add_(0.5).clamp_(2**-33, 1)
    radius, angle = uniform[:, :half].log().mul_(-2).sqrt_(), uniform[:, half:] * (2 * math.pi)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :count].view(-1, *shape)
