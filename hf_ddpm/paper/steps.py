"""Frechet distance of samples against the number of sampling steps, for each sampler.

The paper samples with all `T` steps and one of two fixed variances (Section 3.2). DDIM and later solvers need fewer
steps.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hf_ddpm.diffusion.gaussian import LEARNED
from hf_ddpm.evaluation.results import RealFeatures
from hf_ddpm.paper.context import FigureContext, captioned, describe_distance, table, with_error
from hf_ddpm.paper.options import StepsOptions
from hf_ddpm.sampling.samplers import find_scheduler
from hf_ddpm.schedulers.scheduling_ddpm import DDPMScheduler
from hf_ddpm.utils.options import require

# Distances up to this multiple of the distance of DDPM with the most steps are considered equal to it.
TOLERANCE = 1.1

WHY_SMALL = (
    "The two fixed variances are bounds of the true variance of a step (Section 3.2). With many short steps they are "
    "nearly equal. With few long steps, fixed_large adds more noise than the remaining steps remove, which is visible "
    "as grain. Sampling with fewer than all steps therefore uses fixed_small by default; `--variance model` keeps the "
    "variance of the model."
)


@dataclass(frozen=True)
class SamplerVariant:
    """A sampler with its settings.

    Attributes:
        name: Name in tables.
        sampler: One of `SCHEDULERS`.
        scheduler: Scheduler of the pipeline.
    """

    name: str
    sampler: str
    scheduler: Any


def steps(context: FigureContext, options: StepsOptions) -> None:
    """Measure the distance of each sampler for each number of steps; call it again after an interruption to resume."""
    total = len(context.pipe.scheduler)
    chosen = options.steps or [number for number in (10, 20, 50, 100) if number < total]
    require(options, "steps", max(chosen, default=1) <= total, f"at most {total}, the number of diffusion steps")
    real = context.reference("fd", options.num_images).features()
    rows = []
    for variant in sampler_variants(context.pipe.scheduler, options.samplers):
        numbers = {*chosen, total} if options.all_steps and variant.sampler == "ddpm" else set(chosen)
        points = [measure(context, real, variant, number) for number in sorted(numbers)]
        rows.append({"sampler": variant.name, "points": points, "fewest": None})
    report(context, options, rows, real.made_by)


def sampler_variants(scheduler: Any, others: Sequence[str]) -> list[SamplerVariant]:
    """Return DDPM with the scheduler's own variance, DDPM with the fixed variances, then the other samplers."""
    own = DDPMScheduler.from_config(scheduler.config).variance_type
    fixed = ("fixed_small", "fixed_large") if own not in LEARNED else ()
    paper = [
        SamplerVariant(f"ddpm, {variance}", "ddpm", DDPMScheduler.from_config(scheduler.config, variance_type=variance))
        for variance in dict.fromkeys((own, *fixed))
    ]
    return [*paper, *(SamplerVariant(sampler, sampler, scheduler) for sampler in others)]


def measure(context: FigureContext, real: RealFeatures, variant: SamplerVariant, number: int) -> dict[str, Any]:
    """Return the distance of samples with a number of steps, or the error if the sampler does not support it."""
    variance = "model" if variant.sampler == "ddpm" else None
    sampling = context.sampling(number, variant.sampler, variance)
    try:
        find_scheduler(context.pipe, sampling.scheduler, sampling.steps(context.pipe))
    except ValueError as error:
        return {"steps": number, "failed": str(error)}
    own, context.pipe.scheduler = context.pipe.scheduler, variant.scheduler
    try:
        images = context.samples(real.count, sampling)
        scheduler = find_scheduler(context.pipe, variant.sampler, number)
        scheduler.set_timesteps(number)
        evaluations = len(scheduler.timesteps)
    finally:
        context.pipe.scheduler = own
    return {"steps": number, "evaluations": evaluations, **context.distance(real, images)}


def report(context: FigureContext, options: StepsOptions, rows: list[dict[str, Any]], made_by: dict[str, Any]) -> None:
    """Write the three files; add to each row the smallest number of steps within 10% of DDPM with the most steps."""
    full = rows[0]["points"][-1]
    for row in rows:
        near = [point["steps"] for point in row["points"] if point.get("value", math.inf) <= TOLERANCE * full["value"]]
        row["fewest"] = min(near, default=None)
    most = {"in_all_steps": {"sampler": rows[0]["sampler"], **full}} if options.all_steps else {}
    numbers = {**most, "rows": rows}
    title = "Distance against the number of steps"
    context.write("steps", title, paragraphs(rows, made_by), numbers, options, made_by)

    curves = {}
    for row in rows:
        points = [point for point in row["points"] if "value" in point]
        curves[row["sampler"]] = [point["steps"] for point in points], [point["value"] for point in points]
    context.plot_distances("steps.png", curves, "steps", full, log_x=True)


def paragraphs(rows: list[dict[str, Any]], made_by: dict[str, Any]) -> list[str]:
    """Return the text of the figure, in Markdown."""
    columns = sorted({point["steps"] for row in rows for point in row["points"]})
    cells, notes = [], []
    for row in rows:
        points = {point["steps"]: point for point in row["points"]}
        shown = [as_text(points[number]) if number in points else "" for number in columns]
        cells.append([row["sampler"], *shown, row["fewest"] or "-"])
        notes += [f"- {row['sampler']}, {n} steps: {p['failed']}" for n, p in points.items() if "failed" in p]
        extra = max((point.get("evaluations", 0) - number for number, point in points.items()), default=0)
        notes += [f"- {row['sampler']} needs {extra} more network evaluations than steps"] if extra > 0 else []
    full = rows[0]["points"][-1]
    fewest = min(row["fewest"] for row in rows if row["fewest"])
    best = ", ".join(row["sampler"] for row in rows if row["fewest"] == fewest)
    return [
        table(["sampler", *columns, "within 10%"], cells),
        f"{describe_distance(full, made_by)} Last column: the smallest number of steps whose distance is within 10% of "
        f"{full['value']:.4g}, the distance of {rows[0]['sampler']} in {full['steps']} steps. "
        f"The fewest are {fewest}, with {best}. {error_note(full)}",
        *([WHY_SMALL] if any("fixed_large" in row["sampler"] for row in rows) else []),
        *(["\n".join(notes)] if notes else []),
        captioned(
            "steps.png",
            "Distance against the number of steps",
            "Frechet distance against the number of steps, as in the table; both axes are logarithmic. Numbers of "
            "steps that a sampler does not support are left out.",
        ),
    ]


def as_text(point: dict[str, Any]) -> str:
    """Return the distance of a point as text."""
    return with_error(point["value"], point.get("standard_error")) if "value" in point else "-"


def error_note(full: dict[str, Any]) -> str:
    """Return a sentence about the standard errors of a comparison."""
    error = full.get("standard_error")
    if error is None:
        return "With so few images there is no standard error: differences may be random."
    if error > (TOLERANCE - 1) * full["value"]:
        return "Values are given ± standard error. With so few images it exceeds 10%: differences may be random."
    return "Values are given ± standard error."
