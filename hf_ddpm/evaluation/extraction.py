"""Distributed feature extraction, and a cache of the features of real images."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from datasets.config import HF_CACHE_HOME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from hf_ddpm.evaluation.features import Extracted, Extractor
from hf_ddpm.images import to_signed
from hf_ddpm.utils.files import atomic_write

# Fixed, and processes take whole batches: on some devices the last bits of features depend on the batch.
BATCH_SIZE = 64

CACHE = Path(HF_CACHE_HOME) / "hf_ddpm" / "features"


class Images(Protocol):
    """Images of equal shape by index, for example a uint8 tensor of shape `(N, C, H, W)`."""

    def __len__(self) -> int:
        """Return the number of images."""

    def __getitem__(self, indices: Tensor, /) -> Tensor:
        """Return the images at `indices`, int64, shape `(B,)`, as uint8, shape `(B, C, H, W)`."""


def extract(extractor: Extractor, images: Images, indices: Sequence[int], state: Accelerator) -> Extracted:
    """Extract the features of images, bit-identical for any number of processes. All processes must call this function.

    Args:
        extractor: The extractor.
        images: The images.
        indices: Indices of the images, in order.
        state: The processes. Process `rank` of `world` processes the batches `rank`, `rank + world`, ...

    Returns:
        Features and, for a classifier, probabilities, on the extractor's device in every process.
    """
    rank, world = state.process_index, state.num_processes
    batches = -(-len(indices) // BATCH_SIZE)
    turns = -(-batches // world)
    parts = []
    with tqdm(total=-(-len(indices) // world), desc="Features", unit="image", disable=rank > 0) as bar:
        for turn in range(turns):
            # `gather` needs equal shapes: a process without a batch repeats the last batch.
            batch = min(turn * world + rank, batches - 1)
            batch_indices = torch.tensor(indices[batch * BATCH_SIZE : (batch + 1) * BATCH_SIZE])
            features, probabilities = extractor(images[batch_indices])
            rows = features if probabilities is None else torch.cat([features, probabilities], dim=1)
            parts.append(torch.nn.functional.pad(rows, (0, 0, 0, BATCH_SIZE - len(rows))))
            bar.update(len(batch_indices))
    gathered: Tensor = state.gather(torch.cat(parts))
    in_order = gathered.view(world, turns, BATCH_SIZE, -1).transpose(0, 1).flatten(0, 2)[: len(indices)]
    width = features.shape[1]
    return Extracted(
        in_order[:, :width].contiguous(), in_order[:, width:].contiguous() if extractor.classifies else None
    )


def digests(images: Images, indices: Sequence[int], levels: int | None = None) -> Iterator[bytes]:
    """Yield the SHA-256 of the pixels of each image, rounded to `levels` evenly spaced values if given."""
    for start in range(0, len(indices), BATCH_SIZE):
        pixels = images[torch.tensor(indices[start : start + BATCH_SIZE])]
        for image in pixels if levels is None else to_signed(pixels, levels):
            yield hashlib.sha256(image.cpu().contiguous().numpy().tobytes()).digest()


def fingerprint(images: Images, indices: Sequence[int]) -> str:
    """Return the SHA-256, in hex, of the decoded images in order, independent of their file format."""
    shape = tuple(images[torch.tensor(indices[:1])].shape[1:])
    whole = hashlib.sha256(str(shape).encode())
    for digest in digests(images, indices):
        whole.update(digest)
    return whole.hexdigest()


def cached_features(
    extractor: Extractor, images: Images, indices: Sequence[int], state: Accelerator
) -> tuple[Tensor, str]:
    """Return the features of real images, from `CACHE` if possible. All processes must call this function.

    Args:
        extractor: The extractor.
        images: The images.
        indices: Indices of the images.
        state: The processes.

    Returns:
        Features, float32, shape `(len(indices), D)`, on the extractor's device, and the `fingerprint` of the images.
    """
    data = fingerprint(images, indices)
    identity = [data, extractor.checksum, extractor.recipe, extractor.device.type, BATCH_SIZE]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    path = CACHE / f"{key}.safetensors"
    features = _read(path, key)
    # Use the cache only if all processes have it: machines may have separate caches, or a run may just have written it.
    is_cached = torch.tensor([features is not None], dtype=torch.int64, device=extractor.device)
    is_cached_everywhere = bool(state.gather(is_cached).all())
    if features is not None and is_cached_everywhere:
        return features.to(extractor.device), data
    features = extract(extractor, images, indices, state).features
    if state.is_main_process:
        with suppress(OSError):  # without a cache, the evaluation is only slower
            _write(path, key, features.cpu().contiguous())
    return features, data


def _read(path: Path, key: str) -> Tensor | None:
    """Return features from a file, or None if the file is missing, damaged, or has another key."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata, features = file.metadata() or {}, file.get_tensor("features")
    except (OSError, SafetensorError):
        return None
    is_valid: bool = metadata.get("key") == key and metadata.get("sha256") == _checksum(features)
    return features if is_valid else None


def _write(path: Path, key: str, features: Tensor) -> None:
    """Write features with their key and checksum, atomically."""
    content = save({"features": features}, metadata={"key": key, "sha256": _checksum(features)})
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, writer=f".{os.getpid()}") as partial:
        partial.write_bytes(content)


def _checksum(features: Tensor) -> str:
    return hashlib.sha256(str(tuple(features.shape)).encode() + features.numpy().tobytes()).hexdigest()
