"""Loading of a pipeline, with a check of its weights and one-line errors."""

import json
from pathlib import Path

import diffusers
import torch
from diffusers import SchedulerMixin
from diffusers.utils import logging

from hf_ddpm.models.unet_2d import UNet2DModel
from hf_ddpm.pipelines.pipeline_ddpm import DDPMPipeline
from hf_ddpm.provenance import model_checksum
from hf_ddpm.utils.files import one_line

logger = logging.get_logger(__name__)


def load_pipeline(model: str, device: torch.device | str) -> DDPMPipeline:
    """Load the pipeline of a folder, a run, a checkpoint or a Hub id onto a device, and check its weights.

    Log a warning if the folder contains the export of a run and its files have changed since (by checksum).

    Args:
        model: Folder of a pipeline, a run or a checkpoint, or a Hub id.
        device: The device.

    Returns:
        The pipeline.

    Raises:
        ValueError: If the pipeline cannot be loaded, weights are missing, unexpected or not finite, or the number of
            class names and of class embeddings do not match.
    """
    pipe = read_pipeline(model)
    weights = dict(pipe.unet.named_parameters())
    broken = {
        "{} weights are missing": [name for name, value in weights.items() if value.is_meta],
        "{} weights do not belong to its network": getattr(pipe.unet, "unexpected_keys", ()),
        "{} weights are not finite": [
            name for name, value in weights.items() if not value.is_meta and not bool(value.isfinite().all())
        ],
    }
    for problem, names in broken.items():
        if names:
            raise ValueError(f"model {model!r} cannot be loaded: {problem.format(len(names))}, such as {names[0]}")
    if pipe.class_names and pipe.unet.config.num_class_embeds not in (len(pipe.class_names), len(pipe.class_names) + 1):
        raise ValueError(
            f"model {model!r} cannot be loaded: id2label in model_index.json has {len(pipe.class_names)} classes, but "
            f"unet/config.json has num_class_embeds={pipe.unet.config.num_class_embeds}"
        )
    compare_with_export(pipe)
    if type(pipe.unet) is UNet2DModel:
        pipe.unet.lay_out_kernels()
    return pipe.to(device)


def read_pipeline(model: str) -> DDPMPipeline:
    """Read a pipeline for `load_pipeline`; missing weights stay on the meta device."""
    try:
        pipe = DDPMPipeline.from_pretrained(model)
        if not isinstance(pipe.unet, UNet2DModel | diffusers.UNet2DModel):
            raise ValueError(f"model_index.json: unet is a {type(pipe.unet).__name__}; expected UNet2DModel")
        if not (isinstance(pipe.scheduler, SchedulerMixin) and hasattr(pipe.scheduler, "step")):
            raise ValueError(f"model_index.json: scheduler is a {type(pipe.scheduler).__name__}; expected a scheduler")
        return pipe
    except Exception as error:  # diffusers raises errors of many types on damaged files
        # Prefer the Hub's error: the diffusers error is about its cache.
        cause = (isinstance(error, OSError) and error.__cause__) or error
        tried = "" if Path(model).exists() else "there is no such folder, and as a Hub id: "
        raise ValueError(
            f"model {model!r} cannot be loaded: {tried}{one_line(cause) or type(cause).__name__}"
        ) from error


def compare_with_export(pipe: DDPMPipeline) -> None:
    """Log a warning if the pipeline's folder contains the export of a run that has changed since."""
    record = Path(pipe.name_or_path) / "export.json"
    try:
        checksum = json.loads(record.read_text(encoding="utf-8"))["checksum"]
    except (OSError, ValueError, TypeError, KeyError):
        return
    if checksum != model_checksum(pipe):
        logger.warning(f"{record.parent}: weights or configuration have changed since the run exported them")
