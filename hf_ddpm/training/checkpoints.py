"""Checkpoints of a training run, safe against a kill at any moment.

A checkpoint is a folder `step-000001000/` of safetensors and JSON files. It is written under a temporary name, with a
manifest of sizes and checksums, flushed to disk, and only then renamed. Old checkpoints are removed afterwards. Loading
uses the newest checkpoint whose files match its manifest.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_ddpm.config import NOT_ABOUT_WEIGHTS, with_past_defaults
from hf_ddpm.pipelines.pipeline_ddpm import stored_class
from hf_ddpm.training.loop import Callback, Run
from hf_ddpm.utils.files import flush, flush_entry
from hf_ddpm.utils.runs import checkpoints, lengths_of, read_state, sha256, step_of

# Options that may change when a run is resumed. They affect what is saved and shown, how a global batch is divided and
# how fast it is computed; results change by rounding at most. One exception: the length of a run affects a decaying
# learning rate, so `Run.lengths` records its changes.
FREE_OPTIONS = {
    "output_dir", "max_train_steps", "num_train_epochs", "log_steps", "checkpointing_steps", "keep_checkpoints",
    "resume", "train_batch_size", "gradient_accumulation_steps", "sample_at_checkpoints", "num_samples",
    "num_inference_steps", "tf32", "deterministic", "gradient_checkpointing", "compile", "tracker", "world_size",
    "dry_run", "allow_terminal_signal", "check_memory", "teacher",
    *NOT_ABOUT_WEIGHTS,
}  # fmt: skip


class Checkpoints(Callback):
    """Save the run's checkpoints to `folder`, and keep the newest `keep`."""

    def __init__(self, folder: Path, keep: int):
        self.folder = folder
        self.keep = keep

    def on_checkpoint(self, run: Run) -> None:
        """Save a checkpoint, then remove the oldest ones."""
        if run.accelerator.is_main_process:
            save_checkpoint(run, self.folder)
            for old in checkpoints(self.folder)[: -self.keep]:
                trash = old.with_name(f".trash-{old.name}")
                old.rename(trash)  # a partly removed folder must not look like a checkpoint
                shutil.rmtree(trash)
        run.accelerator.wait_for_everyone()


def save_checkpoint(run: Run, folder: Path) -> Path:
    """Write the complete state of a run, so that it resumes with identical results; return the checkpoint's folder."""
    final = folder / f"step-{run.step:09d}"
    partial = folder / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        _write(run, partial)
        flush(partial)
        partial.rename(final)
        flush_entry(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        left = checkpoints(folder)
        newest = f"the newest complete checkpoint is {left[-1]}" if left else "the run has no earlier checkpoint"
        raise OSError(f"{final}: checkpoint cannot be written: {error}; {newest}") from error
    return final


def _write(run: Run, folder: Path) -> None:
    _save_tensors(run.unet.state_dict(), folder / "unet.safetensors")
    for ema in run.emas:
        _save_tensors(ema.model.state_dict(), folder / f"{ema.name}.safetensors")
    _save_tensors(_flat(run.optimizer.state_dict()["state"]), folder / "optimizer.safetensors")
    scaler = run.accelerator.scaler
    state = {
        "step": run.step,
        "global_batch_size": run.global_batch_size,
        "scaler": None if scaler is None else scaler.state_dict(),
        "config": run.config.to_dict(),
        "data": _data(run),
        "lengths": run.lengths,
        "hub_ids": run.hub_ids,
        # `init_from` may be gone by the time that the run resumes.
        "unet": dict(run.unet.config),
        "scheduler": dict(run.scheduler.config),
        **_of_student(run),
    }
    (folder / "state.json").write_text(json.dumps(state, indent=2))
    manifest = {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in folder.iterdir()}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2))


def _of_student(run: Run) -> dict[str, Any]:
    """Return the entries of a distillation: sampler, number of steps and teacher, so that pipelines can be loaded."""
    if run.teacher is None:
        return {}
    steps = run.config.distillation.student_steps
    return {"sampler": stored_class(run.scheduler), "num_inference_steps": steps, "teacher": run.teacher}


