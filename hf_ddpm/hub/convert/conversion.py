"""Conversion of foreign checkpoints: read tensors, map them to parameters, write the pipeline."""

import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from hf_ddpm.models.unet_2d import UNet2DModel
from hf_ddpm.pipelines.pipeline_ddpm import DDPMPipeline
from hf_ddpm.utils.files import atomic_write, check_free

_BLOCK = re.compile(r"(down|mid|up)_blocks?(?:\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")


def unchanged(stored: Any) -> Any:
    """Return the argument: the `read` of an entry whose stored layout equals our network's."""
    return stored


@dataclass(frozen=True)
class Entry:
    """One parameter of our network and its source in the file.

    Args:
        ours: Name in our state dict.
        theirs: Name in the file.
        read: Extracts the values from the stored tensor. 1x1 convolutions and linear layers are interchangeable.
    """

    ours: str
    theirs: str
    read: Callable[[Tensor], Tensor]


@dataclass
class Conversion:
    """A planned conversion.

    Args:
        pipe: The pipeline; the network may be on the meta device, without values.
        weights: The tensors of the file by name.
        entries: One entry per parameter of the network.
        ignored: Names in the file that are ignored on purpose.
        notes: Assumptions, one per line.
    """

    pipe: DDPMPipeline
    weights: dict[str, Tensor]
    entries: list[Entry]
    ignored: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def missing(self) -> list[Entry]:
        """The parameters without a tensor in the file."""
        return [entry for entry in self.entries if entry.theirs not in self.weights]

    @property
    def unknown(self) -> list[str]:
        """The names in the file without a parameter of the network."""
        return sorted(set(self.weights) - {entry.theirs for entry in self.entries} - set(self.ignored))

    def fill(self) -> None:
        """Load the values into the network, in float32.

        Raises:
            ValueError: If a tensor is missing, unknown, not finite or of a wrong shape.
        """
        missing, unknown = [entry.theirs for entry in self.missing], self.unknown
        if missing:
            raise ValueError(f"{len(missing)} of {len(self.entries)} tensors are missing in the file: {_few(missing)}")
        if unknown:
            raise ValueError(f"unknown tensors in the file: {len(unknown)}, {_few(unknown)}")
        unet: UNet2DModel = self.pipe.unet
        shapes = {name: tuple(value.shape) for name, value in unet.state_dict().items()}
        state = {entry.ours: self._value(entry, shapes[entry.ours]) for entry in self.entries}
        unet.load_state_dict(state, assign=True)
        unet.eval()

    def describe(self) -> Iterator[str]:
        """Yield lines: the configurations, the notes, and the mapped, missing, unknown and ignored names."""
        for part in (self.pipe.unet, self.pipe.scheduler):
            yield f"{type(part).__name__}:"
            names = [name for name in part.config if not name.startswith("_") and name != "trained_betas"]
            yield from (f"  {name}: {part.config[name]}" for name in names)
        yield from self.notes
        missing = self.missing
        lists = {
            "mapped": [f"{entry.theirs} -> {entry.ours}" for entry in self.entries if entry not in missing],
            "missing in the file": [f"{entry.theirs} -> {entry.ours}" for entry in missing],
            "unknown": self.unknown,
            "ignored": self.ignored,
        }
        for title, lines in lists.items():
            yield f"{title}: {len(lines)}"
            yield from (f"  {line}" for line in lines)

    def _value(self, entry: Entry, shape: tuple[int, ...]) -> Tensor:
        stored = self.weights[entry.theirs]
        misfit = ValueError(f"{entry.theirs}: shape {tuple(stored.shape)}; expected that of {entry.ours}, {shape}")
        try:
            value = entry.read(stored)
        except (RuntimeError, TypeError):
            raise misfit from None
        if _without_kernel(value.shape) != _without_kernel(shape):
            raise misfit
        if not bool(value.isfinite().all()):
            raise ValueError(f"{entry.theirs}: not all values are finite")
        return value.float().reshape(shape).clone()


@dataclass(frozen=True)
class Place:
    """The position of a layer in our U-Net.

    Args:
        stage: `down`, `mid` or `up`.
        index: Index of the resolution in that direction; 0 in the middle.
        kind: `resnets`, `attentions`, `downsamplers` or `upsamplers`.
        number: Index among the blocks of this kind.
        layer: Name in the block, such as `conv1`.
    """

    stage: str
    index: int
    kind: str
    number: int
    layer: str


def place_of(path: str) -> Place | None:
    """Return the position of a layer, or None for layers outside of blocks, such as `conv_in`."""
    match = _BLOCK.fullmatch(path)
    if match is None:
        return None
    stage, index, kind, number, layer = match.groups()
    return Place(stage, int(index or 0), kind, int(number), layer)


def empty_unet(**options: object) -> UNet2DModel:
    """Return a U-Net without values, on the meta device."""
    with torch.device("meta"):
        return UNet2DModel(**options)  # type: ignore[arg-type]


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file by name, without running code from the file.

    Args:
        path: `.npz` or `.safetensors` file, or else a file of `torch.save`: a dictionary of tensors, optionally under
            the key `state_dict`. Pickles are loaded with `weights_only=True`, which rejects other objects and code.

    Returns:
        The tensors in their stored types, on the CPU.

    Raises:
        ValueError: If the file cannot be read, or contains anything but tensors; one line.
    """
    try:
        return as_tensors(_load(path))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: not a checkpoint: {error}") from error


def as_tensors(weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """Convert a dictionary of arrays or tensors to tensors; raise a `ValueError` for anything else."""
    if isinstance(weights, dict) and isinstance(weights.get("state_dict"), dict):
        weights = weights["state_dict"]
    if not isinstance(weights, Mapping) or not weights:
        raise ValueError("expected a dictionary of tensors")
    tensors = {}
    for name, value in weights.items():
        if isinstance(value, np.ndarray | np.generic) and np.asarray(value).dtype.kind in "fiu":
            value = torch.from_numpy(np.asarray(value))
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{name!r} has type {type(value).__name__}; expected a tensor")
        tensors[name] = value
    return tensors


def layer_shape(tensors: Mapping[str, Tensor], name: str, dims: int = 4) -> tuple[int, ...]:
    """Return the shape of a layer's weights; raise a `ValueError` unless they exist and have `dims` dimensions."""
    if name not in tensors:
        raise ValueError(f"{name} is missing in the file; expected a checkpoint of the chosen layout (--from)")
    shape = tuple(tensors[name].shape)
    if len(shape) != dims or 0 in shape:
        raise ValueError(f"{name}: shape {shape}; expected {dims} non-empty dimensions")
    return shape


def write_pipeline(pipe: DDPMPipeline, folder: Path) -> None:
    """Write a pipeline in the format of diffusers; the folder appears only once it is complete.

    Raises:
        ValueError: If the folder is not empty.
    """
    folder = folder.resolve()
    check_free(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder) as partial:
        shutil.rmtree(partial, ignore_errors=True)  # left over from a killed process
        pipe.save_pretrained(partial)


def _load(path: Path) -> Any:
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays)
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about old pickles before it rejects them
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch and numpy raise many types of errors
        culprit = re.search(r"GLOBAL (\S+)|(Object arrays)", str(error))
        if culprit is None:
            raise ValueError("damaged, or not of the format that its name implies") from error
        raise ValueError(f"contains code or objects ({culprit[0]}), which were not loaded") from error


def _without_kernel(shape: tuple[int, ...] | torch.Size) -> tuple[int, ...]:
    """Return a shape without the kernel dimensions of a 1x1 convolution."""
    return tuple(shape[:2] if all(size == 1 for size in shape[2:]) else shape)


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
