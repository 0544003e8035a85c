"""Export a checkpoint of a run as a pipeline with a model card.

    hf-ddpm export runs/digits
    hf-ddpm export runs/digits --step 5000 --average 0.999 --output models/digits-5000

The pipeline has averaged weights and the diffusers format. Without --output, the newest checkpoint is exported into
the folder of its run. --output is required for older checkpoints and while the run is training.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hf_ddpm.utils.launch import exclusive
from hf_ddpm.utils.options import option, parse_options, require, require_at_least

NO_CHECKPOINT = "the run has no checkpoint yet; expected a run with one; train until its first checkpoint"


@dataclass
class ExportConfig:
    """Export: the run, the checkpoint, the average, the folder."""

    run: str = option("folder of a run or of one of its checkpoints", is_first=True)
    step: int | None = option("step of the checkpoint (default: the newest)", None)
    average: str | None = option("decay of the averaged weights to export (default: the run's first one)", None)
    output: str | None = option("folder for the pipeline (default: the folder of the run)", None)
    dtype: Literal["float32", "float16"] = option(
        "type of the exported weights; float16 halves the file size and rounds the weights; needs --output", "float32"
    )

    def __post_init__(self) -> None:
        """Check the values."""
        require(self, "run", Path(self.run).is_dir(), "an existing folder")
        require_at_least(self, 0, "step")


def main(argv: list[str]) -> int:
    """Run the command line; return the exit code."""
    (config,) = parse_options(argv, ExportConfig, doc=__doc__)
    folder, step = export_model(**vars(config))
    print(f"exported step {step:,} to {folder}; load it with DDPMPipeline.from_pretrained({str(folder)!r})")
    return 0


def export_model(
    run: Path | str,
    step: int | None = None,
    average: str | None = None,
    output: Path | str | None = None,
    dtype: str = "float32",
) -> tuple[Path, int]:
    """Export a checkpoint of a run as a pipeline with a model card: `hf-ddpm export` in Python.

    Args:
        run: Folder of a run or of one of its checkpoints.
        step: Step of the checkpoint; by default the newest intact one.
        average: Decay of the averaged weights to export; by default the first one of the run.
        output: Folder for the pipeline; by default the folder of the run, or a subfolder for further averages.
        dtype: Type of the exported weights, `float32` or `float16`; `float16` needs `output`.

    Returns:
        The folder and the step.

    Raises:
        ValueError: If the checkpoint or average does not exist, the checkpoint is damaged, or the run is in use and
            `output` is not given.
        OSError: If a file cannot be written.
    """
    from hf_ddpm.pipelines.runs import average_name  # slow import
    from hf_ddpm.utils.runs import checkpoints, read_state, run_folder, step_of

    config = ExportConfig(str(run), step, average, None if output is None else str(output), dtype)
    checkpoint = _checkpoint(config)
    state, home = read_state(checkpoint), run_folder(checkpoint)
    name = average_name(state, average)
    folder = home if name == average_name(state) else home / name
    if output is not None and Path(output).resolve() != home.resolve():
        allowed = "a new or empty folder, or the folder of an earlier export"
        require(config, "output", _is_free(Path(output)), allowed)
        write_model(checkpoint, name, Path(output), dtype)
        return Path(output), state["step"]
    require(config, "dtype", dtype == "float32", "the folder of a run is always float32; expected another --output")
    newest = step_of(checkpoints(home / "checkpoints")[-1])
    if state["step"] != newest:
        raise ValueError(
            f"--step {state['step']}: only the newest step, {newest}, is exported to the folder of the run; "
            "expected --output FOLDER"
        )
    try:
        with exclusive(home, "run"):
            write_model(checkpoint, name, folder)
    except ValueError as error:
        raise ValueError(f"{error}; set another --output" if "in use" in str(error) else error) from error
    return folder, state["step"]


def _is_free(folder: Path) -> bool:
    """Return whether a folder is new or empty, or contains only an earlier export."""
    if not folder.exists():
        return True
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {"a file"}
    return not names or ("export.json" in names and not names & {"checkpoints", ".lock"})


def _checkpoint(config: ExportConfig) -> Path:
    """Return the checkpoint to export; raise a `ValueError` if it is missing or damaged."""
    from hf_ddpm.hub.stages import stage_folders  # slow import
    from hf_ddpm.utils.runs import checkpoints, find_checkpoint, run_folder, step_of, verify_checkpoint

    folder = Path(config.run)
    kept = checkpoints(run_folder(folder) / "checkpoints")
    if config.step is not None:
        steps = {step_of(path): path for path in kept}
        available = ", ".join(map(str, steps))
        allowed = f"a step with a checkpoint ({available})" if steps else NO_CHECKPOINT
        require(config, "step", config.step in steps, allowed)
        folder = steps[config.step]
    elif not (folder / "state.json").exists():
        newest, _ = find_checkpoint(folder / "checkpoints", "latest")  # verifies the checkpoint
        if newest is not None:
            return newest
        stages = list(stage_folders(folder).values())
        allowed = f"folder of a distillation; expected the folder of one of its stages, such as {(stages or [''])[-1]}"
        require(config, "run", not stages, allowed)
        require(config, "run", False, NO_CHECKPOINT)
    damage = verify_checkpoint(folder)
    if damage is not None:
        raise ValueError(f"checkpoint {str(folder)!r}: {damage}")
    return folder


def write_model(checkpoint: Path, average: str, folder: Path, dtype: str = "float32") -> None:
    """Write the pipeline, its record, the files of the run about these weights, and the model card."""
    import torch

    from hf_ddpm import DDPMPipeline
    from hf_ddpm.hub.card import write_card
    from hf_ddpm.pipelines.runs import average_name, stock_folder, write_export
    from hf_ddpm.utils.files import make_folder
    from hf_ddpm.utils.runs import exported_step, lengths_of, read_state, run_folder

    state, home = read_state(checkpoint), run_folder(checkpoint)
    step = state["step"]
    with stock_folder(checkpoint, average) as stock:
        pipe = DDPMPipeline.from_pretrained(stock)
    make_folder(folder, "output")
    is_current = exported_step(home) == step and (home / "samples.png").exists()
    record = {"step": step, "images": step * state["global_batch_size"], "lengths": lengths_of(state)}
    write_export(pipe, folder, {**record, "hub_ids": state.get("hub_ids", [])}, getattr(torch, dtype))
    if folder.resolve() != home.resolve():
        _copy_records(home, folder, pipe, step)
    grid = home / "samples.png" if is_current else home / "samples" / f"step-{step:09d}.png"
    if average != average_name(state) or dtype != "float32" or not grid.exists():
        (folder / "samples.png").unlink(missing_ok=True)  # of other weights
    elif grid.resolve() != (folder / "samples.png").resolve():
        shutil.copyfile(grid, folder / "samples.png")
    write_card(folder, pipe=pipe, model_id=None)


def _copy_records(home: Path, folder: Path, pipe: Any, step: int) -> None:
    """Copy the sources of a model card up to a step, results of exactly these weights, and a card written by hand."""
    from hf_ddpm.hub.card import is_generated, read_sources
    from hf_ddpm.utils.jsonl import cut_lines

    for name in ("config.yaml", "metrics.jsonl", "status.json", "results.json", "results_nearest.png", "README.md"):
        (folder / name).unlink(missing_ok=True)  # of an earlier export
        if (home / name).exists():
            shutil.copyfile(home / name, folder / name)
    cut_lines(folder / "metrics.jsonl", step)
    if not read_sources(folder, pipe).results:
        for name in ("results.json", "results_nearest.png"):
            (folder / name).unlink(missing_ok=True)
    card = folder / "README.md"
    if card.exists() and is_generated(card.read_bytes()):
        card.unlink()
