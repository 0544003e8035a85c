"""Growth over processes: the same benchmark, launched with one number of them after another."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hf_ddpm.benchmark.options import BenchmarkConfig
from hf_ddpm.benchmark.report import failed, summary


def run_processes(
    script: Path,
    argv: list[str],
    options: BenchmarkConfig,
    counts: list[int],
    tell: Callable[[str], object],
    done: Callable[[str], object],
) -> dict[str, Any]:
    """Launches a script once for each number of processes.

    Args:
        script: The script, which writes a report.
        argv: Its command line.
        options: What that says.
        counts: Numbers of processes.
        tell: Told what is being done.
        done: Told what came of each task.

    Returns:
        The report of the first launch that succeeded, with the rows of all.

    Raises:
        OSError: If none did.
    """
    report, rows = None, []
    for count in counts:
        tell(f"{count} processes")
        with TemporaryDirectory() as folder:
            file = Path(folder) / "report.json"
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
            words = [*argv, "--growth", "none", "--json", str(file)]
            launch = subprocess.run([sys.executable, *launcher, str(script), *words], capture_output=True, text=True)
            if launch.returncode == 0:
                found = json.loads(file.read_text())
                report = report or found
                new = found["rows"]
            else:
                error = _reason(launch.stderr)
                new = [failed(task, "hf_ddpm", error) for task in options.chosen]
        rows += [row | {"at": count} for row in new]
        for task in options.chosen:
            done(summary([row for row in new if row["task"] == task]))
    if report is None:
        raise OSError(f"no launch succeeded: {error}")
    return report | {"options": report["options"] | asdict(options), "rows": rows}


def _reason(said: str) -> str:
    """Returns the line of a launch that says what went wrong."""
    lines = [line for line in said.splitlines() if "error" in line.lower()] or said.splitlines() or ["no word"]
    return lines[0][:300]
