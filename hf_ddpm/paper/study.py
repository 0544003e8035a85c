"""What all figures have in common: a model, its data, the folder that they go to, and how they are written."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from hf_ddpm.config import parse_config
from hf_ddpm.evaluation.evaluate import Evaluator
from hf_ddpm.evaluation.options import EvaluateConfig, default_levels, real_images
from hf_ddpm.images import grid, save_picture, to_bytes, to_pictures
from hf_ddpm.pipelines.pipeline_ddpm import load_pipeline
from hf_ddpm.provenance import model_checksum, provenance
from hf_ddpm.sampling.folder import SampleFolder
from hf_ddpm.sampling.generate import fill_folder, folder_name
from hf_ddpm.sampling.options import Sampling
from hf_ddpm.utils.files import atomic_write, write_text
from hf_ddpm.utils.jsonl import to_json
from hf_ddpm.utils.options import option, require, require_at_least, require_range, require_value
from hf_ddpm.utils.plots import Curve, save_curves

# How long a frame of an animation is shown.
MILLISECONDS, LAST_MILLISECONDS = 80, 1500


@dataclass
class Subject:
    """Which model, on which data, and where the figures go."""

    model: str = option("folder or Hub id of a DDPM pipeline, of hf_ddpm or of diffusers")
    output: str = option("folder of the figures", "figures")
    dataset: str | None = option("real images; by default those that the model of a run was trained on", None)
    dataset_config: str | None = option("configuration, for data sets with several ones", None)
    image_column: str | None = option("column of the images; guessed by default", None)
    class_column: str | None = option("column of the classes of a conditioned model; that of the run by default", None)
    split: str | None = option("held-out split; that of the run, else test by default", None)
    reference_split: str | None = option(
        "split that generated images are compared with; that of the run, else train by default", None
    )
    floor: bool = option("whether to compare as many held-out images, too", True)
    enlarge: bool = option("scale up real images that are smaller than those of the model", False)
    skip_bad_images: bool = option("whether to leave out real images that cannot be used", False)
    levels: int | None = option("evenly spaced values that a pixel takes; 17 for digits, else 256 by default", None)
    value_range: list[float] | None = option("floats that become black and white, for images of floats", None)
    extractor: str | None = option("as in evaluate.py; digits for the digits, else inception by default", None)
    extractor_weights: str | None = option("file of the weights of inception; downloaded by default", None)
    seed: int = option("seed of everything random", 0)
    batch_size: int = option("network evaluations at a time and process", 256)

    def __post_init__(self) -> None:
        """Checks the values, and finds the data set beside the model."""
        output = Path(self.output)
        no_file = not any(path.is_file() for path in (output, *output.parents))
        require(self, "output", no_file, "a file stands there, a folder is wanted")
        require_at_least(self, 0, "seed")
        require_at_least(self, 1, "batch_size")
        require_at_least(self, 2, "levels")
        require_range(self, "value_range")
        run = Path(self.model) / "config.yaml"
        if self.dataset is None and run.is_file():
            found = real_images(parse_config(["--config", str(run)]))
            floor = found.pop("floor")
            self.floor = self.floor and floor
            for name, value in found.items():
                setattr(self, name, getattr(self, name) or value)
        self.split, self.reference_split = self.split or "test", self.reference_split or "train"


class Study:
    """A model with its data, and the folder of its figures.

    Args:
        subject: What was asked for.
        accelerator: The processes; all are to make a study, and to call the functions of this package.
        log: Called with a line on files of the data set that are not used, and on damaged caches.

    Raises:
        ValueError: If the model cannot be loaded.
    """

    def __init__(self, subject: Subject, accelerator: Accelerator, log: Callable[[str], object] = lambda line: None):
        self.subject, self.accelerator, self.log = subject, accelerator, log
        self.folder = Path(subject.output)
        self.pipe = load_pipeline(subject.model, accelerator.device)
        self.pipe.set_progress_bar_config(desc="Steps", leave=False, disable=not accelerator.is_main_process)
        self._checksum = model_checksum(self.pipe)

    def request(self, metrics: str, num_images: int | None = None) -> EvaluateConfig:
        """Returns the request for metrics on this model and data; a `ValueError` if there are no data."""
        subject = self.subject
        if subject.dataset is None:
            raise ValueError(f"dataset is missing: there is no config.yaml of a run in model={subject.model!r}")
        options = {name: value for name, value in asdict(subject).items() if name not in ("output", "seed")}
        return EvaluateConfig(metrics=metrics, num_images=num_images, **options)

    @property
    def levels(self) -> int:
        """Values that a pixel of the data takes."""
        return self.subject.levels or default_levels(self.subject.dataset)

    def evaluator(self, metrics: str, num_images: int | None = None) -> Evaluator:
        """Returns what measures this model; arguments as in `request`, which are refused if they cannot be met."""
        evaluator = Evaluator(self.request(metrics, num_images), self.pipe.image_shape, self.accelerator, self.log)
        evaluator.count()
        return evaluator

    def samples(self, count: int, sampling: Sampling) -> SampleFolder:
        """Returns generated images; a folder below `samples/` keeps them."""
        return fill_folder(
            self.pipe,
            self.folder / "samples" / folder_name(self.pipe, sampling, self.accelerator.device),
            count,
            sampling,
            model=self.subject.model,
            batch_size=min(self.subject.batch_size, count),
            state=self.accelerator,
        )

    def diffused(self, asked: Sequence[int]) -> list[int]:
        """Returns numbers of diffusion steps, the paper's `t`: those asked for, or else quarters of all."""
        total = len(self.pipe.scheduler)
        require_value("diffused", list(asked), all(1 <= number <= total for number in asked), f"1 to {total}")
        return sorted(set(asked)) or [max(1, round(part * total / 4)) for part in (1, 2, 3, 4)]

    def draw(self, name: str, picture: Image.Image) -> None:
        """Writes a picture into the folder, once for all processes."""
        if self.accelerator.is_main_process:
            save_picture(picture, self._path(name))

    def animate(self, name: str, frames: Sequence[Tensor]) -> None:
        """Writes unit images, shape `(N, C, H, W)` in each moment, as an animation that rests at its end."""
        if self.accelerator.is_main_process:
            first, *others = [grid(to_pictures(to_bytes(frame))) for frame in frames]
            times = [MILLISECONDS] * len(others) + [LAST_MILLISECONDS]
            with atomic_write(self._path(name)) as partial:
                kind = Path(name).suffix[1:]
                first.save(partial, format=kind, save_all=True, append_images=others, duration=times, loop=0)

    def plot(self, name: str, curves: Mapping[str, Curve], **options: Any) -> None:
        """Writes curves into the folder, once for all processes; options as of `save_curves`."""
        if self.accelerator.is_main_process:
            save_curves(self._path(name), curves, **options)

    def write(
        self,
        name: str,
        title: str,
        text: str,
        figures: Mapping[str, Any],
        options: Mapping[str, Any],
        made_by: Mapping[str, Any],
    ) -> None:
        """Writes a figure: its numbers as `name.json`, with what they were made by, and in words as `name.md`."""
        if not self.accelerator.is_main_process:
            return
        known = provenance(self.accelerator.device)
        made_by = {"seed": self.subject.seed, "options": dict(options), **known, **made_by}
        model = {"name": self.subject.model, "checksum": self._checksum}
        content = to_json({"model": model, "made_by": made_by, **figures}, indent=2) + "\n"
        for file, words in ((f"{name}.json", content), (f"{name}.md", f"## {title}\n\n{text}\n")):
            write_text(self._path(file), words)

    def _path(self, name: str) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / name


def table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """Returns a table in Markdown; numbers are right of their column, floats with four digits."""
    lines = [[_cell(value) for value in row] for row in (head, *rows)]
    ruler = ["---" if isinstance(value, str) else "---:" for value in (rows[0] if rows else head)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], ruler, *lines[1:]))


def with_error(value: float, error: float | None) -> str:
    """Returns a figure and its error as text."""
    return f"{value:.4g}" if error is None else f"{value:.4g} ± {error:.2g}"


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
