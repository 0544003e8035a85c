"""From a model to the figures that were asked for: what `scripts/evaluate.py` and a run in training have in common."""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from hf_ddpm.data.sources import choose
from hf_ddpm.data.store import ImageStore, load_images
from hf_ddpm.evaluation.comparison import compare
from hf_ddpm.evaluation.extraction import Processes
from hf_ddpm.evaluation.feature_cache import fingerprint
from hf_ddpm.evaluation.features import load_extractor
from hf_ddpm.evaluation.nll import classes_for, variational_bound
from hf_ddpm.evaluation.options import EvaluateConfig
from hf_ddpm.evaluation.reference_stats import ReferenceStats
from hf_ddpm.evaluation.results import METRIC_SEED, record
from hf_ddpm.images import save_picture
from hf_ddpm.pipelines.pipeline_ddpm import DDPMPipeline
from hf_ddpm.provenance import model_checksum, provenance
from hf_ddpm.sampling.folder import SampleFolder, Samples
from hf_ddpm.sampling.generate import fill_folder, folder_name
from hf_ddpm.sampling.options import Sampling
from hf_ddpm.schedulers.scheduling_ddpm import DDPMScheduler
from hf_ddpm.utils.public import hub_ids, strip_local_path

Figures = dict[str, dict[str, Any]]


