"""The checkpoints in a run's folder: their names, their soundness, their state. Imports in milliseconds."""

import hashlib
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hf_ddpm.utils.schema import check_types

NEEDED = ("unet.safetensors", "optimizer.safetensors", "state.json")
STATE = {"step": int, "global_batch_size": int, "config": dict[str, Any], "data": dict[str, Any]}
# Entries that older versions did not write.
LATER_STATE = {
    "scaler": dict[str, Any] | None,
    "lengths": list[tuple[int, int]],
    "hub_ids": list[str],
    "unet": dict[str, Any],
    "scheduler": dict[str, Any],
    "sampler": str,
    "num_inference_steps": int,
    "teacher": str,
}


def find_checkpoint(folder: Path, resume: str) -> tuple[Path | None, list[str]]:
    """Choose the checkpoint to go on from.

    Args:
        folder: Where the run keeps its checkpoints.
        resume: `latest` (the newest sound one), `never`, or the path of one.

    Returns:
        Its path, or None to start afresh, and what is wrong with newer ones.

    Raises:
        ValueError: If the one named is missing or damaged, or all there are, or there are some and it is `never`.
    """
    found = checkpoints(folder)
    if resume == "never":
        if found:
            raise ValueError(f"resume=never, but {folder} holds checkpoints: choose another output_dir or remove them")
        return None, []
    if resume != "latest":
        damage = verify_checkpoint(Path(resume))
        if damage is not None:
            raise ValueError(f"resume={resume!r} is not allowed: {damage}")
        return Path(resume), []
    complaints = []
    for path in reversed(found):
        damage = verify_checkpoint(path)
        if damage is None:
            return path, complaints
        complaints.append(f"{path.name} is passed over: {damage}")
    if complaints:
        raise ValueError(f"no checkpoint in {folder} is sound: {'; '.join(complaints)}")
    return None, []


def stored_options(checkpoint: Path) -> dict[str, Any]:
    """Return the options of the run that a checkpoint is of."""
    return dict(read_state(checkpoint)["config"])


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return the `state.json` of a checkpoint; raises a `ValueError` that names file and key if it is damaged."""
    path = checkpoint / "state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(state, dict):
            raise ValueError("not a JSON object")
        missing = [name for name in STATE if name not in state]
        if missing:
            raise ValueError(f"{missing[0]} is missing")
        check_types(state, STATE | LATER_STATE)
        named = re.fullmatch(r"step-(\d{9})", checkpoint.name)
        if named is not None and int(named[1]) != state["step"]:
            raise ValueError(f"step={state['step']}: expected {int(named[1])}, as in the name of the folder")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error
    return state


def checkpoint_of(model: str | Path, log: Callable[[str], object]) -> Path | None:
    """Return the checkpoint that the name of a model stands for; None if it stands for a pipeline.

    Args:
        model: The folder of a checkpoint, or of a run: its newest sound checkpoint, unless its export is of that step
            or a later one. Anything else is the name of a pipeline.
        log: Called with a line on the choice.

    Raises:
        ValueError: If the checkpoint is damaged, or all of a run without an export are.
    """
    folder = Path(model)
    if folder.name == "checkpoints" and checkpoints(folder):
        folder = folder.parent
    if (folder / "manifest.json").exists() and (folder / "state.json").exists():
        damage = verify_checkpoint(folder)
        if damage is not None:
            raise ValueError(f"checkpoint {str(folder)!r}: {damage}")
        return folder
    found, exported = checkpoints(folder / "checkpoints"), exported_step(folder)
    for path in reversed(found):
        if exported is not None and step_of(path) <= exported:
            return None
        damage = verify_checkpoint(path)
        if damage is None:
            older = "" if exported is None else f", later than the export of step {exported}"
            log(f"{folder}: the model of checkpoint step {step_of(path)}{older}")
            return path
        if path.exists():  # else the run has removed it meanwhile
            log(f"{path} is passed over: {damage}")
    if found and exported is None:
        if found != checkpoints(folder / "checkpoints"):
            return checkpoint_of(model, log)
        raise ValueError(f"no checkpoint in {folder / 'checkpoints'} is sound")
    if exported is None and (folder / "status.json").exists():
        raise ValueError(f"run {str(folder)!r} has no checkpoint yet")
    return None


def exported_step(folder: Path) -> int | None:
    """Return the step of the pipeline in a run's folder, None if it has none; one of unknown step is the last."""
    if not (folder / "model_index.json").exists():
        return None
    try:
        step = json.loads((folder / "export.json").read_text(encoding="utf-8"))["step"]
    except (OSError, ValueError, TypeError, KeyError):
        return sys.maxsize
    return step if type(step) is int else sys.maxsize


def run_folder(model: str | Path) -> Path:
    """Return the folder of the run that a model's folder, which may be one of its checkpoints, belongs to."""
    whole = Path(model).resolve()
    return whole.parent.parent if whole.parent.name == "checkpoints" else Path(model)


def step_of(checkpoint: Path) -> int:
    """Return the step in the name of a checkpoint."""
    return int(checkpoint.name.removeprefix("step-"))


def lengths_of(state: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Return the lengths that a run has had: the step from which each counts, and its `max_train_steps`."""
    stored = state.get("lengths") or [(0, state["config"].get("max_train_steps") or state["step"])]
    return [(start, steps) for start, steps in stored]


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{9}", path.name) and path.is_dir())


def verify_checkpoint(path: Path) -> str | None:
    """Compare a checkpoint with its manifest; returns what is wrong with it, or None."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        missing = [name for name in NEEDED if name not in manifest]
        if missing:
            return f"its manifest lacks {missing[0]}"
        for name, entry in manifest.items():
            if (path / name).stat().st_size != entry["bytes"] or sha256(path / name) != entry["sha256"]:
                return f"{name} differs from its checksum"
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        return f"it is no whole checkpoint ({error})"
    return None


def sha256(path: Path) -> str:
    """Return the checksum of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
