"""Distillation stages for a model card, read from the subfolders of the distilled model."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hf_ddpm.hub.figures import rows
from hf_ddpm.utils.markdown import code
from hf_ddpm.utils.public import strip_local_path


@dataclass(frozen=True)
class Stage:
    """A row of the distillation table; unknown values are empty.

    Attributes:
        steps: Number of sampling steps.
        teacher: Name of the teacher.
        length: Number of optimizer steps.
        distance: Frechet distance of the samples.
        count: Number of samples.
    """

    steps: int
    teacher: str
    length: str = ""
    distance: str = ""
    count: str = ""


def stages_of(folder: Path) -> list[Stage]:
    """Return the stages of a distilled model in order; an empty list for other models."""
    return [_stage(steps, path) for steps, path in stage_folders(folder).items()]


def stage_folders(folder: Path) -> dict[int, Path]:
    """Return the stage folders of a distilled model by number of steps, most steps first."""
    folders = {int(path.name.removesuffix("-steps")): path for path in folder.glob("*-steps") if _is_stage(path)}
    return dict(sorted(folders.items(), reverse=True))


def built_in_guidance(folder: Path) -> dict[int, float]:
    """Return the guidance scale that each stage of a distilled model has learned, by number of steps; 1 for none."""
    scales, scale = {}, 1.0
    for steps, path in stage_folders(folder).items():
        learned = _read(path / "config.yaml").get("teacher_guidance", 1.0)
        scale = learned if learned != 1 else scale
        scales[steps] = scale
    return scales


def _is_stage(path: Path) -> bool:
    return re.fullmatch(r"\d+-steps", path.name) is not None and (path / "export.json").is_file()


def _stage(steps: int, path: Path) -> Stage:
    options, exported = _read(path / "config.yaml"), _read(path / "export.json")
    length = exported.get("step")
    metrics = {row.type: row for row in rows(_read(path / "results.json"))}
    row = metrics.get("fid") or metrics.get("frechet_distance")
    return Stage(
        steps,
        code(strip_local_path(str(options.get("teacher", "")), exported.get("hub_ids", ()))),
        f"{length:,}" if isinstance(length, int) else "",
        *(("", "") if row is None else (f"{row.value:.4g}{row.error}", f"{row.count:,}")),
    )


def _read(path: Path) -> dict[str, Any]:
    """Return the contents of a file; empty if it is missing or damaged."""
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}
