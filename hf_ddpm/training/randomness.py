"""All randomness of training as a pure function of (seed, step, position in the global batch).

No generator lives longer than a step and none belongs to a process. A run resumes from a number, the step; and the
processes and passes among which a global batch is divided see together what one would have seen alone.

Numbers are drawn for blocks of neighboring positions, each with a generator of its own, so that nobody draws much more
than its rows, and a GPU still draws many at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from hf_ddpm.seeds import DIFFUSION, DROPOUT, ORDER, generator

# Positions in a block. A change changes every run.
BLOCK = 32


def batch_indices(seed: int, step: int, batch: int, size: int) -> Tensor:
    """Returns the images of a global batch: epochs are permutations, end to end, without a gap or a repetition.

    Args:
        seed: Seed of the run.
        step: Optimizer step, from 0.
        batch: Images in a global batch.
        size: Images in the data set.

    Returns:
        Indices, int64, shape `(batch,)`.
    """
    places = torch.arange(step * batch, (step + 1) * batch)
    epochs = places // size
    indices = torch.empty_like(places)
    for epoch in epochs.unique().tolist():
        here = epochs == epoch
        indices[here] = _epoch_order(seed, epoch, size)[places[here] % size]
    return indices


@dataclass(frozen=True)
class Draws:
    r"""What is random about a batch.

    Attributes:
        t: Timesteps, uniform in [0, T), int64, shape `(B,)`.
        noise: :math:`\epsilon`, standard normal, shape `(B, C, H, W)`.
        flip: Whether an image is mirrored, bool, shape `(B,)`.
    """

    t: Tensor
    noise: Tensor
    flip: Tensor


def draw(
    seed: int, step: int, rows: range, shape: tuple[int, int, int], num_timesteps: int, device: torch.device | str
) -> Draws:
    """Draws for some rows of the global batch of a step; `shape` is the `(C, H, W)` of an image."""

    def fill(block: int) -> tuple[Tensor, Tensor, Tensor]:
        source = generator(seed, DIFFUSION, step, block, device=device)
        return (
            torch.randint(num_timesteps, (BLOCK,), generator=source, device=device),
            torch.randn((BLOCK, *shape), generator=source, device=device),
            torch.rand(BLOCK, generator=source, device=device) < 0.5,
        )

    blocks = [fill(block) for block in _blocks(rows)]
    return Draws(*(_cut(list(column), rows) for column in zip(*blocks, strict=True)))


def dropout_masks(seed: int, step: int, rows: range) -> Callable[[int, Tensor, float], Tensor]:
    """Returns what `UNet2DModel.draw_dropout` takes: the masks of some rows of the global batch of a step."""

    def mask(layer: int, x: Tensor, keep: float) -> Tensor:
        def fill(block: int) -> Tensor:
            source = generator(seed, DROPOUT, step, layer, block, device=x.device)
            return x.new_empty((BLOCK, *x.shape[1:])).bernoulli_(keep, generator=source)

        return _cut([fill(block) for block in _blocks(rows)], rows)

    return mask


def _blocks(rows: range) -> range:
    return range(rows.start // BLOCK, -(-rows.stop // BLOCK))


def _cut(blocks: list[Tensor], rows: range) -> Tensor:
    start = rows.start % BLOCK
    return torch.cat(blocks)[start : start + len(rows)]


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, size: int) -> Tensor:
    return torch.randperm(size, generator=generator(seed, ORDER, epoch))
