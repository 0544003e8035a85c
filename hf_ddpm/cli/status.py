"""Show the progress of a run: step, speed, time left, last losses, and whether its process is alive.

    hf-ddpm status runs/digits

If its process ended before the run was finished, the run was killed. Repeat its command to resume.
"""

import json
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from hf_ddpm.utils.files import one_line
from hf_ddpm.utils.jsonl import read_lines
from hf_ddpm.utils.launch import exclusive
from hf_ddpm.utils.options import option, parse_options, require
from hf_ddpm.utils.runs import checkpoints, run_folder, step_of

LOSSES = 5


@dataclass
class StatusConfig:
    """Status: the run."""

    run: str = option("folder of a run or of one of its checkpoints", is_first=True)

    def __post_init__(self) -> None:
        """Check the values."""
        self.run = str(run_folder(self.run))
        files = [Path(self.run) / name for name in ("status.json", ".lock")]  # an export has status.json, but no .lock
        require(self, "run", all(file.is_file() for file in files), "the folder of a run")


def main(argv: list[str]) -> int:
    """Run the command line; return the exit code."""
    (config,) = parse_options(argv, StatusConfig, doc=__doc__)
    for name, value in describe(Path(config.run)).items():
        print(f"{name + ':':13}{value}")
    return 0


def describe(folder: Path) -> dict[str, str]:
    """Return lines about a run, by name; raise a `ValueError` if its status cannot be read."""
    status = read_status(folder / "status.json")
    step, steps = status["step"], status.get("max_train_steps")
    rate, left = status.get("images_per_second"), status.get("seconds_left")
    is_running = is_alive(folder)
    metrics = [line for line in read_lines(folder / "metrics.jsonl") if type(line.get("step")) is int]
    losses = [line for line in metrics if isinstance(line.get("loss"), float)][-LOSSES:]
    kept = [f"{step_of(path):,}" for path in checkpoints(folder / "checkpoints")]
    lines = {
        "status": describe_state(status, is_running),
        "step": f"{step:,}" + (f" of {steps:,} ({step / steps:.0%})" if steps else ""),
        "speed": f"{rate:,.1f} images/s" if rate else "",
        "time left": str(timedelta(seconds=round(left))) if left and is_running else "",
        "last losses": ", ".join(f"{line['loss']:.4g} (step {line['step']:,})" for line in losses),
        "checkpoints": ", ".join(kept) or "none yet",
    }
    return {name: line for name, line in lines.items() if line}


def describe_state(status: dict[str, Any], is_running: bool) -> str:
    """Return the state of a run in words, from its status file and whether its process is alive."""
    state = status["status"]
    if is_running:
        return state if state == "running" else "running (restarted)"
    if state == "running":
        return "killed: the process ended before the run; repeat the command to resume"
    if state == "preempted":
        return "stopped by a signal; repeat the command to resume"
    return f"failed: {one_line(status['error'])}" if "error" in status else state


def is_alive(folder: Path) -> bool:
    """Return whether a process has locked the folder of a run."""
    if not (folder / ".lock").exists():
        return False
    try:
        with exclusive(folder, "run"):
            return False
    except ValueError:
        return True
    except OSError:  # no permission to lock
        return False


def read_status(path: Path) -> dict[str, Any]:
    """Return the contents of `status.json`; raise a `ValueError` of one line if the file is damaged."""
    try:
        status = json.loads(path.read_text(encoding="utf-8"))
        if not (isinstance(status, dict) and isinstance(status.get("status"), str) and type(status["step"]) is int):
            raise ValueError("status or step is missing")
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read: {one_line(error)}") from error
    return status
