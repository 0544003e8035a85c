"""Images to features on several processes: the same to the last bit for any number of them and any batch size."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hf_ddpm.evaluation.features import Extracted, Extractor

# On some devices the features of an image differ in the last bits with the batch that it is in: batches are always
# these, and a process takes whole ones.
BATCH_SIZE = 64


class Images(Protocol):
    """Images of one shape by number."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape `(C, H, W)` of an image."""

    def __len__(self) -> int:
        """Returns the number of images."""

    def __getitem__(self, numbers: Tensor, /) -> Tensor:
        """Returns images by their numbers, int64, shape `(B,)`, as bytes, shape `(B, C, H, W)`."""


@dataclass(frozen=True)
class Processes:
    """The processes that share the work.

    Attributes:
        rank: Which one this is.
        world: How many there are.
        gather: Returns the rows of all processes, one process after the other, on each of them.
    """

    rank: int = 0
    world: int = 1
    gather: Callable[[Tensor], Tensor] = lambda rows: rows


def extract(
    extractor: Extractor,
    images: Images,
    numbers: Sequence[int],
    processes: Processes,
    progress: Callable[[int], object] = lambda count: None,
) -> Extracted:
    """Returns what is known of images, on every process; all are to call it.

    Args:
        extractor: The extractor.
        images: The images.
        numbers: Which of them, in this order.
        processes: Those that share the work.
        progress: Told the number of images after each batch of this process.

    Returns:
        Features and, for a classifier, probabilities, on the extractor's device.
    """
    rows, width = extract_share(extractor, images, numbers, processes.rank, processes.world, progress)
    all_rows = in_order(processes.gather(rows), len(numbers), processes.world)
    features = all_rows[:, :width].contiguous()
    return Extracted(features, all_rows[:, width:].contiguous() if extractor.classifies else None)


def extract_share(
    extractor: Extractor,
    images: Images,
    numbers: Sequence[int],
    rank: int,
    world: int,
    progress: Callable[[int], object] = lambda count: None,
) -> tuple[Tensor, int]:
    """Returns the features of a process's share, batches `rank`, `rank + world`, ..., and how wide they are.

    A row holds the features, then the probabilities. Every process returns equally many rows, those that stand for no
    image among them, since that is how rows are gathered.
    """
    batches = -(-len(numbers) // BATCH_SIZE)
    parts = []
    for turn in range(-(-batches // world)):
        batch = min(turn * world + rank, batches - 1)
        chosen = torch.tensor(numbers[batch * BATCH_SIZE : (batch + 1) * BATCH_SIZE])
        extracted = extractor(images[chosen])
        known = [value for value in extracted if value is not None]
        rows = torch.cat(known, dim=1)
        parts.append(torch.nn.functional.pad(rows, (0, 0, 0, BATCH_SIZE - len(rows))))
        width = extracted.features.shape[1]
        progress(len(chosen))
    return torch.cat(parts), width


def in_order(rows: Tensor, count: int, world: int) -> Tensor:
    """Returns the first `count` rows of the shares of all processes in the order of the images."""
    turns = len(rows) // world // BATCH_SIZE
    return rows.view(world, turns, BATCH_SIZE, -1).transpose(0, 1).reshape(len(rows), -1)[:count]
