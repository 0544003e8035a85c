"""Export the model of a run at one of its checkpoints, as a pipeline with its card.

    hf-ddpm export runs/digits
    hf-ddpm export runs/digits --step 5000 --average 0.999 --output models/digits-5000

The pipeline is in the format of diffusers, of averaged weights; without --output it goes into the run's folder. A run
that is still going on is exported with --output.
"""

from dataclasses import dataclass
from pathlib import Path

from hf_ddpm.utils.launch import exclusive
from hf_ddpm.utils.options import option, parse_options, require, require_at_least


@dataclass
class ExportConfig:
    """Export: the run, the checkpoint, the average, the folder."""

    run: str = option("folder of a run, or of one of its checkpoints", is_first=True)
    step: int | None = option("step of the checkpoint; the newest by default", None)
    average: str | None = option("average of the weights, by its decay; the run's first by default", None)
    output: str | None = option("folder of the pipeline; that of the run by default", None)

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
    run: Path | str, step: int | None = None, average: str | None = None, output: Path | str | None = None
) -> tuple[Path, int]:
    """Export the model of a run at one of its checkpoints: `hf-ddpm export` in Python.

    Args:
        run: Folder of a run, or of one of its checkpoints.
        step: Step of the checkpoint; the newest sound one by default.
        average: Which average of the weights, by its decay; the first of the run by default.
        output: Folder of the pipeline; by default that of the run, and below it for further averages.

    Returns:
        The folder and the step.

    Raises:
        ValueError: If there is no such checkpoint or average, it is damaged, or the run is in use and has no `output`.
        OSError: If a file cannot be written.
    """
    from hf_ddpm.pipelines.runs import average_name  # takes seconds
    from hf_ddpm.utils.runs import read_state, run_folder

    config = ExportConfig(str(run), step, average, None if output is None else str(output))
    checkpoint = _checkpoint(config)
    state, home = read_state(checkpoint), run_folder(checkpoint)
    name = average_name(state, average)
    if output is not None:
        _write(checkpoint, name, Path(output))
        return Path(output), state["step"]
    folder = home if name == average_name(state) else home / name
    try:
        with exclusive(home, "run"):
            _write(checkpoint, name, folder)
    except ValueError as error:
        raise ValueError(f"{error}; --output takes another folder" if "in use" in str(error) else error) from error
    return folder, state["step"]


def _checkpoint(config: ExportConfig) -> Path:
    """Return the checkpoint that is meant; raises a `ValueError` unless it is sound."""
    from hf_ddpm.utils.runs import checkpoints, find_checkpoint, run_folder, step_of, verify_checkpoint

    folder = Path(config.run)
    kept = checkpoints(run_folder(folder) / "checkpoints")
    if config.step is not None:
        steps = {step_of(path): path for path in kept}
        require(config, "step", config.step in steps, f"checkpoints are kept of {', '.join(map(str, steps)) or 'none'}")
        folder = steps[config.step]
    elif (folder / "state.json").exists():
        pass
    else:
        newest, _ = find_checkpoint(folder / "checkpoints", "latest")
        require(config, "run", newest is not None, "it holds no checkpoint")
        folder = newest or folder
    damage = verify_checkpoint(folder)
    if damage is not None:
        raise ValueError(f"checkpoint {str(folder)!r}: {damage}")
    return folder


def _write(checkpoint: Path, average: str, folder: Path) -> None:
    """Write the pipeline, its record, the files of the run that its card is made from, and the card."""
    import shutil

    from hf_ddpm import DDPMPipeline
    from hf_ddpm.hub.card import write_card
    from hf_ddpm.pipelines.runs import stock_folder, write_export
    from hf_ddpm.utils.files import make_folder
    from hf_ddpm.utils.jsonl import cut_lines
    from hf_ddpm.utils.runs import lengths_of, read_state, run_folder

    state, home = read_state(checkpoint), run_folder(checkpoint)
    step = state["step"]
    with stock_folder(checkpoint, average) as stock:
        pipe = DDPMPipeline.from_pretrained(stock)
    make_folder(folder, "output")
    record = {"step": step, "images": step * state["global_batch_size"], "lengths": lengths_of(state)}
    write_export(pipe, folder, {**record, "hub_ids": state.get("hub_ids", [])})
    if folder.resolve() != home.resolve():
        for name in ("config.yaml", "metrics.jsonl", "status.json"):
            if (home / name).exists():
                shutil.copyfile(home / name, folder / name)
        cut_lines(folder / "metrics.jsonl", step)
    (folder / "samples.png").unlink(missing_ok=True)  # of another step
    write_card(folder, pipe=pipe, model_id=None)
