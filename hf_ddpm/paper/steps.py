"""How many steps does a model need? The Frechet distance of its images against their number, for each sampler.

The paper samples in all `T` steps, with either of two fixed variances (Section 3.2); DDIM and the solvers after it walk
the same reverse process in fewer.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hf_ddpm.diffusion.gaussian import LEARNED
from hf_ddpm.paper.study import Study, table, with_error
from hf_ddpm.paper.yardstick import DistanceToReference, what_was_compared
from hf_ddpm.sampling.options import Sampling
from hf_ddpm.sampling.samplers import SCHEDULERS, find_scheduler
from hf_ddpm.schedulers.scheduling_ddpm import DDPMScheduler
from hf_ddpm.utils.options import option, require, require_at_least, require_distinct

# How much farther than in all steps still counts as being there.
TOLERANCE = 1.1

OTHERS = [name for name in SCHEDULERS if name != "ddpm"]


@dataclass
class StepsConfig:
    """Distance to real images against the number of steps, for each sampler."""

    steps: list[int] = option(
        "numbers of steps, 10, 20, 50 and 100 by default; the process of the paper takes all of them, too",
        factory=list,
    )
    samplers: list[str] = option(f"beside the paper's, any of {', '.join(OTHERS)}", factory=lambda: list(OTHERS))
    num_images: int = option("images for each distance, at least 2", 100)

    def __post_init__(self) -> None:
        """Checks the values."""
        require(self, "steps", min(self.steps, default=1) >= 1, "at least 1")
        require(self, "samplers", set(self.samplers) <= set(OTHERS), f"any of {', '.join(OTHERS)}")
        require_distinct(self, "samplers")
        require_at_least(self, 2, "num_images")


@dataclass(frozen=True)
class Walk:
    """A way through the reverse process.

    Attributes:
        name: What it is called in tables.
        sampler: One of `SCHEDULERS`.
        scheduler: The scheduler of the pipeline that it is of.
    """

    name: str
    sampler: str
    scheduler: Any


def steps(study: Study, options: StepsConfig) -> None:
    """Measures, and writes `steps.json`, `steps.md` and `steps.png`; the same call goes on after an interruption.

    Args:
        study: The model and its data.
        options: What to measure.

    Raises:
        ValueError: If there are no data, or an argument is not allowed.
    """
    total = len(study.pipe.scheduler)
    asked = options.steps or [number for number in (10, 20, 50, 100) if number < total]
    require(options, "steps", max(asked, default=1) <= total, f"at most the {total} of the process")
    yardstick = DistanceToReference(study.evaluator("fd", options.num_images))
    rows = []
    for walk in walks(study.pipe.scheduler, options.samplers):
        numbers = {*asked, total} if walk.sampler == "ddpm" else set(asked)
        points = [measure(study, yardstick, walk, number) for number in sorted(numbers)]
        rows.append({"sampler": walk.name, "points": points, "fewest": None})
    report(study, options, rows, yardstick.made_by)


def walks(scheduler: Any, others: Sequence[str]) -> list[Walk]:
    """Returns the ways through the process of a scheduler: the paper's, first with its own variance, and others."""
    own = DDPMScheduler.from_config(scheduler.config).variance_type
    fixed = ("fixed_small", "fixed_large") if own not in LEARNED else ()
    paper = [
        Walk(f"ddpm, {variance}", "ddpm", DDPMScheduler.from_config(scheduler.config, variance_type=variance))
        for variance in dict.fromkeys((own, *fixed))
    ]
    return [*paper, *(Walk(sampler, sampler, scheduler) for sampler in others)]


def measure(study: Study, yardstick: DistanceToReference, walk: Walk, number: int) -> dict[str, Any]:
    """Returns the distance of images made in so many steps, or why there are none."""
    sampling = Sampling(seed=study.subject.seed, num_inference_steps=number, scheduler=walk.sampler)
    try:
        find_scheduler(study.pipe, sampling.scheduler, sampling.steps(study.pipe))
    except ValueError as error:
        return {"steps": number, "failed": str(error)}
    own, study.pipe.scheduler = study.pipe.scheduler, walk.scheduler
    try:
        images = study.samples(yardstick.count, sampling)
        scheduler = find_scheduler(study.pipe, walk.sampler, number)
        scheduler.set_timesteps(number)
        evaluations = len(scheduler.timesteps)
    finally:
        study.pipe.scheduler = own
    return {"steps": number, "evaluations": evaluations, **yardstick(images)}


def report(study: Study, options: StepsConfig, rows: list[dict[str, Any]], made_by: dict[str, Any]) -> None:
    """Writes the three files; each row gets the fewest steps that are within 10% of all steps."""
    full = rows[0]["points"][-1]
    for row in rows:
        near = [point["steps"] for point in row["points"] if point.get("value", math.inf) <= TOLERANCE * full["value"]]
        row["fewest"] = min(near, default=None)
    in_all_steps = {"sampler": rows[0]["sampler"], **full}
    figures = {"in_all_steps": in_all_steps, "rows": rows}
    study.write("steps", "Distance against the number of steps", text(rows, made_by), figures, asdict(options), made_by)

    measured = {row["sampler"]: [point for point in row["points"] if "value" in point] for row in rows}
    curves = {
        name: ([point["steps"] for point in points], [point["value"] for point in points])
        for name, points in measured.items()
    }
    if "floor" in full:
        curves["held-out images"] = ([rows[0]["points"][0]["steps"], full["steps"]], [full["floor"]] * 2)
    logarithmic = {"log_x": True, "log_y": True, "markers": True}
    study.plot("steps.png", curves, x_label="steps", y_label="Frechet distance", **logarithmic)


def text(rows: list[dict[str, Any]], made_by: dict[str, Any]) -> str:
    """Returns what was found, in Markdown."""
    columns = sorted({point["steps"] for row in rows for point in row["points"]})
    cells, notes = [], []
    for row in rows:
        points = {point["steps"]: point for point in row["points"]}
        shown = [in_words(points[number]) if number in points else "" for number in columns]
        cells.append([row["sampler"], *shown, row["fewest"] or "-"])
        notes += [f"- {row['sampler']}, {n} steps: {p['failed']}" for n, p in points.items() if "failed" in p]
        more = max((point.get("evaluations", 0) - number for number, point in points.items()), default=0)
        notes += [f"- {row['sampler']} evaluates the network {more} times more than it takes steps"] if more > 0 else []
    full = rows[0]["points"][-1]
    best = min((row for row in rows if row["fewest"]), key=lambda row: row["fewest"])
    return "\n\n".join(
        [
            table(["sampler", *columns, "within 10%"], cells),
            f"{what_was_compared(full, made_by)} The last column is the fewest steps within 10% of the "
            f"{full['value']:.4g} of {rows[0]['sampler']} in all {full['steps']} steps: {best['sampler']} needs "
            f"{best['fewest']}. {caution(full)}",
            *(["\n".join(notes)] if notes else []),
            "![Distance against the number of steps](steps.png)",
        ]
    )


def in_words(point: dict[str, Any]) -> str:
    """Returns the distance of a point as text."""
    return with_error(point["value"], point.get("standard_error")) if "value" in point else "-"


def caution(full: dict[str, Any]) -> str:
    """Returns what the errors mean for the comparison."""
    error = full.get("standard_error")
    if error is None:
        return "Of so few images no error is known: differences may be chance."
    if error > (TOLERANCE - 1) * full["value"]:
        return "With so few images 10% is less than a standard error (after ±): differences may be chance."
    return "After ± are standard errors."
