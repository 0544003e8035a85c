"""Frechet distance of generated images against the number of steps, for each sampler.

The paper samples in all `T` steps, with either of two fixed variances (Section 3.2); DDIM and later solvers take fewer
steps through the same reverse process.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hf_ddpm.diffusion.gaussian import LEARNED
from hf_ddpm.evaluation.results import RealFeatures
from hf_ddpm.paper.context import FigureContext, captioned, table, what_was_compared, with_error
from hf_ddpm.paper.options import StepsOptions
from hf_ddpm.sampling.options import Sampling
from hf_ddpm.sampling.samplers import find_scheduler
from hf_ddpm.schedulers.scheduling_ddpm import DDPMScheduler
from hf_ddpm.utils.options import require

# Distances up to this multiple of that in all steps count as equal to it.
TOLERANCE = 1.1

WHY_SMALL = (
    "The two fixed variances are bounds on that of a step (Section 3.2). They agree when steps are many and short; "
    "when they are few and long, fixed_large adds more noise than the remaining steps remove, which is seen as grain. "
    "So sampling in fewer than all steps takes fixed_small, unless `--variance model` keeps the model's own."
)


@dataclass(frozen=True)
class Walk:
    """A way through the reverse process.

    Attributes:
        name: Name in tables.
        sampler: One of `SCHEDULERS`.
        scheduler: Scheduler of the pipeline.
    """

    name: str
    sampler: str
    scheduler: Any


def steps(context: FigureContext, options: StepsOptions) -> None:
    """Measure the distance of each sampler at each number of steps; an interrupted call can be repeated."""
    total = len(context.pipe.scheduler)
    chosen = options.steps or [number for number in (10, 20, 50, 100) if number < total]
    require(options, "steps", max(chosen, default=1) <= total, f"at most the {total} of the process")
    real = context.reference("fd", options.num_images).features()
    rows = []
    for walk in walks(context.pipe.scheduler, options.samplers):
        numbers = {*chosen, total} if walk.sampler == "ddpm" else set(chosen)
        points = [measure(context, real, walk, number) for number in sorted(numbers)]
        rows.append({"sampler": walk.name, "points": points, "fewest": None})
    report(context, options, rows, real.made_by)


def walks(scheduler: Any, others: Sequence[str]) -> list[Walk]:
    """Return the ways through the process of a scheduler: the paper's, first with its own variance, and others."""
    own = DDPMScheduler.from_config(scheduler.config).variance_type
    fixed = ("fixed_small", "fixed_large") if own not in LEARNED else ()
    paper = [
        Walk(f"ddpm, {variance}", "ddpm", DDPMScheduler.from_config(scheduler.config, variance_type=variance))
        for variance in dict.fromkeys((own, *fixed))
    ]
    return [*paper, *(Walk(sampler, sampler, scheduler) for sampler in others)]


def measure(context: FigureContext, real: RealFeatures, walk: Walk, number: int) -> dict[str, Any]:
    """Return the distance of images made in a number of steps, or the reason why there are none."""
    variance = "model" if walk.sampler == "ddpm" else None
    sampling = Sampling(context.options.seed, number, walk.sampler, variance=variance)
    try:
        find_scheduler(context.pipe, sampling.scheduler, sampling.steps(context.pipe))
    except ValueError as error:
        return {"steps": number, "failed": str(error)}
    own, context.pipe.scheduler = context.pipe.scheduler, walk.scheduler
    try:
        images = context.samples(real.count, sampling)
        scheduler = find_scheduler(context.pipe, walk.sampler, number)
        scheduler.set_timesteps(number)
        evaluations = len(scheduler.timesteps)
    finally:
        context.pipe.scheduler = own
    return {"steps": number, "evaluations": evaluations, **context.distance(real, images)}


def report(context: FigureContext, options: StepsOptions, rows: list[dict[str, Any]], made_by: dict[str, Any]) -> None:
    """Write the three files; add to each row the fewest steps that are within 10% of all steps."""
    full = rows[0]["points"][-1]
    for row in rows:
        near = [point["steps"] for point in row["points"] if point.get("value", math.inf) <= TOLERANCE * full["value"]]
        row["fewest"] = min(near, default=None)
    numbers = {"in_all_steps": {"sampler": rows[0]["sampler"], **full}, "rows": rows}
    title = "Distance against the number of steps"
    context.write("steps", title, paragraphs(rows, made_by), numbers, options, made_by)

    curves = {}
    for row in rows:
        points = [point for point in row["points"] if "value" in point]
        curves[row["sampler"]] = [point["steps"] for point in points], [point["value"] for point in points]
    levels = {"held-out images": full["floor"]} if "floor" in full else {}
    drawing = {"log_x": True, "log_y": True, "markers": True, "levels": levels}
    context.plot("steps.png", curves, x_label="steps", y_label="Frechet distance", **drawing)


def paragraphs(rows: list[dict[str, Any]], made_by: dict[str, Any]) -> list[str]:
    """Return the text of the figure, in Markdown."""
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
    return [
        table(["sampler", *columns, "within 10%"], cells),
        f"{what_was_compared(full, made_by)} The last column is the fewest steps within 10% of the "
        f"{full['value']:.4g} of {rows[0]['sampler']} in all {full['steps']} steps: {best['sampler']} needs "
        f"{best['fewest']}. {caution(full)}",
        *([WHY_SMALL] if any("fixed_large" in row["sampler"] for row in rows) else []),
        *(["\n".join(notes)] if notes else []),
        captioned(
            "steps.png",
            "Distance against the number of steps",
            "The distances of the table, both axes logarithmic; a point is left out where a sampler is refused.",
        ),
    ]


def in_words(point: dict[str, Any]) -> str:
    """Return the distance of a point as text."""
    return with_error(point["value"], point.get("standard_error")) if "value" in point else "-"


def caution(full: dict[str, Any]) -> str:
    """Return what the standard error means for the comparison."""
    error = full.get("standard_error")
    if error is None:
        return "Of so few images no error is known: differences may be chance."
    if error > (TOLERANCE - 1) * full["value"]:
        return "With so few images 10% is less than a standard error (after ±): differences may be chance."
    return "After ± are standard errors."
