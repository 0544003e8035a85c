"""What a set of real images is known by, and its features, extracted once."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from datasets.config import HF_CACHE_HOME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hf_ddpm.evaluation.extraction import BATCH_SIZE, Images, Processes, extract
from hf_ddpm.evaluation.features import Extractor
from hf_ddpm.images import to_signed
from hf_ddpm.utils.files import atomic_write

CACHE = Path(HF_CACHE_HOME) / "hf_ddpm" / "features"


def digests(images: Images, numbers: Sequence[int], levels: int | None = None) -> Iterator[bytes]:
    """Yields the SHA-256 of the pixels of each image; on the nearest of `levels` values if they are given."""
    for start in range(0, len(numbers), BATCH_SIZE):
        pixels = images[torch.tensor(numbers[start : start + BATCH_SIZE])]
        for image in pixels if levels is None else to_signed(pixels, levels):
            yield hashlib.sha256(image.cpu().contiguous().numpy().tobytes()).digest()


def fingerprint(images: Images, numbers: Sequence[int]) -> str:
    """Returns the SHA-256, in hex, of the decoded images in their order, whatever files they came from."""
    whole = hashlib.sha256(str(tuple(images.shape)).encode())
    for digest in digests(images, numbers):
        whole.update(digest)
    return whole.hexdigest()


def reference_features(
    extractor: Extractor,
    images: Images,
    numbers: Sequence[int],
    data_fingerprint: str,
    processes: Processes,
    cache: Path | None = None,
    progress: Callable[[int], object] = lambda count: None,
) -> Tensor:
    """Returns the features of real images, from the cache if they are there and sound; all processes are to call it.

    Args:
        extractor: The extractor.
        images: The images.
        numbers: Which of them.
        data_fingerprint: Their `fingerprint`.
        processes: Those that share the work.
        cache: Folder of the cache; `CACHE` if None.
        progress: Told the number of images after each batch of this process.

    Returns:
        Features, float32, shape `(len(numbers), D)`, on the extractor's device.
    """
    identity = [data_fingerprint, extractor.checksum, extractor.recipe, extractor.device.type, BATCH_SIZE]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    path = (cache or CACHE) / f"{key}.safetensors"
    found = read_features(path, key)
    # All or none: machines may not share a cache, and another run may have written it this moment.
    is_found = torch.tensor([found is not None], dtype=torch.int64, device=extractor.device)
    is_found_by_all = bool(processes.gather(is_found).all())
    if found is not None and is_found_by_all:
        return found.to(extractor.device)
    features = extract(extractor, images, numbers, processes, progress).features
    if processes.rank == 0:
        with suppress(OSError):  # a cache that cannot be written costs time, not the evaluation
            write_features(path, key, features)
    return features


def read_features(path: Path, key: str) -> Tensor | None:
    """Returns features from a file, or None if it is missing, damaged or of something else."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata, features = file.metadata() or {}, file.get_tensor("features")
    except (OSError, SafetensorError):
        return None
    sound: bool = metadata.get("key") == key and metadata.get("sha256") == _checksum(features)
    return features if sound else None


def write_features(path: Path, key: str, features: Tensor) -> None:
    """Writes features with their key and checksum, whole or not at all."""
    features = features.cpu().contiguous()
    content = save({"features": features}, metadata={"key": key, "sha256": _checksum(features)})
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, writer=f".{os.getpid()}") as partial:
        partial.write_bytes(content)


def _checksum(features: Tensor) -> str:
    return hashlib.sha256(str(tuple(features.shape)).encode() + features.numpy().tobytes()).hexdigest()
