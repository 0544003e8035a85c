"""Rows, table and curves of the report."""

from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.measure import Rates, Workload
from hf_ddpm.models.precision import PRECISION_NAMES
from hf_ddpm.provenance import provenance
from hf_ddpm.utils.files import write_text
from hf_ddpm.utils.jsonl import to_json
from hf_ddpm.utils.plots import save_curves

Row = dict[str, Any]

PACKAGES = ("accelerate", "datasets", "denoising-diffusion-pytorch", "torchvision")

# A machine counts as idle up to this many cores kept busy by other processes, and up to this spread of the rounds.
IDLE_OTHERS, IDLE_SPREAD = 0.1, 0.1

HEAD = (
    "task", "subject", "precision", "median", "least to most", "images/s", "time / ours", "GFLOP/s", "of matmul",
    "of convolution", "first run", "memory",
)  # fmt: skip


def to_row(task: str, work: Workload, ours: Workload | None, rates: Rates) -> Row:
    """Return the row of a workload.

    Args:
        task: The task.
        work: The timed workload.
        ours: The workload of this package, unless it failed.
        rates: Rates of the device.

    Returns:
        The row. `beside_ours` is the time per image divided by ours in the same round, as the median over the rounds:
        2 means half as fast.
    """
    if work.error is not None:
        return {"task": task, "subject": work.subject, "error": work.error}
    middle = median(work.seconds)
    seconds = {"median": middle, "least": min(work.seconds), "most": max(work.seconds), "rounds": work.seconds}
    ratios: list[float] = []
    if ours is not None:
        share = (ours.images or 1) / (work.images or 1)
        ratios = [mine / other * share for mine, other in zip(work.seconds, ours.seconds, strict=True)]
    flops = work.flops / middle if work.flops is not None else None
    return {
        "task": task,
        "subject": work.subject,
        "error": None,
        "precision": work.precision,
        "unit": work.unit,
        "images": work.images,
        "seconds": seconds,
        "images_per_second": work.images / middle if work.images else None,
        "beside_ours": median(ratios) if ratios else None,
        "beside_ours_least": min(ratios, default=None),
        "beside_ours_most": max(ratios, default=None),
        "flops_per_second": flops,
        "parameters": work.parameters,
        "first_run_seconds": work.first,
        "memory_bytes": None,
        "profile": work.profile,
        "notes": list(work.notes),
    } | {f"of_{name}": flops / rate for name, rate in rates.items() if flops is not None}


def summary(rows: Sequence[Row]) -> str:
    """Return the rows of a task in one line."""
    parts = (
        f"{row['subject']} {_duration(row['seconds']['median'])} ({_known(row['beside_ours'], '{:.2f}') or 'alone'})"
        if row["error"] is None
        else f"{row['subject']} failed"
        for row in rows
    )
    return f"{rows[0]['task']}: {', '.join(parts)}" if rows else "no contender"


def made_by(device: torch.device) -> dict[str, Any]:
    """Return versions, revision, device, date and number of threads."""
    made = provenance(device)
    made["versions"] |= {name: _version(name) for name in PACKAGES}
    return made | {"threads": torch.get_num_threads()}


