"""Random numbers of training as a pure function of (seed, step, position in the global batch).

There is no random state: a run resumes from its step alone, and draws the same numbers for any number of processes and
any gradient accumulation with the same global batch size.

Numbers are drawn in blocks of 32 neighboring positions, each with its own generator. A process draws few numbers that
it does not use, and a GPU still draws many at once.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_ddpm.utils.seeds import DIFFUSION, DROPOUT, derived_seed, generator, hashed_keys

# Positions per block. Changing this number changes the results of every run.
BLOCK = 32


@dataclass(frozen=True)
class Draws:
    r"""The random numbers of a batch.

    Attributes:
        t: Timesteps, uniform in [0, T), int64, shape `(B,)`.
        noise: $\epsilon$, standard normal, shape `(B, C, H, W)`.
        flip: True for each image to flip, bool, shape `(B,)`.
        hide: Uniform in [0, 1), shape `(B,)`; the class of an image is dropped where this is less than `class_dropout`.
    """

    t: Tensor
    noise: Tensor
    flip: Tensor
    hide: Tensor


def draw(
    seed: int, step: int, rows: range, shape: tuple[int, int, int], num_timesteps: int, device: torch.device | str
) -> Draws:
    """Return the random numbers for some rows of the global batch of a step; `shape` is `(C, H, W)` of an image."""

    def fill(block: int) -> tuple[Tensor, ...]:
        source = generator(seed, DIFFUSION, step, block, device=device)
        return (
            torch.randint(num_timesteps, (BLOCK,), generator=source, device=device),
            torch.randn((BLOCK, *shape), generator=source, device=device),
            torch.rand(BLOCK, generator=source, device=device) < 0.5,
            torch.rand(BLOCK, generator=source, device=device),
        )

    blocks = [fill(block) for block in _blocks(rows)]
    return Draws(*(_cut(list(column), rows) for column in zip(*blocks, strict=True)))


def dropout_keys(seed: int, step: int, rows: range, device: torch.device | str) -> Tensor:
    """Return the dropout keys for some rows of the global batch of a step, for `UNet2DModel.seed_dropout`."""
    places = torch.arange(rows.start, rows.stop, dtype=torch.int32, device=device)
    return hashed_keys(derived_seed(seed, DROPOUT, step), places)


def _blocks(rows: range) -> range:
    return range(rows.start // BLOCK, -(-rows.stop // BLOCK))


def _cut(blocks: list[Tensor], rows: range) -> Tensor:
    first, last = rows.start % BLOCK, (rows.stop - 1) % BLOCK + 1
    blocks[-1] = blocks[-1][:last]
    blocks[0] = blocks[0][first:]
    return torch.cat(blocks)  # a copy, so that the rest of the blocks can be freed
