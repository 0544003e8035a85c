"""All figures of one model in one report."""

from collections.abc import Callable
from typing import Any

from hf_ddpm.paper.interpolation import interpolate
from hf_ddpm.paper.lossy import lossy_reconstruct
from hf_ddpm.paper.nearest_neighbors import nearest_neighbors
from hf_ddpm.paper.options import FIGURE_OPTIONS, AllConfig, NearestConfig, ProgressiveConfig, StepsConfig
from hf_ddpm.paper.progressive import progressive
from hf_ddpm.paper.rate_distortion import rate_distortion
from hf_ddpm.paper.schedules import schedules
from hf_ddpm.paper.shared_latent import shared_latent
from hf_ddpm.paper.steps import steps
from hf_ddpm.paper.study import Study
from hf_ddpm.utils.files import write_text

FIGURES: dict[str, Callable[[Study, Any], None]] = {
    "progressive": progressive,
    "shared-latent": shared_latent,
    "interpolate": interpolate,
    "rate-distortion": rate_distortion,
    "lossy-reconstruct": lossy_reconstruct,
    "nearest-neighbors": nearest_neighbors,
    "steps": steps,
    "schedules": schedules,
}


def everything(study: Study, options: AllConfig) -> None:
    """Makes every figure with its default options, then `report.md` of all whose results are there.

    Args:
        study: The model and its data.
        options: What to say otherwise.

    Raises:
        ValueError: If there are no data, or the scheduler is not a `DDPMScheduler`.
    """
    for name, config in FIGURE_OPTIONS.items():
        counts = config in (ProgressiveConfig, NearestConfig, StepsConfig)
        FIGURES[name](study, config(num_images=options.num_images) if counts else config())
    if study.accelerator.is_main_process:
        sections = [study.folder / f"{name}.md" for name in (*FIGURE_OPTIONS, "ablation")]
        parts = [
            f"# Figures of {study.subject.model}",
            *(file.read_text(encoding="utf-8") for file in sections if file.exists()),
        ]
        write_text(study.folder / "report.md", "\n".join(parts))
