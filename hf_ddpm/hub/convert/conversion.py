"""A conversion, planned before anything is written: which name becomes which, and whether the networks agree."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_ddpm.models.unet_2d import UNet2DModel
from hf_ddpm.pipelines.pipeline_ddpm import DDPMPipeline
from hf_ddpm.utils.files import atomic_write

TOLERANCE = 1e-4


def as_it_is(stored: Any) -> Any:
    """Returns it."""
    return stored


@dataclass(frozen=True)
class Entry:
    """One of our parameters, and where its values come from.

    Args:
        ours: Its name in the state dict.
        theirs: The name in the file.
        read: Takes the values out of what is stored there; 1x1 convolutions and linear layers are taken as the same.
    """

    ours: str
    theirs: str
    read: Callable[[Tensor], Tensor]


@dataclass
class Conversion:
    """All that is known of a conversion.

    Args:
        pipe: The pipeline; the network may be without values (on the meta device).
        weights: The tensors of the file by name.
        entries: Where each parameter of the network comes from.
        reference: The network computed without ours, from the tensors of the file: `f(x, t, class_labels)`.
        aside: Names that are knowingly left in the file.
        notes: What was assumed, in words.
    """

    pipe: DDPMPipeline
    weights: dict[str, Tensor]
    entries: list[Entry]
    reference: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    aside: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def missing(self) -> list[Entry]:
        """The parameters that the file does not hold."""
        return [entry for entry in self.entries if entry.theirs not in self.weights]

    @property
    def unknown(self) -> list[str]:
        """The names in the file that no parameter comes from."""
        return sorted(set(self.weights) - {entry.theirs for entry in self.entries} - set(self.aside))

    def check_names(self) -> None:
        """Raises a `ValueError` unless all parameters are in the file, and nothing else."""
        missing = [entry.theirs for entry in self.missing]
        if missing:
            raise ValueError(f"the file lacks {len(missing)} of {len(self.entries)} tensors: {_few(missing)}")
        if self.unknown:
            raise ValueError(f"the file holds {len(self.unknown)} tensors of no known use: {_few(self.unknown)}")

    def fill(self) -> None:
        """Gives the network its values, in float32.

        Raises:
            ValueError: If a name is missing or unknown, or a tensor has another shape or values that are not finite.
        """
        self.check_names()
        unet: UNet2DModel = self.pipe.unet
        shapes = {name: tuple(value.shape) for name, value in unet.state_dict().items()}
        state = {entry.ours: self._value(entry, shapes[entry.ours]) for entry in self.entries}
        unet.load_state_dict(state, assign=True)
        unet.eval()

    @torch.no_grad()
    def deviation(self) -> float:
        r"""Compares the network with the reference.

        Both see two images of noise, 2x4 at the lowest resolution, at the steps :math:`T/3` and :math:`T - 1` and, if
        there are any, of the first and the last class. What neither can know is not compared: a wrong number of heads
        is wrong for both.

        Returns:
            The largest difference of their outputs, in units of the largest output.

        Raises:
            ValueError: If it is more than `TOLERANCE`.
        """
        unet, generator = self.pipe.unet, torch.Generator().manual_seed(0)
        size, steps = unet.size_multiple, self.pipe.scheduler.config.get("num_train_timesteps", 1000)
        x = torch.randn(2, unet.config.in_channels, 2 * size, 4 * size, generator=generator)
        t, classes = torch.tensor([steps // 3, steps - 1]), unet.config.num_class_embeds
        labels = None if classes is None else torch.tensor([0, classes - 1])
        expected = self.reference(x, t, labels)
        found = (unet(x, t, labels).sample - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
        if not found <= TOLERANCE:
            raise ValueError(f"the converted network differs from the checkpoint's by {found:.1e}, not {TOLERANCE:g}")
        return float(found)

    def describe(self) -> Iterator[str]:
        """Yields lines that say what becomes of what."""
        for part in (self.pipe.unet, self.pipe.scheduler):
            yield f"{type(part).__name__}:"
            names = [name for name in part.config if not name.startswith("_") and name != "trained_betas"]
            yield from (f"  {name}: {part.config[name]}" for name in names)
        yield from self.notes
        gone = {entry.ours for entry in self.missing}
        yield f"{len(self.entries) - len(gone)} mapped:"
        yield from (f"  {entry.theirs} -> {entry.ours}" for entry in self.entries if entry.ours not in gone)
        yield f"{len(gone)} of the network that the file lacks:"
        yield from (f"  {entry.theirs} -> {entry.ours}" for entry in self.missing)
        yield f"{len(self.unknown)} of the file of no known use:"
        yield from (f"  {name}" for name in self.unknown)
        yield f"{len(self.aside)} of the file left aside:"
        yield from (f"  {name}" for name in self.aside)

    def _value(self, entry: Entry, shape: tuple[int, ...]) -> Tensor:
        stored = self.weights[entry.theirs]
        misfit = ValueError(f"{entry.theirs} of shape {tuple(stored.shape)} does not fit {entry.ours} of {shape}")
        try:
            value = entry.read(stored)
        except (RuntimeError, TypeError):
            raise misfit from None
        if _without_kernel(value.shape) != _without_kernel(shape):
            raise misfit
        if not bool(value.isfinite().all()):
            raise ValueError(f"{entry.theirs} holds values that are not finite")
        return value.float().reshape(shape).clone()


def check_free(folder: Path) -> None:
    """Raises a `ValueError` unless a folder can be made there: it may be there, but empty."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        what = "it is a file" if folder.is_file() else "it holds something"
        raise ValueError(f"output={str(folder)!r} is not allowed: {what}, a new or empty folder is wanted")


def write_pipeline(pipe: DDPMPipeline, folder: Path) -> None:
    """Writes a pipeline in the format of diffusers; the folder is there when it is whole.

    Raises:
        ValueError: If the folder holds something.
    """
    folder = folder.resolve()
    check_free(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder) as partial:
        shutil.rmtree(partial, ignore_errors=True)  # what a kill has left
        pipe.save_pretrained(partial)


def _without_kernel(shape: tuple[int, ...] | torch.Size) -> tuple[int, ...]:
    """Returns a shape without the kernel of a convolution, if that is 1x1."""
    return tuple(shape[:2] if all(size == 1 for size in shape[2:]) else shape)


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