def write_report(path: Path, report: Mapping[str, Any]) -> str:
    """Write a report as JSON and as a Markdown table, and with `--growth` a curve per task; return the table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = markdown(report)
    for file, content in ((path, to_json(report, indent=2) + "\n"), (path.with_suffix(".md"), text)):
        write_text(file, content)
    growth = report["options"]["growth"]
    if growth != "none":
        for task in dict.fromkeys(row["task"] for row in report["rows"]):
            curves = _curves(row for row in report["rows"] if row["task"] == task and row["error"] is None)
            labels = {"x_label": growth, "y_label": f"{task}: images/s"}
            if curves:
                picture = path.with_name(f"{path.stem}_{task}.png")
                save_curves(picture, curves, **labels, log_x=True, log_y=True, markers=True)
    return text


def markdown(report: Mapping[str, Any]) -> str:
    """Return a report as a Markdown table with notes."""
    made, rows, growth = report["made_by"], report["rows"], report["options"]["growth"]
    versions = ", ".join(f"{name} {number or 'not installed'}" for name, number in made["versions"].items())
    left_out = {"precision"} if len({row.get("precision") for row in rows} - {None}) < 2 else set()
    columns = [name for name in HEAD if name not in left_out]
    head = columns if growth == "none" else [growth, *columns]
    ruler = ["---" if name in ("task", "subject", "precision") else "---:" for name in head]
    lines = [f"| {' | '.join(line)} |" for line in (head, ruler, *(_cells(row, growth, columns) for row in rows))]
    return "\n".join(
        [
            f"# Speed on {made['device']}",
            "",
            f"{made['date']}, revision {made['revision']}; {versions}. {_hardware(made)}",
            "",
            f"{report['about']} {_precisions(report)}{_alone(report)}Times are per step, pass or chain; "
            '"time / ours" is the time per image divided by ours: the median over the rounds, and (least to most); '
            '"first run" is the time from building the workload to the end of its first run (for training: its first '
            "turn), including compilation, which later tasks reuse.",
            "",
            *lines,
            "",
            *dict.fromkeys(_remarks(report)),
            "",
            *_profiles(rows),
        ]
    )


def _hardware(made: Mapping[str, Any]) -> str:
    """Return a sentence about the CPU, the GPU's driver and its clocks."""
    cpu, gpu = made.get("cpu", {}), made.get("gpu", {})
    parts = [f"CPU {cpu['name']} ({', '.join(cpu['flags'])})"] if cpu.get("name") else []
    parts += [", ".join(f"{name} {value}" for name, value in gpu.items())] if gpu else []
    return f"{'; '.join(parts)}." if parts else ""


def _precisions(report: Mapping[str, Any]) -> str:
    """Return a sentence about the precision of each contender, and the choice of `auto`."""
    used: dict[str, dict[str, None]] = {}
    for row in report["rows"]:
        if row.get("precision"):
            used.setdefault(row["subject"].partition(",")[0], {})[PRECISION_NAMES[row["precision"]]] = None
    if len({tuple(names) for names in used.values()}) == 1:
        used = {"all contenders": next(iter(used.values()))}
    parts = [f"{subject} in {' and '.join(names)}" for subject, names in used.items()]
    choices = "".join(f" (auto: {line})" for line in report["precision_choices"])
    return f"Precision: {'; '.join([parts[0] + choices, *parts[1:]])}. " if parts else ""


def _alone(report: Mapping[str, Any]) -> str:
    """Return a sentence about the rates of the device."""
    parts = "; ".join(
        f"{rates['matmul'] / 1e9:.4g} GFLOP/s and {rates['convolution'] / 1e9:.4g} in {PRECISION_NAMES[name]}"
        for name, rates in report["rates"].items()
    )
    return f"On their own, a large matrix product and a large 3x3 convolution reach {parts}. " if parts else ""


