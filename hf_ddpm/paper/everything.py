"""All figures of one model in one report."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hf_ddpm.paper.interpolation import InterpolateConfig, interpolate
from hf_ddpm.paper.lossy import LossyConfig, lossy_reconstruct
from hf_ddpm.paper.nearest_neighbors import NearestConfig, nearest_neighbors
from hf_ddpm.paper.progressive import ProgressiveConfig, progressive
from hf_ddpm.paper.rate_distortion import RateDistortionConfig, rate_distortion
from hf_ddpm.paper.schedules import SchedulesConfig, schedules
from hf_ddpm.paper.shared_latent import SharedLatentConfig, shared_latent
from hf_ddpm.paper.steps import StepsConfig, steps
from hf_ddpm.paper.study import Study
from hf_ddpm.utils.files import write_text
from hf_ddpm.utils.options import option, require_at_least

# By the names of their files, in the order of the report.
FIGURES: dict[str, tuple[Callable[[Study, Any], None], type]] = {
    "progressive": (progressive, ProgressiveConfig),
    "shared-latent": (shared_latent, SharedLatentConfig),
    "interpolate": (interpolate, InterpolateConfig),
    "rate-distortion": (rate_distortion, RateDistortionConfig),
    "lossy-reconstruct": (lossy_reconstruct, LossyConfig),
    "nearest-neighbors": (nearest_neighbors, NearestConfig),
    "steps": (steps, StepsConfig),
    "schedules": (schedules, SchedulesConfig),
}


@dataclass
class AllConfig:
    """All of these but the ablation, and one report of them: report.md."""

    num_images: int = option("images for distances and nearest neighbors, at least 2", 100)

    def __post_init__(self) -> None:
        """Checks the values."""
        require_at_least(self, 2, "num_images")


def everything(study: Study, options: AllConfig) -> None:
    """Makes every figure with its default options, then `report.md` of all whose results are there.

    Args:
        study: The model and its data.
        options: What to say otherwise.

    Raises:
        ValueError: If there are no data, or the scheduler is not a `DDPMScheduler`.
    """
    for make, config in FIGURES.values():
        counts = config in (ProgressiveConfig, NearestConfig, StepsConfig)
        make(study, config(num_images=options.num_images) if counts else config())
    if study.accelerator.is_main_process:
        sections = [study.folder / f"{name}.md" for name in (*FIGURES, "ablation")]
        parts = [
            f"# Figures of {study.subject.model}",
            *(file.read_text(encoding="utf-8") for file in sections if file.exists()),
        ]
        write_text(study.folder / "report.md", "\n".join(parts))
