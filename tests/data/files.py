"""Helpers that write and open small datasets."""

import io

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage

from hf_ddpm.config import DataConfig
from hf_ddpm.data.sources import open_split
from hf_ddpm.data.store import load_images
from hf_ddpm.data.streaming.stream import open_stream
from hf_ddpm.data.transforms import ImageFormat

# Arguments of `load_images` and `open_stream`; all others are options of `DataConfig`.
ARGUMENTS = ("seed", "batch_size", "report", "device", "workers", "log")


def data(dataset, resolution=8, channels=1, **options):
    """Options of a dataset, by default for gray images of 8x8 pixels."""
    sides = [resolution] if isinstance(resolution, int) else list(resolution)
    return DataConfig(str(dataset), resolution=sides, channels=channels, **options)


def image_format(*args, **options):
    return ImageFormat.of(data("any", *args, **options))


def opened(dataset, **options):
    return open_split(data(dataset, **options))


def load(dataset, **options):
    arguments = {name: options.pop(name) for name in ARGUMENTS if name in options}
    return load_images(data(dataset, **options), **arguments)


def stream(dataset, **options):
    arguments = {name: options.pop(name) for name in ARGUMENTS if name in options}
    return open_stream(data(dataset, **options), **({"seed": 0, "workers": 0} | arguments))


def write_images(folder, count=3, size=(8, 8), mode="RGB"):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        channels = len(PILImage.new(mode, (1, 1)).getbands())
        array = rng.integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
        PILImage.fromarray(array.squeeze()).save(folder / f"{i}.png")
    return folder


def parquet(path, **columns):
    features = {name: Image() if isinstance(values[0], dict) else Value("int64") for name, values in columns.items()}
    Dataset.from_dict(columns, Features(features)).to_parquet(str(path))
    return str(path)


def png(array):
    file = io.BytesIO()
    PILImage.fromarray(array).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def numbered(index, size=8, format="PNG"):
    """An image filled with the gray value `index`, which identifies it; with JPEG the value may change by 1 or 2."""
    file = io.BytesIO()
    PILImage.new("L", (size, size), index).save(file, format)
    return {"bytes": file.getvalue(), "path": f"{index}.{format.lower()}"}


def shards(folder, images, files=4, group=5):
    """Write images to parquet files, in order; the class of an image is its index modulo 3."""
    folder.mkdir(exist_ok=True)
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b", "c"])})
    data = Dataset.from_dict({"image": images, "label": [i % 3 for i in range(len(images))]}, features)
    for i in range(files):
        path = folder / f"train-{i:05d}-of-{files:05d}.parquet"
        data.shard(files, i, contiguous=True).to_parquet(str(path), batch_size=group)
    return folder
