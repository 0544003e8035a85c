"""Conversion of old and new diffusers repositories to the current format.

Old repositories have no subfolders, store weights in a pickle, and use other names for attention layers.
"""

import json
from pathlib import Path

from torch import Tensor

from hf_ddpm.hub.convert.conversion import Conversion, Entry, read_weights, unchanged
from hf_ddpm.hub.convert.hints import Hints
from hf_ddpm.pipelines.loading import compare_with_export, read_pipeline

FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def plan(model: str, hints: Hints) -> Conversion:
    """Plan the conversion of a DDPM pipeline of diffusers.

    Args:
        model: Folder or Hub id.
        hints: Must all be None.

    Returns:
        The plan; the weights may still lack tensors.

    Raises:
        ValueError: If the model cannot be loaded, or a hint is given.
    """
    hints.check("stock")
    pipe = read_pipeline(model)
    if not any(value.is_meta for value in pipe.unet.parameters()):  # `fill` reports missing weights
        compare_with_export(pipe)
    folder = Path(pipe.unet.config._name_or_path)  # for a Hub id, a folder in the cache
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
    raise ValueError(f"{folder}: weights are missing; expected {' or '.join(FILES)}")


def _name(ours: str, weights: dict[str, Tensor]) -> str:
    if ours not in weights:
        for new, old in OLD_NAMES.items():
            old_name = ours.replace(f".{new}.", f".{old}.")
            if old_name in weights:
                return old_name
    return ours