def _profiles(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the tables of the profiles."""
    for row in rows:
        profile = row.get("profile")
        if profile is None:
            continue
        counts = ", ".join(f"{count:,.4g} {what}" for what, count in profile["per_step"].items())
        yield f"## {row['subject']}, {row['task']}: {counts} per step; trace in {profile['trace']}"
        yield from ("", "| longest | calls | time | share |", "| --- | ---: | ---: | ---: |")
        for entry in profile["longest"]:
            name = entry["name"].replace("|", "/")[:80]
            yield f"| {name} | {entry['calls']} | {_duration(entry['seconds'])} | {entry['share']:.0%} |"
        yield ""


def _remarks(report: Mapping[str, Any]) -> Iterator[str]:
    for check in report["equality"]:
        yield from _differences(check)
    tasks: dict[str, dict[str, None]] = {}
    for row in report["rows"]:
        if row.get("parameters"):
            yield f"- {row['subject']}: {row['parameters']:,} parameters."
        if row.get("memory_error"):
            yield f"- {row['subject']}, {row['task']}: memory is unknown: {row['memory_error']}."
        for note in row.get("notes", ()):
            tasks.setdefault(f"{row['subject']}: {note}", {})[row["task"]] = None
    yield from (f"- {note} ({', '.join(where)})." for note, where in tasks.items())
    compiled = report["options"]["config"]["compile"]
    yield f"- Memory: {report['memory']}{'; not measured for compiled networks' if compiled else ''}."
    yield from _disturbances(report)
    if report["made_by"]["versions"]["torchvision"] is None:
        yield "- torchvision is not installed: its transforms are replaced by the same steps in numpy and PIL."


def _differences(check: Mapping[str, Any]) -> Iterator[str]:
    """Yield notes about the differences of outputs measured before timing."""
    plain = [f"{name} by {entry['difference']:.2g}" for name, entry in check["outputs"].items() if "timed" not in name]
    timed = [f"{name} by {entry['difference']:.2g}" for name, entry in check["outputs"].items() if "timed" in name]
    if plain:
        yield (
            f"- Before timing, {check['subject']} differed from ours with the same weights, both in float32 and not "
            f"compiled: {', '.join(plain)}."
        )
    if timed:
        yield (
            f"- Before timing, {check['subject']} differed from itself in float32 and not compiled (relative error): "
            f"{', '.join(timed)}."
        )


def _disturbances(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield notes if the machine was not idle: load of other processes, or rounds that differ."""
    busy = [(row["busy_others"], row["task"]) for row in report["rows"] if row.get("busy_others") is not None]
    most, task = max(busy, default=(0, None))
    if most > IDLE_OTHERS:
        yield f"- The machine was not idle: other processes kept {most:.2g} of its cores busy during {task}."
    spreads = [
        (row["seconds"]["most"] / row["seconds"]["least"] - 1, row) for row in report["rows"] if row["error"] is None
    ]
    largest, row = max(spreads, key=lambda spread: spread[0], default=(0, None))
    if row is not None and largest > IDLE_SPREAD:
        yield f"- The machine was not idle: rounds of {row['subject']}, {row['task']}, differ by {largest:.0%}."


def _cells(row: Row, growth: str, columns: Sequence[str]) -> list[str]:
    first = [] if growth == "none" else [str(row["at"])]
    if row["error"] is not None:
        return [*first, row["task"], row["subject"], row["error"].replace("|", "/"), *[""] * (len(columns) - 3)]
    seconds = row["seconds"]
    cells = {
        "task": row["task"],
        "subject": row["subject"],
        "precision": PRECISION_NAMES.get(row.get("precision"), ""),
        "median": _duration(seconds["median"]),
        "least to most": f"{_duration(seconds['least'])} to {_duration(seconds['most'])}",
        "images/s": _known(row["images_per_second"], "{:.4g}"),
        "time / ours": _ratio(row),
        "GFLOP/s": _known(row["flops_per_second"], "{:.4g}", 1e-9),
        "of matmul": _known(row.get("of_matmul"), "{:.0%}"),
        "of convolution": _known(row.get("of_convolution"), "{:.0%}"),
        "first run": _duration(row["first_run_seconds"]),
        "memory": _known(row["memory_bytes"], "{:,.0f} MiB", 2**-20),
    }
    return [*first, *(cells[name] for name in columns)]


def _ratio(row: Row) -> str:
    """Return the time divided by ours, with the minimum and maximum of the rounds; 1 for ours."""
    if row["beside_ours"] is None or row["beside_ours_least"] == row["beside_ours_most"]:
        return _known(row["beside_ours"], "{:.2f}")
    return f"{row['beside_ours']:.2f} ({row['beside_ours_least']:.2f} to {row['beside_ours_most']:.2f})"


def _known(value: float | None, spec: str, scale: float = 1) -> str:
    return "" if value is None else spec.format(value * scale)


def _duration(seconds: float) -> str:
    scale, unit = (1, "s") if seconds >= 1 else (1e3, "ms") if seconds >= 1e-3 else (1e6, "us")
    return f"{seconds * scale:.4g} {unit}"


def _curves(rows: Iterator[Row]) -> dict[str, tuple[list[float], list[float]]]:
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        if row["images_per_second"] is None:
            continue
        x, y = curves.setdefault(row["subject"], ([], []))
        x.append(row["at"])
        y.append(row["images_per_second"])
    return curves


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
