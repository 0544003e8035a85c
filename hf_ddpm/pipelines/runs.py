"""Runs and checkpoints as pipelines: load a checkpoint in the format of diffusers, write exports."""

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from hf_ddpm.config import PARTS, Config, with_past_defaults
from hf_ddpm.provenance import model_checksum
from hf_ddpm.utils.files import flush, flush_entry, naming
from hf_ddpm.utils.runs import read_state

WEIGHTS = "diffusion_pytorch_model.safetensors"


def labels_by_number(class_names: Sequence[str]) -> dict[str, str] | None:
    """Return class names as a pipeline's `id2label`, or None without classes."""
    return {str(index): name for index, name in enumerate(class_names)} or None


@contextmanager
def stock_folder(checkpoint: Path, average: str | None = None) -> Iterator[str]:
    """Yield a temporary folder with the pipeline of a checkpoint in the format of diffusers; weights are links.

    Args:
        checkpoint: The folder of a checkpoint.
        average: Decay of the average of weights (EMA) to use; by default the first one of the run.

    Yields:
        The path of the folder.

    Raises:
        ValueError: If the checkpoint's state is damaged or was written by a version that stored too little, or if the
            run has no such average.
    """
    state = read_state(checkpoint)
    weights = checkpoint / f"{average_name(state, average)}.safetensors"
    unet, scheduler = components(state, checkpoint)
    sampler = state.get("sampler", "DDPMScheduler")
    index = {
        "_class_name": "DDPMPipeline",
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", sampler],
        "num_inference_steps": state.get("num_inference_steps"),
        "id2label": labels_by_number(state["data"].get("classes") or ()),
    }
    contents = {
        "model_index.json": {name: value for name, value in index.items() if value is not None},
        "unet/config.json": {"_class_name": "UNet2DModel", **unet},
        "scheduler/scheduler_config.json": {"_class_name": sampler, **scheduler},
    }
    with TemporaryDirectory(prefix="hf_ddpm-") as folder:
        for name, content in contents.items():
            path = Path(folder) / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(content), encoding="utf-8")
        link = Path(folder) / "unet" / WEIGHTS
        try:
            link.symlink_to(weights.resolve())
        except OSError:  # on Windows, only some users may create links
            shutil.copyfile(weights, link)
        yield folder


def average_name(state: Mapping[str, Any], average: str | None = None) -> str:
    """Return the name of an average of a checkpoint; raise a `ValueError` if the run has no average of that decay."""
    decays = with_past_defaults(state["config"])["ema_decay"]
    names = [f"ema-{decay}" for decay in (decays if isinstance(decays, list) else [decays])]
    name = names[0] if average is None else f"ema-{average.removeprefix('ema-')}"
    if name not in names:
        raise ValueError(f"average={average!r}: expected an average of the run: {', '.join(names)}")
    return name


def components(state: Mapping[str, Any], checkpoint: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the configurations of network and scheduler of a checkpoint.

    Raises:
        ValueError: If the checkpoint was written by an older version and the run started from another model.
    """
    if "unet" in state and "scheduler" in state:
        return state["unet"], state["scheduler"]
    options = {**with_past_defaults(state["config"]), "num_train_epochs": None}
    if options["init_from"] is not None:
        raise ValueError(
            f"{checkpoint}: written by an older version that did not store the network of init_from; resume the run to "
            "write a new checkpoint"
        )
    parts = [part(**{field.name: options[field.name] for field in dataclasses.fields(part)}) for part in PARTS]
    config = Config(*parts)
    return config.unet(len(state["data"].get("classes") or ())), config.scheduler()


def write_export(
    pipe: DiffusionPipeline, folder: Path, record: Mapping[str, Any], dtype: torch.dtype = torch.float32
) -> None:
    """Write a pipeline and `export.json`, a record with the pipeline's checksum.

    Files are replaced atomically, `model_index.json` last, so that readers never load partly written files. Weights are
    rounded to `dtype`, and the checksum is of the rounded weights, converted to float32 as when they are loaded.

    Raises:
        OSError: If a file cannot be written.
    """
    partial = folder / ".export"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with naming(folder):
            nn.Module.to(pipe.unet, dtype)  # diffusers' own method warns about any change of dtype
            pipe.save_pretrained(partial)
            nn.Module.to(pipe.unet, torch.float32)
            content = {**record, "checksum": model_checksum(pipe)}
            (partial / "export.json").write_text(json.dumps(content) + "\n")
            flush(partial)
            files = [path for path in partial.rglob("*") if path.is_file()]
            for file in sorted(files, key=lambda path: path.name == "model_index.json"):
                target = folder / file.relative_to(partial)
                target.parent.mkdir(parents=True, exist_ok=True)
                file.replace(target)
                flush_entry(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
