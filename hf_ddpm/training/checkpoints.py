"""Checkpoints that survive a kill at any moment, and the state of a run.

A checkpoint is a folder `step-000001000/` of safetensors and JSON. It is written under another name, flushed to disk,
given a manifest of sizes and checksums, and only then renamed; older ones go after that. Whoever loads takes the
newest folder that its manifest confirms.
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

from hf_ddpm.config import BESIDE_TRAINING, with_past_defaults
from hf_ddpm.pipelines.pipeline_ddpm import stored_class
from hf_ddpm.training.loop import Callback, Run
from hf_ddpm.utils.files import flush, flush_entry
from hf_ddpm.utils.runs import checkpoints, lengths_of, read_state, sha256, step_of

# Options that may differ between the sessions of a run: they change what is kept and shown, how a global batch is
# divided and how fast it is computed, not what is computed but for rounding. The length of a run is part of a learning
# rate that falls towards its end: `Run.lengths` records its changes.
FREE_OPTIONS = {
    "output_dir", "max_train_steps", "num_train_epochs", "log_steps", "checkpointing_steps", "keep_checkpoints",
    "resume", "train_batch_size", "gradient_accumulation_steps", "sample_at_checkpoints", "num_samples",
    "num_inference_steps", "tf32", "deterministic", "gradient_checkpointing", "compile", "tracker", "world_size",
    "dry_run", "allow_terminal_signal", "check_memory", "teacher",
    *BESIDE_TRAINING,
}  # fmt: skip


class Checkpoints(Callback):
    """Saves the run's checkpoints to `folder`, and keeps the newest few."""

    def __init__(self, folder: Path, keep: int):
        self.folder = folder
        self.keep = keep

    def on_checkpoint(self, run: Run) -> None:
        """Saves, then removes what is too old."""
        if run.accelerator.is_main_process:
            save_checkpoint(run, self.folder)
            for old in checkpoints(self.folder)[: -self.keep]:
                trash = old.with_name(f".trash-{old.name}")
                old.rename(trash)  # a folder that is only half removed must not look like a checkpoint
                shutil.rmtree(trash)
        run.accelerator.wait_for_everyone()


def save_checkpoint(run: Run, folder: Path) -> Path:
    """Write all that a run needs to go on exactly as if it had not stopped, and returns the checkpoint's folder."""
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
        sound = f"the last one is {left[-1]}" if left else "there is none before it"
        raise OSError(f"checkpoint {final} cannot be written, {sound}: {error}") from error
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
        # What `init_from` may no longer say.
        "unet": dict(run.unet.config),
        "scheduler": dict(run.scheduler.config),
        **_of_student(run),
    }
    (folder / "state.json").write_text(json.dumps(state, indent=2))
    manifest = {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in folder.iterdir()}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2))


def _of_student(run: Run) -> dict[str, Any]:
    """Return what makes the checkpoint of a distillation a pipeline of its steps, and its teacher."""
    if run.teacher is None:
        return {}
    steps = run.config.distillation.student_steps
    return {"sampler": stored_class(run.scheduler), "num_inference_steps": steps, "teacher": run.teacher}


def load_checkpoint(run: Run, path: Path) -> None:
    """Puts a checkpoint's weights, average, optimizer and step into a run.

    A run whose `max_train_steps` are fewer than the steps done ends where it is.

    Raises:
        ValueError: If the run differs from the checkpoint's in an option that changes what is computed, or tensors are
            missing, superfluous, not finite, or of another shape or type.
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
    # Only the first session has opened it: by now a folder may be gone, and look like a Hub id.
    init_from, then = run.config.start_from, state.get("hub_ids", [])
    run.hub_ids = [name for name in run.hub_ids if name != init_from or name in then]


def archive_after(folder: Path, step: int) -> None:
    """Clears a checkpoint folder for a run that goes on from `step`.

    Later checkpoints, which are damaged or which the user went back behind, are renamed to `undone-*`: they must
    neither be resumed from nor push out the new ones. What a kill left half written or half removed goes.
    """
    for leftover in [*folder.glob(".step-*.partial"), *folder.glob(".trash-*")]:
        shutil.rmtree(leftover)
    for path in checkpoints(folder):
        if step_of(path) > step:
            taken = len(list(folder.glob(f"undone-{path.name}*")))
            path.rename(path.with_name(f"undone-{path.name}" + (f"-{taken}" if taken else "")))


def _check_same_run(run: Run, state: dict[str, Any], path: Path) -> None:
    now, then = run.config.to_dict(), with_past_defaults(state["config"])
    changed = [f"{k}={now[k]!r} (was {then[k]!r})" for k in now if k not in FREE_OPTIONS and now[k] != then[k]]
    if run.global_batch_size != state["global_batch_size"]:
        changed.append(f"images a step: {run.global_batch_size} (was {state['global_batch_size']})")
    if run.teacher != state.get("teacher"):
        changed.append(f"teacher={run.config.distillation.teacher!r} (its weights were others)")
    data = _data(run) | state["data"]  # an older version recorded less
    changed += [f"{k}={v!r} (was {data[k]!r})" for k, v in _data(run).items() if v != data[k]]
    if changed:
        raise ValueError(f"{path} is of another run, choose another output_dir: {', '.join(changed)}")


def _set_length(run: Run, stored: list[tuple[int, int]]) -> None:
    """End a run at its step if it should have ended before; else records its length if it is another one."""
    training, run.lengths = run.config.training, stored
    steps = training.max_train_steps
    if steps < run.step:
        training = replace(training, max_train_steps=run.step, num_train_epochs=None)
        run.config = replace(run.config, training=training)
    elif steps > run.step and steps != stored[-1][1]:
        run.lengths = [*(entry for entry in stored if entry[0] < run.step), (run.step, steps)]


def _data(run: Run) -> dict[str, Any]:
    """Return what of the data decides which image is which."""
    return {"images": run.num_images, "classes": list(run.class_names)}


def _flat(state: dict[int, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{index}.{name}": value for index, entry in state.items() for name, value in entry.items()}


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    optimizer.load_state_dict(optimizer.state_dict() | {"state": _nested(tensors)})
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            if value.shape == parameter.shape:
                # The fused kernel pairs the entries of weights and moments by where they lie in memory.
                moments[name] = torch.empty_like(parameter).copy_(value)


def _nested(tensors: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".")
        state.setdefault(int(index), {})[name] = value
    return state


def _moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return tensors of the names, shapes and types of an Adam optimizer's state, on the meta device."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    step = torch.empty((), device="meta")
    return {
        f"{index}.{name}": step if name == "step" else parameter.to("meta")
        for index, parameter in enumerate(parameters)
        for name in ("step", "exp_avg", "exp_avg_sq")
    }


def _load_tensors(path: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Reads a file of tensors; raises a `ValueError` unless they are finite, of these names, shapes and types."""
    tensors = load_file(path)
    odd = sorted(tensors.keys() ^ like.keys())
    if odd:
        raise ValueError(f"{path}: {odd[0]} is {'superfluous' if odd[0] in tensors else 'missing'}")
    for name, value in tensors.items():
        now, then = (tuple(value.shape), value.dtype), (tuple(like[name].shape), like[name].dtype)
        if now != then:
            raise ValueError(f"{path}: {name} is {now[1]} of shape {now[0]}, expected {then[1]} of shape {then[0]}")
        if not bool(value.isfinite().all()):
            raise ValueError(f"{path}: {name} holds values that are not finite")
    return tensors


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
