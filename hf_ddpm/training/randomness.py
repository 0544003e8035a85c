"""All randomness of training as a pure function of (seed, step, position in the global batch).

No generator lives longer than a step and none belongs to a process. A run resumes from a number, the step; and the
processes and passes among which a global batch is divided see together what one would have seen alone.

Numbers are drawn for blocks of neighboring positions, each with a generator of its own, so that nobody draws much more
than its rows, and a GPU still draws many at a time.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_ddpm.utils.seeds import DIFFUSION, DROPOUT, derived_seed, generator, hashed_keys

# Positions in a block. A change changes every run.
BLOCK = 32


@dataclass(frozen=True)
class Draws:
    r"""What is random about a batch.

    Attributes:
        t: Timesteps, uniform in [0, T), int64, shape `(B,)`.
        noise: :math:`\epsilon`, standard normal, shape `(B, C, H, W)`.
        flip: Whether an image is mirrored, bool, shape `(B,)`.
        hide: Uniform in [0, 1): the class of an image is hidden where this is small, shape `(B,)`.
    """

    t: Tensor
    noise: Tensor
    flip: Tensor
    hide: Tensor


def draw(
    seed: int, step: int, rows: range, shape: tuple[int, int, int], num_timesteps: int, device: torch.device | str
) -> Draws:
    """Draws for some rows of the global batch of a step; `shape` is the `(C, H, W)` of an image."""

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
    """Return what `UNet2DModel.seed_dropout` takes: keys of some rows of the global batch of a step."""
    places = torch.arange(rows.start, rows.stop, dtype=torch.int32, device=device)
    return hashed_keys(derived_seed(seed, DROPOUT, step), places)


def _blocks(rows: range) -> range:
    return range(rows.start // BLOCK, -(-rows.stop // BLOCK))


def _cut(blocks: list[Tensor], rows: range) -> Tensor:
    first, last = rows.start % BLOCK, (rows.stop - 1) % BLOCK + 1
    blocks[-1] = blocks[-1][:last]
    blocks[0] = blocks[0][first:]
    return torch.cat(blocks)  # a copy: of the rest of the blocks nothing stays
