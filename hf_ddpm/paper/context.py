"""Shared parts of all figures: model, data and output folder; tables, image sheets, and output files."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from hf_ddpm.data.sources import choose
from hf_ddpm.evaluation.evaluate import Reference
from hf_ddpm.evaluation.extraction import Images, extract
from hf_ddpm.evaluation.frechet import Moments, standard_error
from hf_ddpm.evaluation.options import EvaluateConfig, default_levels
from hf_ddpm.evaluation.results import METRIC_SEED, RealFeatures, compute_metric
from hf_ddpm.images import grid, save_animation, save_picture, to_bytes, to_pictures, to_signed
from hf_ddpm.paper.options import FigureOptions
from hf_ddpm.pipelines.loading import load_pipeline
from hf_ddpm.provenance import model_checksum, provenance
from hf_ddpm.sampling.folder import SampleFolder
from hf_ddpm.sampling.generate import fill_folder, folder_name, resolve_precision
from hf_ddpm.sampling.options import Sampling
from hf_ddpm.utils.files import write_text
from hf_ddpm.utils.jsonl import to_json
from hf_ddpm.utils.options import require_value
from hf_ddpm.utils.plots import Curve, save_curves
from hf_ddpm.utils.seeds import generator

# Time per frame of an animation.
MILLISECONDS = 80
PARTS = 10  # parts of the jackknife
# Least signal sqrt(alpha-bar_t) at which the image is still visible in x_t.
VISIBLE_SIGNAL = 0.2


class FigureContext:
    """A model, its dataset, and the output folder of its figures.

    Args:
        options: Options shared by all figures.
        accelerator: The accelerator. Every process must create a context and call the functions of this package.
        log: Called with one line of text about unused files of the dataset, and about damaged caches.

    Raises:
        ValueError: If the model cannot be loaded.
    """

    def __init__(
        self, options: FigureOptions, accelerator: Accelerator, log: Callable[[str], object] = lambda line: None
    ):
        self.options, self.accelerator, self.log = options, accelerator, log
        self.folder = Path(options.output)
        self.pipe = load_pipeline(options.model, accelerator.device)
        self.pipe.set_progress_bar_config(desc="Steps", leave=False, disable=not accelerator.is_main_process)
        self._checksum = model_checksum(self.pipe)
        self._precision: str | None = None  # of the samples, once there are any

    @property
    def levels(self) -> int:
        """Number of distinct pixel values of the data."""
        return self.options.levels or default_levels(self.options.dataset)

    def reference(self, metrics: str, num_images: int | None = None) -> Reference:
        """Return the real images for metrics of this model; raise a `ValueError` if images are missing or too few."""
        options = asdict(self.options)
        for name in ("output", "seed", "class_labels", "guidance_scale"):
            del options[name]
        if options["dataset"] is None:
            raise ValueError(f"--dataset is missing: --model {options['model']} contains no config.yaml of a run")
        config = EvaluateConfig(metrics=metrics, num_images=num_images, **options)
        reference = Reference(config, self.pipe.image_shape, self.accelerator, self.log)
        reference.count()
        return reference

    def held_out(self, reference: Reference, count: int) -> Tensor:
        """Return the first held-out images of the metrics as signed images, shape `(count, C, H, W)`."""
        assert reference.held_out is not None
        indices = choose(len(reference.held_out), count, METRIC_SEED)
        return to_signed(reference.held_out[torch.tensor(indices)], self.levels)

    def generator(self, *key: int) -> torch.Generator:
        """Return a new generator for the figure's seed, a purpose and indices, see `hf_ddpm.utils.seeds`."""
        return generator(self.options.seed, *key, device=self.accelerator.device)

    def sampling(self, steps: int, sampler: str = "ddpm", variance: str | None = None) -> Sampling:
        """Return the settings of samples with the figure's seed, classes and guidance."""
        classes, scale = self.options.class_labels, self.options.guidance_scale
        return Sampling(
            self.options.seed, steps, sampler, class_labels=classes, guidance_scale=scale, variance=variance
        )  # type: ignore[arg-type]

    def conditions(self, indices: Iterable[int]) -> dict[str, Any]:
        """Return the arguments `class_labels` and `guidance_scale` of a pipeline's methods for images with indices."""
        labels = self.sampling(1).labels(self.pipe)
        classes = {"class_labels": [labels[i % len(labels)] for i in indices]} if labels else {}
        return classes | {"guidance_scale": self.options.guidance_scale}

    def samples(self, count: int, sampling: Sampling) -> SampleFolder:
        """Return generated images, stored in a folder below `samples/`; existing ones are reused."""
        batch_size = min(self.options.batch_size, count)
        sampling = resolve_precision(self.pipe, sampling, batch_size, self._samples_folder, self.log)
        self._precision = sampling.mixed_precision
        return fill_folder(
            self.pipe,
            self._samples_folder(sampling),
            count,
            sampling,
            model=self.options.model,
            batch_size=batch_size,
            state=self.accelerator,
        )

    def distance(self, real: RealFeatures, images: Images) -> dict[str, Any]:
        """Compute the Frechet distance of the first `real.count` images, as `hf-ddpm evaluate` does.

        Returns:
            A dictionary with `value` and the numbers of images; `floor`, the distance of the same number of held-out
                images, if there are any; and `standard_error` of the value, for at least 3 images and two of
                each class.
        """
        generated = extract(real.extractor, images, range(real.count), self.accelerator)
        distance = compute_metric("fd", generated, real)
        turn = max(1, len(self.options.class_labels))  # each part contains all classes equally often
        count = min(PARTS, real.count // turn)
        if real.count > 2 and count > 1:
            assert real.reference is not None
            part_of = torch.arange(real.count) // turn % count
            parts = [generated.features[part_of == part] for part in range(count)]
            distance["standard_error"] = standard_error(parts, Moments.of(real.reference))
        return distance

    def diffused(self, chosen: Sequence[int]) -> list[int]:
        """Return numbers of diffusion steps (the paper's `t`), ascending: `chosen`, or by default quarters of T."""
        total = len(self.pipe.scheduler)
        require_value("diffused", list(chosen), all(1 <= number <= total for number in chosen), f"1 to {total}")
        return sorted(set(chosen)) or [max(1, round(part * total / 4)) for part in (1, 2, 3, 4)]

    def visible(self, chosen: Sequence[int]) -> list[int]:
        """Return `chosen`, or by default the eighths of T at which the image is still visible in x_t, ascending."""
        signal = self.pipe.scheduler.alphas_cumprod.sqrt()
        eighths = sorted({max(1, round(part * len(signal) / 8)) for part in range(1, 9)})
        default = [t for t in eighths if signal[t - 1] >= VISIBLE_SIGNAL] or eighths[:1]
        return self.diffused(chosen) if chosen else default

    def draw(self, name: str, picture: Image.Image) -> None:
        """Write a picture to the output folder, on the main process only."""
        if self.accelerator.is_main_process:
            save_picture(picture, self._path(name))

    def animate(self, name: str, frames: Sequence[Tensor], titles: Sequence[str]) -> None:
        """Write unit images, shape `(N, C, H, W)` per frame, as an animation with one title per frame."""
        if self.accelerator.is_main_process:
            pictures = [
                grid(to_pictures(to_bytes(frame)), title=title) for frame, title in zip(frames, titles, strict=True)
            ]
            save_animation(pictures, self._path(name), MILLISECONDS)

    def plot(self, name: str, curves: Mapping[str, Curve], **options: Any) -> None:
        """Plot curves to the output folder, on the main process only; options: see `save_curves`."""
        if self.accelerator.is_main_process:
            save_curves(self._path(name), curves, **options)

    def plot_distances(self, name: str, curves: Mapping[str, Curve], x_label: str, like: Any, **options: Any) -> None:
        """Plot Frechet distances, with that of held-out images if `like`, one of the distances, has it."""
        levels = {"held-out images": like["floor"]} if "floor" in like else {}
        labels = {"x_label": x_label, "y_label": "Frechet distance"}
        self.plot(name, curves, **labels, levels=levels, log_y=True, markers=True, **options)

    def write(
        self,
        name: str,
        title: str,
        paragraphs: Sequence[str],
        numbers: Mapping[str, Any],
        options: Any,
        made_by: Mapping[str, Any],
    ) -> None:
        """Write the results of a figure and their origin to `NAME.json`, and its text to `NAME.md`.

        Args:
            name: Name of the figure.
            title: Heading of the text.
            paragraphs: The text, in Markdown.
            numbers: The results by name.
            options: The options of the figure, a dataclass.
            made_by: Dataset and feature extractor, as reported by an evaluation.
        """
        if not self.accelerator.is_main_process:
            return
        shared = {name: getattr(self.options, name) for name in ("seed", "class_labels", "guidance_scale")}
        sampled = {} if self._precision is None else {"mixed_precision": self._precision}
        origin = {**shared, **sampled, "options": asdict(options), **provenance(self.accelerator.device)}
        model = {"name": self.options.model, "checksum": self._checksum}
        content = to_json({"model": model, "made_by": {**origin, **made_by}, **numbers}, indent=2) + "\n"
        write_text(self._path(f"{name}.json"), content)
        write_text(self._path(f"{name}.md"), "\n\n".join([f"## {title}", *paragraphs]) + "\n")

    def _samples_folder(self, sampling: Sampling) -> Path:
        return self.folder / "samples" / folder_name(self.pipe, sampling, self.accelerator.device)

    def _path(self, name: str) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / name


def table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table; numbers are right-aligned, floats have four significant digits."""
    lines = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in (head, *rows)]
    ruler = ["---" if isinstance(value, str) else "---:" for value in (rows[0] if rows else head)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], ruler, *lines[1:]))


def with_error(value: float, error: float | None) -> str:
    """Return a number and its error as text."""
    return f"{value:.4g}" if error is None else f"{value:.4g} ± {error:.2g}"


def captioned(file: str, name: str, caption: str) -> str:
    """Return Markdown of a picture and its caption."""
    return f"![{name}]({file})\n\n*{caption}*"


def describe_distance(figure: dict[str, Any], made_by: dict[str, Any]) -> str:
    """Return one or two sentences about the images and features of a distance."""
    data, extractor = made_by["dataset"], made_by["extractor"]
    floor = f" The same number of held-out images scores {figure['floor']:.4g}." if "floor" in figure else ""
    return (
        f"Frechet distance between {figure['num_images']} samples and {figure['reference_images']} images of "
        f"{data['name']} ({data['reference_split']}); features: {extractor['name']}.{floor}"
    )


def sheet(rows: Sequence[tuple[str, Tensor]], columns: Sequence[str]) -> Image.Image:
    """Draw images in labeled rows and columns.

    Args:
        rows: Label and unit images of each row; images have shape `(len(columns), C, H, W)`.
        columns: Labels of the columns.

    Returns:
        The picture.
    """
    pictures = to_pictures(to_bytes(torch.cat([images for _, images in rows]).clamp(0, 1)))
    row_labels = [label for label, _ in rows]
    return grid(
        pictures,
        columns=len(rows[0][1]),
        column_labels=columns if any(columns) else (),
        row_labels=row_labels if any(row_labels) else (),
    )


def rmse(unit: Tensor, other: Tensor) -> float:
    """Return the root mean squared difference of unit images on the scale [0, 255]."""
    return 255 * (unit - other).square().mean().sqrt().item()