class Evaluator:
    """A request with all that it needs besides the model: the real images and the extractor.

    All processes are to make one, and to call it.

    Args:
        request: What was asked for.
        shape: The shape `(C, H, W)` of the images.
        accelerator: The processes.
        log: Called with a line on files of the data set that are not used, and on damaged caches.

    Raises:
        ValueError: If a data set or the extractor cannot be had or does not fit.
    """

    def __init__(
        self,
        request: EvaluateConfig,
        shape: tuple[int, ...],
        accelerator: Accelerator,
        log: Callable[[str], object] = lambda line: None,
    ):
        self.request, self.accelerator, self.log = request, accelerator, log
        if request.compared:
            weights = request.extractor_weights
            self.extractor = load_extractor(str(request.extractor), accelerator.device, weights=weights)
            request.check_extractor(self.extractor, shape)
            self.stats = self._read_stats(shape)
        with accelerator.main_process_first():
            self.held_out = self._load(request.split, shape) if request.needs_held_out else None
            has_reference = request.compared and request.dataset is not None
            self.reference = self._load(request.reference_split, shape) if has_reference else None
        self.hub_ids = hub_ids(request.dataset, request.model, request.extractor)

    def count(self, samples: int | None = None) -> int:
        """Returns on how many images to evaluate; `samples` is how many were generated, if they were."""
        held_out, reference = (None if found is None else len(found) for found in (self.held_out, self.reference))
        return self.request.count(held_out, reference, samples)

    @property
    def processes(self) -> Processes:
        """The processes, as those who extract features take them."""
        return Processes(self.accelerator.process_index, self.accelerator.num_processes, self.accelerator.gather)

    @property
    def for_floor(self) -> ImageStore | None:
        """The real images that the floor of a distance is of, if there is to be one."""
        return self.held_out if self.request.floor else None

    def evaluate(
        self,
        output: Path,
        sampling: Sampling,
        pipe: DDPMPipeline | None = None,
        images: Samples | None = None,
        *,
        model: dict[str, Any] | None = None,
        tell: Callable[[str], object] = lambda line: None,
    ) -> Iterator[Figures]:
        """Evaluates a model, images that it has generated, or both.

        Args:
            output: File of the results, which each of the figures is put into as soon as it is known. Generated images
                and the picture of the nearest training images are put beside it.
            sampling: Which images to ask the model for.
            pipe: The model, on the device of this process.
            images: Images that it has generated; generated here by default.
            model: What `identify` says of them, if it was asked.
            tell: Told a line if results of another model were in the file.

        Yields:
            Figures by metric; on all processes but the first, none.
        """
        count = self.count(None if images is None else len(images))
        model = model or identify(self.request, pipe, images)[0]
        made_by = {"seed": sampling.seed, "metric_seed": METRIC_SEED, **provenance(self.accelerator.device)}
        made_by |= {"request": asdict(self.request), "hub_ids": self.hub_ids}
        if pipe is not None:
            made_by |= {key: pipe.scheduler.config.get(key) for key in ("num_train_timesteps", "variance_type")}
        for part in self._parts(output, sampling, pipe, images, count):
            figures = {name: figure | {"made_by": made_by | figure["made_by"]} for name, figure in part.items()}
            if self.accelerator.is_main_process and record(output, model, figures):
                tell(f"{output} held results of another model: they are gone")
            yield figures if self.accelerator.is_main_process else {}

    def _parts(
        self,
        output: Path,
        sampling: Sampling,
        pipe: DDPMPipeline | None,
        images: Samples | None,
        count: int,
    ) -> Iterator[Figures]:
        if "nll" in self.request.chosen:
            yield {"nll": self.bound(pipe, sampling.seed)}
        if self.request.compared:
            if images is None:
                images = self._sample(pipe, sampling, output, count)
            made_by = {"samples": str(images.path), "sampling": getattr(images, "settings", None)}
            real = (self.reference, self.for_floor)
            parts = compare(self.request, self.extractor, images, *real, count, self.processes, self.stats)
            for figures, picture in parts:
                if picture is not None:
                    save_picture(picture, output.with_name(f"{output.stem}_nearest.png"))
                yield {name: figure | {"made_by": made_by | figure["made_by"]} for name, figure in figures.items()}

    def bound(self, pipe: Any, seed: int) -> dict[str, Any]:
        """Returns the figures of the bound on held-out images, from all processes."""
        request, accelerator, images = self.request, self.accelerator, self.held_out
        assert images is not None
        if not isinstance(pipe.scheduler, DDPMScheduler):
            raise ValueError(f"nll needs a DDPMScheduler, not the {type(pipe.scheduler).__name__} of {request.model!r}")
        numbers = choose(len(images), request.num_images, METRIC_SEED)
        mine = numbers[accelerator.process_index :: accelerator.num_processes]
        total = len(mine) * (request.steps_per_image or len(pipe.scheduler.diffusion))
        with tqdm(total=total, desc="nll", unit="evaluation", disable=not accelerator.is_main_process) as bar:
            bound = variational_bound(
                pipe.unet.eval(),
                pipe.scheduler,
                images,
                mine,
                seed=seed,
                batch_size=request.batch_size,
                levels=request.pixel_values,
                steps_per_image=request.steps_per_image,
                classes=classes_for(pipe, images.labels, images.class_names, len(images)),
                progress=bar.update,
            )
        data = {
            "name": strip_local_path(str(request.dataset), self.hub_ids),
            "config": request.dataset_config,
            "split": request.split,
            "fingerprint": fingerprint(images, numbers),
        }
        everywhere = bound.summed(lambda value: accelerator.reduce(value, reduction="sum"))
        return everywhere.report() | {"made_by": {"dataset": data}}

    def _sample(self, pipe: Any, sampling: Sampling, output: Path, count: int) -> SampleFolder:
        """Returns generated images; they stay in a folder of their settings beside the results."""
        pipe.set_progress_bar_config(desc="Steps", leave=False, disable=not self.accelerator.is_main_process)
        return fill_folder(
            pipe,
            output.with_name(f"{output.stem}_samples") / folder_name(pipe, sampling, self.accelerator.device),
            count,
            sampling,
            model=str(self.request.model),
            batch_size=self.request.batch_size,
            state=self.accelerator,
        )

    def _read_stats(self, shape: tuple[int, ...]) -> ReferenceStats | None:
        """Returns the statistics to compare with, if they were given and fit the extractor."""
        if self.request.reference_stats is None:
            return None
        stats = ReferenceStats.read(Path(self.request.reference_stats))
        features = self.extractor(torch.zeros(1, *shape, dtype=torch.uint8)).features
        stats.check(features.shape[1], self.extractor.name)
        return stats

    def _load(self, split: str, shape: tuple[int, ...]) -> ImageStore:
        """Returns the real images of a split."""
        return load_images(
            str(self.request.dataset),
            split=split,
            config=self.request.dataset_config,
            column=self.request.image_column,
            resolution=(shape[1], shape[2]),
            channels=shape[0],
            levels=self.request.pixel_values,
            value_range=self.request.value_range,
            class_column=self.request.class_column,
            enlarge=self.request.enlarge,
            skip_bad_images=self.request.skip_bad_images,
            device=self.accelerator.device,
            log=self.log,
        )


def identify(
    config: EvaluateConfig, pipe: DDPMPipeline | None, images: Samples | None
) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Returns the name and the checksum of what is evaluated, and the shape of its images.

    Args:
        config: What was asked for.
        pipe: The model, if it was given.
        images: Its samples, if they were.

    Raises:
        ValueError: If the samples are of another model or another shape.
    """
    settings: dict[str, Any] = getattr(images, "settings", {})
    if pipe is None:
        assert images is not None
        checksum = settings.get("model_checksum") or fingerprint(images, range(len(images)))
        return {"name": settings.get("model", config.samples), "checksum": checksum}, images.shape
    checksum = model_checksum(pipe)
    if settings.get("model_checksum", checksum) != checksum:
        raise ValueError(f"samples={config.samples!r} are of another model than {config.model!r}: {settings['model']}")
    if images is not None and images.shape != pipe.image_shape:
        raise ValueError(f"samples={config.samples!r} are of {images.shape}, images of the model {pipe.image_shape}")
    return {"name": config.model, "checksum": checksum}, pipe.image_shape
