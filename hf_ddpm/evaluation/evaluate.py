"""Evaluation of a model, or of images that it has generated, in three stages: features, figures, record."""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from hf_ddpm.config import DataConfig, ImageOptions
from hf_ddpm.data.sources import MissingSplit, choose
from hf_ddpm.data.store import ImageStore, load_images
from hf_ddpm.evaluation.extraction import cached_features, extract, fingerprint
from hf_ddpm.evaluation.features import load_extractor
from hf_ddpm.evaluation.frechet import Moments
from hf_ddpm.evaluation.memorization import copied_fraction, nearest_picture
from hf_ddpm.evaluation.nll import variational_bound
from hf_ddpm.evaluation.options import EvaluateConfig
from hf_ddpm.evaluation.results import METRIC_SEED, Figures, RealFeatures, Record, figures, read_results
from hf_ddpm.images import save_picture
from hf_ddpm.pipelines.pipeline_ddpm import DDPMPipeline, load_pipeline
from hf_ddpm.provenance import model_checksum, provenance
from hf_ddpm.sampling.folder import SampleFolder, Samples, open_samples
from hf_ddpm.sampling.generate import compile_for_sampling, fill_folder, folder_name, settle_precision
from hf_ddpm.sampling.options import Sampling
from hf_ddpm.schedulers.scheduling_ddpm import DDPMScheduler
from hf_ddpm.utils.public import hub_ids, strip_local_path


def evaluate(
    config: EvaluateConfig,
    sampling: Sampling | None = None,
    *,
    pipe: DDPMPipeline | None = None,
    images: Samples | None = None,
    reference: "Reference | None" = None,
    output: Path | None = None,
    on_figures: Callable[[Figures], object] | None = None,
    log: Callable[[str], object] | None = None,
) -> Figures:
    """Evaluate a model, images that it has generated, or both. All processes call it.

    Args:
        config: Model or samples, metrics and real images.
        sampling: Seed, steps and sampler of the images, unless they exist already. Its precision is also that of nll,
            where `auto` is float32.
        pipe: The model, on the device of this process; by default `config.model` is loaded.
        images: Existing samples; by default those of `config.samples`, else the model generates them.
        reference: The real images; by default they are opened.
        output: File of the results, `config.output` by default; each figure is written as soon as it is known.
            Generated images and the picture of the nearest training images are stored in the same folder.
        on_figures: Called with the figures of each metric as soon as they are known.
        log: Called with a line on the precision that `auto` stands for, on unused files of the data set and on replaced
            results of another model.

    Returns:
        Figures by metric, with what they were `made_by`; empty on all processes but the first.

    Example:
        `evaluate(EvaluateConfig(model="runs/digits", dataset="digits", metrics="fd,nll"))["fd"]["value"]`

    Raises:
        ValueError: If the model, images, data set or extractor cannot be opened, or do not fit; one line.
    """
    sampling, output, log = sampling or Sampling(), output or Path(config.output), log or (lambda line: None)
    read_results(output)  # a file that cannot be added to is refused before anything is computed
    state = Accelerator(cpu=not torch.cuda.is_available()) if reference is None else reference.state
    loaded = load_pipeline(config.model, state.device) if pipe is None and config.model is not None else None
    pipe = pipe or loaded
    if images is None and config.samples is not None and config.compared:
        images = open_samples(Path(config.samples), config.background or "white")
    model, shape = _identify(config, pipe, images)
    if reference is None:
        reference = Reference(config, shape, state, log)
    count = reference.count(None if images is None else len(images))
    precision = sampling.mixed_precision
    if pipe is not None and images is None and config.compared:
        folder_of = partial(_samples_folder, pipe, output, state.device)
        batch_size, compiled = min(config.batch_size, count), loaded is not None and config.compile
        sampling = settle_precision(pipe, sampling, batch_size, folder_of, log, compiled)
    if loaded is not None and config.compile:
        compile_for_sampling(loaded.unet)
    made_by = {"seed": sampling.seed, "metric_seed": METRIC_SEED, **provenance(state.device)}
    made_by |= {"request": asdict(config), "hub_ids": reference.hub_ids}
    if pipe is not None:
        made_by |= {key: pipe.scheduler.config.get(key) for key in ("num_train_timesteps", "variance_type")}
    record = Record(output, model, made_by, on_figures, log)

    if "nll" in config.chosen:
        bound = reference.bound(pipe, sampling.seed, precision)
        if state.is_main_process:
            record.add("nll", bound)
    if config.compared:
        if images is None:
            images = _sample(pipe, sampling, output, count, reference)
        record.made_by |= {"samples": str(images.path), "sampling": getattr(images, "settings", None)}
        _compare(images, count, reference, record)
    return record.figures


