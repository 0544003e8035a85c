"""Find, verify and read the checkpoints of a run. Fast to import."""

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
# Entries that checkpoints of older versions lack.
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
    """Choose the checkpoint to resume from.

    Args:
        folder: Folder of the run's checkpoints.
        resume: `latest` for the newest intact checkpoint, `never`, or the path of a checkpoint.

    Returns:
        The path, or None to start at step 0; and a warning for each newer, damaged checkpoint.

    Raises:
        ValueError: If the given checkpoint is missing or damaged; if all checkpoints are damaged; or if `resume` is
            `never` and checkpoints exist.
    """
    existing = checkpoints(folder)
    if resume == "never":
        if existing:
            raise ValueError(
                f"--resume never: checkpoints exist in {folder}; choose another --output_dir or remove the checkpoints"
            )
        return None, []
    if resume != "latest":
        damage = verify_checkpoint(Path(resume))
        if damage is not None:
            raise ValueError(f"--resume {resume}: {damage}")
        return Path(resume), []
    warnings = []
    for path in reversed(existing):
        damage = verify_checkpoint(path)
        if damage is None:
            return path, warnings
        warnings.append(f"{path.name} is skipped: {damage}")
    if warnings:
        raise ValueError(f"{folder}: all checkpoints are damaged: {'; '.join(warnings)}")
    return None, []


def stored_options(checkpoint: Path) -> dict[str, Any]:
    """Return the options of a checkpoint's run."""
    return dict(read_state(checkpoint)["config"])


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return the `state.json` of a checkpoint; raise a `ValueError` that names file and key if it is damaged."""
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
            raise ValueError(f"step={state['step']}: expected {int(named[1])}, as in the folder's name")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error
    return state


def checkpoint_of(model: str | Path, log: Callable[[str], object]) -> Path | None:
    """Return the checkpoint to load for a model; None if a pipeline is to be loaded.

    Args:
        model: Folder of a checkpoint, or of a run, whose newest intact checkpoint is used unless the run's export
            is of the same step or a later one. Anything else is the folder or Hub id of a pipeline.
        log: Called with a line about the choice.

    Raises:
        ValueError: If the checkpoint is damaged, or the run has neither an export nor an intact checkpoint.
    """
    folder = Path(model)
    if folder.name == "checkpoints" and checkpoints(folder):
        folder = folder.parent
    if (folder / "manifest.json").exists() and (folder / "state.json").exists():
        damage = verify_checkpoint(folder)
        if damage is not None:
            raise ValueError(f"{folder}: checkpoint is damaged: {damage}")
        return folder
    existing, exported = checkpoints(folder / "checkpoints"), exported_step(folder)
    for path in reversed(existing):
        if exported is not None and step_of(path) <= exported:
            return None
        damage = verify_checkpoint(path)
        if damage is None:
            newer = "" if exported is None else f", newer than the export of step {exported}"
            log(f"{folder}: loading the checkpoint of step {step_of(path)}{newer}")
            return path
        if path.exists():  # otherwise the run has removed it in the meantime
            log(f"{path} is skipped: {damage}")
    if existing and exported is None:
        if existing != checkpoints(folder / "checkpoints"):  # the run has saved a checkpoint in the meantime
            return checkpoint_of(model, log)
        raise ValueError(f"{folder / 'checkpoints'}: all checkpoints are damaged")
    if exported is None and (folder / "status.json").exists():
        raise ValueError(f"{folder}: the run has no checkpoint yet")
    return None


def exported_step(folder: Path) -> int | None:
    """Return the step of the exported pipeline in a run's folder: None without an export, `sys.maxsize` if unknown."""
    if not (folder / "model_index.json").exists():
        return None
    try:
        step = json.loads((folder / "export.json").read_text(encoding="utf-8"))["step"]
    except (OSError, ValueError, TypeError, KeyError):
        return sys.maxsize
    return step if type(step) is int else sys.maxsize


def run_folder(model: str | Path) -> Path:
    """Return the folder of the run for the folder of a run or of one of its checkpoints."""
    whole = Path(model).resolve()
    return whole.parent.parent if whole.parent.name == "checkpoints" else Path(model)


def step_of(checkpoint: Path) -> int:
    """Return the step in the name of a checkpoint."""
    return int(checkpoint.name.removeprefix("step-"))


def lengths_of(state: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Return the history of a run's length: pairs of the step from which it counts, and `max_train_steps`."""
    stored = state.get("lengths") or [(0, state["config"].get("max_train_steps") or state["step"])]
    return [(start, steps) for start, steps in stored]


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{9}", path.name) and path.is_dir())


def verify_checkpoint(path: Path) -> str | None:
    """Compare a checkpoint with its manifest; return a description of the damage, or None."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        missing = [name for name in NEEDED if name not in manifest]
        if missing:
            return f"{missing[0]} is missing in manifest.json"
        for name, entry in manifest.items():
            if (path / name).stat().st_size != entry["bytes"] or sha256(path / name) != entry["sha256"]:
                return f"{name} does not match its checksum"
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        return f"incomplete or not a checkpoint ({error})"
    return None


def sha256(path: Path) -> str:
    """Return the SHA-256 checksum of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
