"""Weights out of the files of others, of which nothing is run."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor


def read_weights(path: Path) -> dict[str, Tensor]:
    """Reads the tensors of a file by name.

    Args:
        path: `.npz` of arrays, `.safetensors`, or else a file of `torch.save`: a dictionary of tensors, or one under
            `state_dict`. It is unpickled as tensors alone; other objects, code among them, are refused.

    Returns:
        The tensors as they are stored, on the CPU.

    Raises:
        ValueError: If the file cannot be read, or holds anything else; one line.
    """
    try:
        return as_tensors(_load(path))
    except OSError as error:
        raise ValueError(f"input={str(path)!r} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"input={str(path)!r} is no checkpoint: {error}") from error


def as_tensors(weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns arrays or tensors by name as tensors; raises a `ValueError` if they are none."""
    if isinstance(weights, dict) and isinstance(weights.get("state_dict"), dict):
        weights = weights["state_dict"]
    if not isinstance(weights, Mapping) or not weights:
        raise ValueError("it holds no tensors by name")
    tensors = {}
    for name, value in weights.items():
        if isinstance(value, np.ndarray | np.generic) and np.asarray(value).dtype.kind in "fiu":
            value = torch.from_numpy(np.asarray(value))
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{name!r} is of type {type(value).__name__}, only tensors are allowed")
        tensors[name] = value
    return tensors


def layer_shape(tensors: Mapping[str, Tensor], name: str, dims: int = 4) -> tuple[int, ...]:
    """Returns the shape of a layer's weights; raises a `ValueError` unless they are there, of so many dimensions."""
    if name not in tensors:
        raise ValueError(f"the file holds no {name}: it is no checkpoint of that kind")
    shape = tuple(tensors[name].shape)
    if len(shape) != dims or 0 in shape:
        raise ValueError(f"{name} of shape {shape} is not allowed: {dims} dimensions, none of them empty")
    return shape


def _load(path: Path) -> Any:
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays)
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old pickles, which it then refuses
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch and numpy raise anything on a file that is none of theirs
        culprit = re.search(r"GLOBAL (\S+)|(Object arrays)", str(error))
        if culprit is None:
            raise ValueError("it is damaged, or of another kind") from error
        raise ValueError(f"it holds more than numbers ({culprit[0]}); nothing of it was run") from error