def _compare(images: Samples, count: int, reference: "Reference", record: Record) -> None:
    """Compare the first `count` images with the real ones: features of all, then figures, each recorded at once."""
    config = reference.config
    generated = extract(reference.extractor, images, range(count), reference.state)
    real = reference.features(count)
    if not reference.state.is_main_process:
        return
    for metric in config.compared:
        stats = {"reference_stats": reference.stats_file} if reference.stats is not None and metric == "fd" else {}
        record.add(metric, figures(metric, generated, real) | {"made_by": real.made_by | stats})
    if reference.images is None or real.reference is None:
        return
    if config.save_reference_stats is not None:
        Moments.of(real.reference).save(Path(config.save_reference_stats))
    copies = copied_fraction(images, range(count), reference.images, config.pixel_values)
    counts = {"num_images": count, "reference_images": len(reference.images)}
    picture = nearest_picture(images, generated.features, reference.images, real.reference)
    save_picture(picture, record.path.with_name(f"{record.path.stem}_nearest.png"))
    record.add("memorization", {"exact_copies": copies, **counts, "made_by": real.made_by})


class Reference:
    """Real images that a model is measured by, and the extractor, opened once by all processes.

    Args:
        config: Options of the real images and of the extractor.
        shape: The shape `(C, H, W)` of the images.
        state: The processes.
        log: Called with a line on unused files of the data set, and on damaged caches.
        bound_precision: Precision of the network's passes for nll; by default that of the sampling, float32 for `auto`.

    Attributes:
        images: The reference split; None if it is not needed.
        held_out: The held-out split; None if it is not needed.
        stats: Moments to compare with instead of those of `images`; None if they are not given.
        stats_file: Name and checksum of their file.
        hub_ids: Those of the names that are Hub ids.

    Raises:
        ValueError: If a data set or the extractor cannot be opened, or does not fit.
    """

    def __init__(
        self,
        config: EvaluateConfig,
        shape: tuple[int, ...],
        state: Accelerator,
        log: Callable[[str], object] = lambda line: None,
        bound_precision: str | None = None,
    ):
        self.config, self.state, self.bound_precision = config, state, bound_precision
        self.stats: Moments | None = None
        if config.compared:
            self.extractor = load_extractor(str(config.extractor), state.device, weights=config.extractor_weights)
            self.extractor.check(shape)
            if "is" in config.chosen and not self.extractor.classifies:
                name = f"{config.option_prefix}metrics=is is not allowed with extractor {self.extractor.name!r}"
                raise ValueError(f"{name}: it has no classes")
            if config.reference_stats is not None:
                self._read_stats(Path(config.reference_stats), shape)
        has_images = bool(config.compared) and config.dataset is not None
        with state.main_process_first():
            self.held_out = self._load_held_out(shape, log) if config.needs_held_out else None
            self.images = self._load(config.reference_split, shape, log) if has_images else None
        self.hub_ids = hub_ids(config.dataset, config.model, config.extractor)

    def count(self, samples: int | None = None) -> int:
        """Return the number of images to evaluate on; `samples` is the number of existing samples, if any."""
        held_out, images = (None if store is None else len(store) for store in (self.held_out, self.images))
        return self.config.count(held_out, images, samples)

    def features(self, count: int | None = None) -> RealFeatures:
        """Return features of the reference and of `count` held-out images. All processes call it."""
        config, extractor, count = self.config, self.extractor, count or self.count()
        made_by: dict[str, Any] = {"extractor": {"name": extractor.name, "checksum": extractor.checksum}}
        if self.images is None:
            return RealFeatures(extractor, count, None, None, self.stats, made_by)
        every = range(len(self.images))
        reference, reference_fingerprint = cached_features(extractor, self.images, every, self.state)
        floor, floor_fingerprint = None, None
        if config.floor and self.held_out is not None:
            drawn = choose(len(self.held_out), count, METRIC_SEED)
            floor, floor_fingerprint = cached_features(extractor, self.held_out, drawn, self.state)
        data = {
            "name": strip_local_path(str(config.dataset), self.hub_ids),
            "config": config.dataset_config,
            "reference_split": config.reference_split,
            "reference_fingerprint": reference_fingerprint,
            "held_out_split": None if floor is None else config.split,
            "held_out_fingerprint": floor_fingerprint,
            "reference_skipped": self.images.skipped,
        }
        return RealFeatures(extractor, count, reference, floor, self.stats, {"dataset": data, **made_by})

    def bound(self, pipe: Any, seed: int, precision: str = "no") -> dict[str, Any]:
        """Return the figures of the bound on held-out images, in float32 for `auto`. All processes call it."""
        precision = self.bound_precision or ("no" if precision == "auto" else precision)
        config, state, images = self.config, self.state, self.held_out
        assert images is not None
        if not isinstance(pipe.scheduler, DDPMScheduler):
            raise ValueError(f"nll needs a DDPMScheduler, not the {type(pipe.scheduler).__name__} of {config.model!r}")
        indices = choose(len(images), config.num_images, METRIC_SEED)
        mine = indices[state.process_index :: state.num_processes]
        total = len(mine) * (config.steps_per_image or len(pipe.scheduler.diffusion))
        with tqdm(total=total, desc="nll", unit="evaluation", disable=not state.is_main_process) as bar:
            bound = variational_bound(
                pipe,
                images,
                mine,
                seed=seed,
                batch_size=config.batch_size,
                levels=config.pixel_values,
                steps_per_image=config.steps_per_image,
                precision=precision,
                progress=bar.update,
            )
        data = {
            "name": strip_local_path(str(config.dataset), self.hub_ids),
            "config": config.dataset_config,
            "split": config.split,
            "fingerprint": fingerprint(images, indices),
        }
        everywhere = bound.summed(lambda value: state.reduce(value, reduction="sum"))
        return everywhere.report() | {"made_by": {"dataset": data, "mixed_precision": precision}}

    def _read_stats(self, path: Path, shape: tuple[int, ...]) -> None:
        """Read the statistics to compare with, and checks that they fit the extractor."""
        self.stats = Moments.read(path)
        width = self.extractor(torch.zeros(1, *shape, dtype=torch.uint8)).features.shape[1]
        self.stats_file = {"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        if len(self.stats.mean) != width:
            raise ValueError(
                f"--reference_stats {path.name}: {len(self.stats.mean)} dimensions, but features of extractor "
                f"{self.extractor.name!r} have {width}; expected statistics of the same extractor"
            )

    def _load_held_out(self, shape: tuple[int, ...], log: Callable[[str], object]) -> ImageStore:
        """Return the images of the held-out split."""
        try:
            return self._load(self.config.split, shape, log)
        except MissingSplit as error:
            if len(error.splits) > 1:
                raise
            remedy = self.config.without_held_out(error.splits[0])
            raise ValueError(f"{error}; without held-out images add {remedy}") from error

    def _load(self, split: str, shape: tuple[int, ...], log: Callable[[str], object]) -> ImageStore:
        """Return the real images of a split."""
        shared = {field.name: getattr(self.config, field.name) for field in fields(ImageOptions)}
        given = {name: value for name, value in shared.items() if value is not None}
        data = DataConfig(**given, split=split, resolution=list(shape[1:]), channels=shape[0])
        return load_images(data, device=self.state.device, log=log)


def _sample(pipe: Any, sampling: Sampling, output: Path, count: int, reference: Reference) -> SampleFolder:
    """Return generated images, kept in a folder per setting next to the results."""
    state = reference.state
    pipe.set_progress_bar_config(desc="Steps", leave=False, disable=not state.is_main_process)
    return fill_folder(
        pipe,
        _samples_folder(pipe, output, state.device, sampling),
        count,
        sampling,
        model=str(reference.config.model),
        batch_size=reference.config.batch_size,
        state=state,
    )


def _samples_folder(pipe: DDPMPipeline, output: Path, device: torch.device, sampling: Sampling) -> Path:
    return output.with_name(f"{output.stem}_samples") / folder_name(pipe, sampling, device)


def _identify(
    config: EvaluateConfig, pipe: DDPMPipeline | None, images: Samples | None
) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Return name and checksum of the model, and the shape of its images; refuse samples that are not its own."""
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
