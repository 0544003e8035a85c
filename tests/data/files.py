"""Small data sets of files."""

import io

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage


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
    """An image of one gray value, by which it is known; JPEG keeps it to within 1 or 2."""
    file = io.BytesIO()
    PILImage.new("L", (size, size), index).save(file, format)
    return {"bytes": file.getvalue(), "path": f"{index}.{format.lower()}"}


def shards(folder, images, files=4, group=5):
    """Writes images into parquet files, in order; their class is their number modulo 3."""
    folder.mkdir(exist_ok=True)
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b", "c"])})
    data = Dataset.from_dict({"image": images, "label": [i % 3 for i in range(len(images))]}, features)
    for i in range(files):
        path = folder / f"train-{i:05d}-of-{files:05d}.parquet"
        data.shard(files, i, contiguous=True).to_parquet(str(path), batch_size=group)
    return folder
