"""Repositories of diffusers, old and new, brought to its present format.

Old ones have no subfolders, weights in a pickle, and other names in the layers of attention.
"""

import json
from pathlib import Path

from torch import Tensor

from hf_ddpm.hub.convert.conversion import Conversion, Entry, read_weights, unchanged
from hf_ddpm.hub.convert.hints import Hints
from hf_ddpm.pipelines.pipeline_ddpm import compare_with_export, read_pipeline

FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
FORMERLY = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def plan(model: str, hints: Hints) -> Conversion:
    """Plan the conversion of a DDPM pipeline of diffusers.

    Args:
        model: Folder or Hub id.
        hints: All None.

    Returns:
        The plan; names may still be missing.

    Raises:
        ValueError: If it cannot be loaded, or a hint is given.
    """
    hints.check("stock")
    pipe = read_pipeline(model)
    if not any(value.is_meta for value in pipe.unet.parameters()):  # else weights are missing, which is an error later
        compare_with_export(pipe)
    folder = Path(pipe.unet.config._name_or_path)  # of a Hub id: in the cache
    weights = _read(folder)
    entries = [Entry(ours, _name(ours, weights), unchanged) for ours in pipe.unet.state_dict()]
    return Conversion(pipe, weights, entries)


def _read(folder: Path) -> dict[str, Tensor]:
    for name in FILES:
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            return {key: value for shard in shards for key, value in read_weights(folder / shard).items()}
        if (folder / name).is_file():
            return read_weights(folder / name)
    raise ValueError(f"{folder} holds neither {' nor '.join(FILES)}")


def _name(ours: str, weights: dict[str, Tensor]) -> str:
    if ours not in weights:
        for now, then in FORMERLY.items():
            former = ours.replace(f".{now}.", f".{then}.")
            if former in weights:
                return former
    return ours
