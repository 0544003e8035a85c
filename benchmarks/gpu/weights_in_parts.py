"""Copy weights from a machine that only returns small files: as bfloat16, in compressed parts of 15 MiB.

    python benchmarks/gpu/weights_in_parts.py pack UNET_FOLDER PARTS_FOLDER
    python benchmarks/gpu/weights_in_parts.py unpack PARTS_FOLDER FILE.safetensors

The two bytes of each number are compressed separately: 35.7M parameters take 47 MiB instead of 68 MiB.
"""

import json
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

PART = 15 * 2**20


def pack(folder: str, out: str) -> None:
    """Write the weights of a folder as compressed parts."""
    tensors = load_file(next(Path(folder).glob("*.safetensors")))
    numbers = torch.cat([tensor.bfloat16().flatten() for tensor in tensors.values()])
    planes = [zlib.compress(plane.tobytes(), 6) for plane in numbers.view(torch.uint8).view(-1, 2).numpy().T]
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    head = json.dumps({"planes": [len(plane) for plane in planes], "tensors": shapes}).encode()
    whole = len(head).to_bytes(8, "little") + head + b"".join(planes)
    for i, start in enumerate(range(0, len(whole), PART)):
        Path(out, f"unet.{i:02}.bf16z").write_bytes(whole[start : start + PART])
    print(f"{len(whole) / 2**20:.1f} MiB")


def unpack(folder: str, target: str) -> None:
    """Write the weights of compressed parts as one float32 file."""
    whole = b"".join(part.read_bytes() for part in sorted(Path(folder).glob("unet.*.bf16z")))
    place = 8 + int.from_bytes(whole[:8], "little")
    head, planes = json.loads(whole[8:place]), []
    for size in head["planes"]:
        planes.append(np.frombuffer(zlib.decompress(whole[place : place + size]), np.uint8))
        place += size
    numbers = torch.from_numpy(np.stack(planes, axis=1).copy()).view(torch.bfloat16).flatten().float()
    sizes = [int(np.prod(shape)) for shape in head["tensors"].values()]
    parts = zip(head["tensors"].items(), numbers.split(sizes), strict=True)
    save_file({name: part.view(shape).clone() for (name, shape), part in parts}, target, metadata={"format": "pt"})


if __name__ == "__main__":
    {"pack": pack, "unpack": unpack}[sys.argv[1]](*sys.argv[2:])
