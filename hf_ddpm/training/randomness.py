"""All randomness of training as a pure function of (seed, step, position in the global batch).

No generator lives longer than a step and none belongs to a process. A run resumes from a number, the step; and the
processes among which a global batch is divided see together what one would have seen alone: each draws for the whole
batch, which costs little beside the network, and takes its rows.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from hf_ddpm.seeds import DIFFUSION, ORDER, generator


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

    def rows(self, rows: slice) -> "Draws":
        """Returns the draws for some images of the batch."""
        return Draws(self.t[rows], self.noise[rows], self.flip[rows])


def draw(
    seed: int, step: int, shape: tuple[int, int, int, int], num_timesteps: int, device: torch.device | str
) -> Draws:
    """Draws for the global batch of a step; `shape` is `(B, C, H, W)`."""
    source = generator(seed, DIFFUSION, step, device=device)
    return Draws(
        t=torch.randint(num_timesteps, shape[:1], generator=source, device=device),
        noise=torch.randn(shape, generator=source, device=device),
        flip=torch.rand(shape[:1], generator=source, device=device) < 0.5,
    )


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, size: int) -> Tensor:
    return torch.randperm(size, generator=generator(seed, ORDER, epoch))
