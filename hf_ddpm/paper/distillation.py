"""Progressive distillation: Frechet distance against the number of steps for teacher and students; samples.

Progressive distillation (Salimans & Ho 2022) repeatedly halves the number of steps of a deterministic sampler.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_ddpm.evaluation.results import RealFeatures
from hf_ddpm.hub.stages import built_in_guidance, stage_folders
from hf_ddpm.images import bytes_to_unit
from hf_ddpm.paper.context import FigureContext, captioned, describe_distance, sheet, table
from hf_ddpm.paper.options import DistillationOptions
from hf_ddpm.paper.steps import as_text, error_note
from hf_ddpm.sampling.folder import SampleFolder
from hf_ddpm.sampling.options import Sampling
from hf_ddpm.utils.files import count_of
from hf_ddpm.utils.options import require

# Samplers of the teacher: its own (with fixed_small for fewer than all steps), and the distilled one.
SAMPLERS = ("ddpm", "ddim")


def distillation(context: FigureContext, options: DistillationOptions) -> None:
    """Measure the students and the samplers of their teacher; call it again after an interruption to resume."""
    folders = stage_folders(Path(options.distilled))
    require(options, "distilled", bool(folders), "an output folder of hf-ddpm distill, with folders such as 8-steps")
    guidance = built_in_guidance(Path(options.distilled))
    learned = guidance[min(guidance)]
    wanted = f"{learned:g}, the scale that {options.distilled} was distilled with"
    require(context.options, "guidance_scale", context.options.guidance_scale == learned, wanted)
    total = len(context.pipe.scheduler)
    chosen = options.steps or [*(number for number in folders if number < total), total]
    require(options, "steps", 1 <= min(chosen) <= max(chosen) <= total, f"1 to {total}, the number of diffusion steps")
    real = context.reference("fd", options.num_images).features()
    rows, samples = [], {}
    for sampler in SAMPLERS:
        points = []
        for number in sorted({*chosen}):
            if sampler == "ddim" and number == total > max(folders):
                continue
            images, point = measure(context, real, context.sampling(number, sampler))
            samples[sampler, number] = images
            points.append(point)
        rows.append({"model": f"teacher, {sampler}", "points": points})
    if ("ddpm", total) not in samples:  # for the picture only: all steps for all images can take hours
        samples["ddpm", total] = context.samples(min(options.shown, real.count), context.sampling(total))
    points = []
    for number, folder in sorted(folders.items()):
        scale = learned if guidance[number] == 1 else 1.0  # a student with built-in guidance needs no more
        own = replace(context.options, model=str(folder), guidance_scale=scale)
        student = FigureContext(own, context.accelerator, context.log)
        images, point = measure(student, real, student.sampling(number))
        samples["student", number] = images
        points.append(point)
    rows.append({"model": "distilled", "points": points})
    draw(context, options, samples, rows)
    report(context, options, rows, real.made_by)


def measure(context: FigureContext, real: RealFeatures, sampling: Sampling) -> tuple[SampleFolder, dict[str, Any]]:
    """Return samples of a model and their distance."""
    images = context.samples(real.count, sampling)
    return images, {"steps": sampling.steps(context.pipe), **context.distance(real, images)}


def draw(
    context: FigureContext,
    options: DistillationOptions,
    samples: dict[tuple[str, int], SampleFolder],
    rows: Sequence[dict[str, Any]],
) -> None:
    """Plot the distances, and draw the first samples of the teacher and each student, one noise per column."""
    curves = {row["model"]: ([p["steps"] for p in row["points"]], [p["value"] for p in row["points"]]) for row in rows}
    context.plot_distances("distillation.png", curves, "steps", rows[0]["points"][0], log_x=True)

    students = sorted((number for model, number in samples if model == "student"), reverse=True)
    total = max(number for model, number in samples if model == "ddpm")
    shown = [("teacher, DDPM", "ddpm", total), *(("distilled", "student", number) for number in students)]
    few = [number for number in students if ("ddim", number) in samples and number <= 4]
    shown = [*shown, *(("teacher, DDIM", "ddim", number) for number in few)]
    indices = torch.arange(min(options.shown, options.num_images))
    pictures: list[tuple[str, Tensor]] = [
        (f"{name}, {number} steps" if number > 1 else f"{name}, 1 step", bytes_to_unit(samples[model, number][indices]))
        for name, model, number in shown
    ]
    labels = context.sampling(total).labels(context.pipe)
    columns = [str(labels[i % len(labels)]) if labels else "" for i in indices.tolist()]
    context.draw("distillation-samples.png", sheet(pictures, columns))


def report(
    context: FigureContext, options: DistillationOptions, rows: Sequence[dict[str, Any]], made_by: dict[str, Any]
) -> None:
    """Write the numbers and the text."""
    columns = sorted({point["steps"] for row in rows for point in row["points"]}, reverse=True)
    cells = []
    for row in rows:
        points = {point["steps"]: point for point in row["points"]}
        cells.append([row["model"], *(as_text(points[number]) if number in points else "" for number in columns)])
    teacher = min((point for row in rows[:-1] for point in row["points"]), key=lambda point: point["value"])
    factors = {point["steps"]: point["value"] / teacher["value"] for point in rows[-1]["points"]}
    fewest = min((steps for steps, factor in factors.items() if factor <= options.within), default=None)
    reached = "no number of steps" if fewest is None else count_of(fewest, "step")
    paragraphs = [
        table(["", *columns], cells),
        f"{describe_distance(teacher, made_by)} The best distance of the teacher is {teacher['value']:.4g}, with "
        f"{teacher['steps']} steps. The distilled model reaches at most {options.within:g} times this distance with "
        f"{reached}. {error_note(teacher)}",
        captioned(
            "distillation.png",
            "Distance against the number of steps",
            "Frechet distance against the number of steps, as in the table.",
        ),
        captioned(
            "distillation-samples.png",
            "Samples from the same noise",
            "Samples of the teacher, with new noise in each step, and of each stage. All images of a column start from "
            "the same noise. Each stage learns to replace two steps of the stage above by one, so its samples should "
            "look like the row above.",
        ),
    ]
    numbers = {
        "best_of_teacher": teacher,
        "ratios": {str(steps): factor for steps, factor in factors.items()},
        "rows": rows,
    }
    context.write("distillation", "Progressive distillation", paragraphs, numbers, options, made_by)
