"""Export the model of a run at one of its checkpoints, as a pipeline with its card.

    hf-ddpm export runs/digits
    hf-ddpm export runs/digits --step 5000 --average 0.999 --output models/digits-5000

The pipeline is in the format of diffusers, of averaged weights. Without --output, that of the newest checkpoint goes
into the run's folder; a run that is being trained, and an older step, need --output.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hf_ddpm.utils.launch import exclusive
from hf_ddpm.utils.options import option, parse_options, require, require_at_least


@dataclass
class ExportConfig:
    """Export: the run, the checkpoint, the average, the folder."""

    run: str = option("folder of a run, or of one of its checkpoints", is_first=True)
    step: int | None = option("step of the checkpoint; the newest by default", None)
    average: str | None = option("average of the weights, by its decay; the run's first by default", None)
    output: str | None = option("folder of the pipeline; that of the run by default", None)
    dtype: Literal["float32", "float16"] = option(
        "type of the stored weights; float16 halves the file and rounds the weights (needs --output)", "float32"
    )

    def __post_init__(self) -> None:
        """Check the values."""
        require(self, "run", Path(self.run).is_dir(), "there is no such folder")
        require_at_least(self, 0, "step")


def main(argv: list[str]) -> int:
    """Run the command line; returns the exit code."""
    (config,) = parse_options(argv, ExportConfig, doc=__doc__)
    folder, step = export_model(**vars(config))
    print(f"{folder} holds the model of step {step:,}; DDPMPipeline.from_pretrained({str(folder)!r}) loads it")
    return 0


def export_model(
    run: Path | str,
    step: int | None = None,
    average: str | None = None,
    output: Path | str | None = None,
    dtype: str = "float32",
) -> tuple[Path, int]:
    """Export the model of a run at one of its checkpoints: `hf-ddpm export` in Python.

    Args:
        run: Folder of a run, or of one of its checkpoints.
        step: Step of the checkpoint; the newest sound one by default.
        average: Which average of the weights, by its decay; the first of the run by default.
        output: Folder of the pipeline; by default that of the run, and below it for further averages.
        dtype: Type of the stored weights, `float32` or `float16`; the latter with an `output`.

    Returns:
        The folder and the step.

    Raises:
        ValueError: If there is no such checkpoint or average, it is damaged, or the run is in use and has no `output`.
        OSError: If a file cannot be written.
    """
    from hf_ddpm.pipelines.runs import average_name  # takes seconds
    from hf_ddpm.utils.runs import checkpoints, read_state, run_folder, step_of

    config = ExportConfig(str(run), step, average, None if output is None else str(output), dtype)
    checkpoint = _checkpoint(config)
    state, home = read_state(checkpoint), run_folder(checkpoint)
    name = average_name(state, average)
    folder = home if name == average_name(state) else home / name
    if output is not None and Path(output).resolve() != home.resolve():
        kind = "expected a new or empty folder, or that of an earlier export"
        require(config, "output", _takes_exports(Path(output)), kind)
        write_model(checkpoint, name, Path(output), dtype)
        return Path(output), state["step"]
    require(
        config, "dtype", dtype == "float32", "the run's folder keeps float32; expected --output with another folder"
    )
    newest = step_of(checkpoints(home / "checkpoints")[-1])
    if state["step"] != newest:
        raise ValueError(f"--step {state['step']}: the run's folder is for its newest step, {newest}; give --output")
    try:
        with exclusive(home, "run"):
            write_model(checkpoint, name, folder)
    except ValueError as error:
        raise ValueError(f"{error}; --output takes another folder" if "in use" in str(error) else error) from error
    return folder, state["step"]


def _takes_exports(folder: Path) -> bool:
    """Return whether an export would overwrite nothing but an earlier one."""
    if not folder.exists():
        return True
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {"a file"}
    return not names or ("export.json" in names and not names & {"checkpoints", ".lock"})


def _checkpoint(config: ExportConfig) -> Path:
    """Return the checkpoint that is meant; raises a `ValueError` unless it is sound."""
    from hf_ddpm.utils.runs import checkpoints, find_checkpoint, run_folder, step_of, verify_checkpoint

    folder = Path(config.run)
    kept = checkpoints(run_folder(folder) / "checkpoints")
    if config.step is not None:
        steps = {step_of(path): path for path in kept}
        require(config, "step", config.step in steps, f"checkpoints are kept of {', '.join(map(str, steps)) or 'none'}")
        folder = steps[config.step]
    elif not (folder / "state.json").exists():
        newest, _ = find_checkpoint(folder / "checkpoints", "latest")  # which verifies it
        if newest is not None:
            return newest
        require(config, "run", False, "it holds no checkpoint")
    damage = verify_checkpoint(folder)
    if damage is not None:
        raise ValueError(f"checkpoint {str(folder)!r}: {damage}")
    return folder


def write_model(checkpoint: Path, average: str, folder: Path, dtype: str = "float32") -> None:
    """Write the pipeline, its record, the files of the run that are about these weights, and the card."""
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
    is_as_drawn = exported_step(home) == step and (home / "samples.png").exists()
    record = {"step": step, "images": step * state["global_batch_size"], "lengths": lengths_of(state)}
    write_export(pipe, folder, {**record, "hub_ids": state.get("hub_ids", [])}, getattr(torch, dtype))
    if folder.resolve() != home.resolve():
        _copy_records(home, folder, pipe, step)
    drawing = home / "samples.png" if is_as_drawn else home / "samples" / f"step-{step:09d}.png"
    if average != average_name(state) or dtype != "float32" or not drawing.exists():
        (folder / "samples.png").unlink(missing_ok=True)  # of other weights
    elif drawing.resolve() != (folder / "samples.png").resolve():
        shutil.copyfile(drawing, folder / "samples.png")
    write_card(folder, pipe=pipe, model_id=None)


def _copy_records(home: Path, folder: Path, pipe: Any, step: int) -> None:
    """Copy what a card is made from, up to a step, results of these very weights, and the card if a person wrote it."""
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