def load_checkpoint(run: Run, path: Path) -> None:
    """Load a checkpoint's weights, averages, optimizer and step into a run.

    If `max_train_steps` is less than the steps already done, it is raised to them, and the run ends at once.

    Raises:
        ValueError: If an option that changes the results differs from the checkpoint's, or tensors are missing,
            unexpected, not finite, or of another shape or type.
    """
    state = read_state(path)
    _check_same_run(run, state, path)
    run.unet.load_state_dict(_load_tensors(path / "unet.safetensors", run.unet.state_dict()))
    for ema in run.emas:
        ema.model.load_state_dict(_load_tensors(path / f"{ema.name}.safetensors", ema.model.state_dict()))
    moments = _moments(run.optimizer) if state["step"] else {}
    _load_optimizer(run.optimizer, _load_tensors(path / "optimizer.safetensors", moments))
    if run.accelerator.scaler is not None and state.get("scaler") is not None:
        run.accelerator.scaler.load_state_dict(state["scaler"])
    run.step = state["step"]
    _set_length(run, lengths_of(state))
    # Keep the first session's decision on `init_from`: a local folder that was deleted since looks like a Hub id.
    init_from, stored = run.config.start_from, state.get("hub_ids", [])
    run.hub_ids = [name for name in run.hub_ids if name != init_from or name in stored]


def archive_after(folder: Path, step: int) -> None:
    """Prepare a checkpoint folder for a run that resumes from `step`.

    Checkpoints of later steps (damaged, or skipped because the user resumed from an earlier one) are renamed to
    `undone-*`: they must neither be resumed from nor count towards `keep_checkpoints`. Folders that a killed process
    left partly written or partly removed are deleted.
    """
    for leftover in [*folder.glob(".step-*.partial"), *folder.glob(".trash-*")]:
        shutil.rmtree(leftover)
    for path in checkpoints(folder):
        if step_of(path) > step:
            earlier = len(list(folder.glob(f"undone-{path.name}*")))
            path.rename(path.with_name(f"undone-{path.name}" + (f"-{earlier}" if earlier else "")))


def _check_same_run(run: Run, state: dict[str, Any], path: Path) -> None:
    now, then = run.config.to_dict(), with_past_defaults(state["config"])
    changed = [f"{k}={now[k]!r} (was {then[k]!r})" for k in now if k not in FREE_OPTIONS and now[k] != then[k]]
    if run.global_batch_size != state["global_batch_size"]:
        changed.append(f"images per step: {run.global_batch_size} (was {state['global_batch_size']})")
    if run.teacher != state.get("teacher"):
        changed.append(f"teacher={run.config.distillation.teacher!r} (with other weights)")
    data = _data(run) | state["data"]  # older versions recorded less
    changed += [f"{k}={v!r} (was {data[k]!r})" for k, v in _data(run).items() if v != data[k]]
    if changed:
        raise ValueError(
            f"{path}: checkpoint of a run with other options: {', '.join(changed)}; "
            "expected the same options, or another --output_dir"
        )


def _set_length(run: Run, stored: list[tuple[int, int]]) -> None:
    """End a run at its step if `max_train_steps` is less; otherwise record a changed length."""
    training, run.lengths = run.config.training, stored
    steps = training.max_train_steps
    if steps < run.step:
        training = replace(training, max_train_steps=run.step, num_train_epochs=None)
        run.config = replace(run.config, training=training)
    elif steps > run.step and steps != stored[-1][1]:
        run.lengths = [*(entry for entry in stored if entry[0] < run.step), (run.step, steps)]


def _data(run: Run) -> dict[str, Any]:
    """Return the number of images and the class names, which must not change within a run."""
    return {"images": run.num_images, "classes": list(run.class_names)}


def _flat(state: dict[int, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{index}.{name}": value for index, entry in state.items() for name, value in entry.items()}


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    optimizer.load_state_dict(optimizer.state_dict() | {"state": _nested(tensors)})
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            if value.shape == parameter.shape:
                # The fused kernel matches weights and moments by their position in memory: use the same layout.
                moments[name] = torch.empty_like(parameter).copy_(value)


def _nested(tensors: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".")
        state.setdefault(int(index), {})[name] = value
    return state


def _moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the state of an Adam optimizer as meta tensors: the expected names, shapes and types."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    step = torch.empty((), device="meta")
    return {
        f"{index}.{name}": step if name == "step" else parameter.to("meta")
        for index, parameter in enumerate(parameters)
        for name in ("step", "exp_avg", "exp_avg_sq")
    }


def _load_tensors(path: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read tensors from a file; raise a `ValueError` unless they are finite and match `like` (name, shape, type)."""
    tensors = load_file(path)
    odd = sorted(tensors.keys() ^ like.keys())
    if odd:
        raise ValueError(f"{path}: tensor {odd[0]} is {'unexpected' if odd[0] in tensors else 'missing'}")
    for name, value in tensors.items():
        now, then = (tuple(value.shape), value.dtype), (tuple(like[name].shape), like[name].dtype)
        if now != then:
            raise ValueError(f"{path}: {name} is {now[1]} of shape {now[0]}; expected {then[1]} of shape {then[0]}")
        if not bool(value.isfinite().all()):
            raise ValueError(f"{path}: {name} contains NaN or infinite values")
    return tensors


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
