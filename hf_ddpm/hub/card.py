"""Model cards, from the files in a model's folder alone."""

import json
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from hf_ddpm.config import option_types, with_past_defaults
from hf_ddpm.hub.figures import rows
from hf_ddpm.pipelines.pipeline_ddpm import DDPMPipeline, load_pipeline
from hf_ddpm.provenance import model_checksum
from hf_ddpm.utils.files import one_line, write_text
from hf_ddpm.utils.jsonl import read_lines
from hf_ddpm.utils.markdown import code, escape, plain
from hf_ddpm.utils.plots import save_curves
from hf_ddpm.utils.public import strip_local_path
from hf_ddpm.utils.schema import check_types, conforms

TEMPLATE = resources.files("hf_ddpm.hub") / "template.md"
# A card without it was written by a person, and stays.
MARK = "<!-- Written by hf_ddpm from the files beside it; without this line it would not be written anew. -->"
DIGITS = "the digits of hf_ddpm (from UCI's Optical Recognition of Handwritten Digits, CC BY 4.0)"
CHANNELS = {1: "grayscale", 3: "RGB", 4: "RGBA"}


def write_card(
    folder: Path, *, pipe: DDPMPipeline | None = None, model_id: str | None = None, license: str | None = None
) -> Path:
    """Write `README.md` from the files in a model's folder, and `loss.png` beside it.

    Args:
        folder: The folder of a run; of a pipeline alone, the card contains less.
        pipe: The pipeline of the folder, if it is in memory; loaded by default.
        model_id: The name that the model is loaded by; the folder's name by default.
        license: Identifier of the model's license, such as `apache-2.0`; that of `config.yaml` by default.

    Returns:
        The path of the card; a card that a person wrote is left as it is.

    Raises:
        ValueError: If there is no model, or a file cannot be read as what its name implies.
    """
    path = folder / "README.md"
    if path.exists() and MARK.encode() not in path.read_bytes():
        return path
    sources = read_sources(folder, load_pipeline(str(folder), "cpu") if pipe is None else pipe)
    if len(sources.metrics) > 1:
        curve = [line["step"] for line in sources.metrics], [line["loss"] for line in sources.metrics]
        save_curves(folder / "loss.png", {"loss": curve}, x_label="step", y_label="loss", log_y=True)
    write_text(path, str(model_card(folder, sources, model_id or folder.resolve().name, license)))
    return path


@dataclass(frozen=True)
class Sources:
    """The contents of a model's folder that are about its present weights; what is about other weights is left out.

    Attributes:
        pipe: The model.
        results: `results.json`.
        options: `config.yaml`.
        metrics: The lines of `metrics.jsonl` up to the step of the weights.
        status: `status.json`.
        hub_ids: Names in the options that are Hub ids, see `hf_ddpm.utils.public`.
        lengths: The lengths that the run has had, see `hf_ddpm.training.loop.Run`; empty if it had one.
    """

    pipe: DDPMPipeline
    results: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    status: dict[str, Any] = field(default_factory=dict)
    hub_ids: list[str] = field(default_factory=list)
    lengths: list[tuple[int, int]] = field(default_factory=list)


def read_sources(folder: Path, pipe: DDPMPipeline) -> Sources:
    """Read the sources of a card; raise as `write_card` does."""
    checksum = model_checksum(pipe)
    results, exported = (_read(folder / name, json.loads) for name in ("results.json", "export.json"))
    model = results.get("model")
    results = results if isinstance(model, dict) and model.get("checksum") == checksum else {}
    if exported.get("checksum") != checksum:
        return Sources(pipe, results)
    options, status = _read(folder / "config.yaml", yaml.safe_load), _read(folder / "status.json", json.loads)
    _check(folder / "export.json", exported, {"step": int}, required=True)
    _check(folder / "export.json", exported, {"hub_ids": list[str], "lengths": list[tuple[int, int]]})
    if options:
        options = with_past_defaults(options)
        _check(folder / "config.yaml", options, option_types())
    if status:
        _check(folder / "status.json", status, {"images": int, "hardware": str}, required=True)
    metrics = [line for line in read_lines(folder / "metrics.jsonl") if _is_metric(line, exported["step"])]
    hub_ids, lengths = exported.get("hub_ids", []), exported.get("lengths", [])
    return Sources(pipe, results, options, metrics, status, hub_ids, lengths)


def model_card(folder: Path, sources: Sources, model_id: str, license: str | None = None) -> ModelCard:
    """Return the card of the model in a folder; see `write_card`."""
    pipe, results, options = sources.pipe, sources.results, sources.options
    license = plain(license or options.get("license") or "") or None
    name = plain(model_id.split("/")[-1])
    figures = list(rows(results))
    pictures = [*(["samples", "loss"] if options else []), *(["results_nearest"] if "memorization" in results else [])]
    scheduler = pipe.scheduler.config
    return ModelCard.from_template(
        ModelCardData(
            model_name=name,
            license=license,
            library_name="diffusers",
            pipeline_tag="unconditional-image-generation",
            tags=["pytorch", "diffusers", "unconditional-image-generation", "ddpm", "hf_ddpm"],
            datasets=[options["dataset"]] if options.get("dataset") in sources.hub_ids else None,
            metrics=sorted({row.type for row in figures}) or None,
            eval_results=[row.eval_result() for row in figures] or None,
        ),
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        mark=MARK,
        name=escape(name),
        model_id=model_id,
        stock_call=code(f"diffusers.DDPMPipeline.from_pretrained({json.dumps(model_id)})"),
        license=escape(license or ""),
        class_names=pipe.class_names,
        # Whether the scheduler of diffusers does the same with the configuration.
        stock_samples=scheduler.variance_type != "learned" and scheduler.prediction_type != "mean",
        model=_about_the_model(pipe),
        training=_about_the_training(sources),
        samples=_about_the_samples(options, pipe),
        num_classes=pipe.unet.config.num_class_embeds,
        figures=figures,
        versions=_versions(results),
        pictures=[picture for picture in pictures if (folder / f"{picture}.png").exists()],
    )


def _versions(results: dict[str, Any]) -> str:
    origins = [figure.get("made_by") for figure in results.values() if isinstance(figure, dict)]
    versions = [origin.get("versions") for origin in origins if isinstance(origin, dict)]
    complete = [v for v in versions if conforms(v, dict[str, str]) and {"hf_ddpm", "torch", "diffusers"} <= v.keys()]
    lines = [f"hf_ddpm {v['hf_ddpm']}, torch {v['torch']}, diffusers {v['diffusers']}" for v in complete]
    return escape("; ".join(dict.fromkeys(lines)))


def _about_the_model(pipe: DDPMPipeline) -> dict[str, str]:
    unet, scheduler = pipe.unet.config, pipe.scheduler.config
    channels, height, width = pipe.image_shape
    attended = [
        f"{height // 2**i}x{width // 2**i}" for i, block in enumerate(unet.down_block_types) if block.startswith("Attn")
    ]
    classes = {"classes": ", ".join(map(escape, pipe.class_names))} if pipe.class_names else {}
    return {
        "images": f"{CHANNELS.get(channels, f'{channels} channels')}, {height}x{width}",
        "network": f"U-Net, {pipe.unet.num_parameters():,} parameters; channels {_list(unet.block_out_channels)}; "
        f"blocks a resolution: {unet.layers_per_block}; attention at {_list(attended) or 'the lowest alone'}",
        **classes,
        "noise schedule": _describe_schedule(pipe.scheduler),
        "prediction": f"{scheduler.prediction_type}, variance {scheduler.variance_type}",
    }


def _describe_schedule(scheduler: Any) -> str:
    config, betas = scheduler.config, scheduler.betas
    kind = "given by its values" if config.get("trained_betas") is not None else config.beta_schedule
    rescaled = ", no signal at the last step" if config.rescale_betas_zero_snr else ""
    return f"{kind}, T = {config.num_train_timesteps}, variances from {betas[0]:.3g} to {betas[-1]:.3g}{rescaled}"


def _about_the_training(sources: Sources) -> dict[str, str]:
    options, metrics, status, hub_ids = sources.options, sources.metrics, sources.status, sources.hub_ids
    if not (options and status and metrics):
        return {}
    steps, seen = metrics[-1]["step"], metrics[-1]["images"]
    start = {"started from": code(strip_local_path(options["init_from"], hub_ids))} if options["init_from"] else {}
    decay = options["weight_decay"]
    optimizer = f"AdamW, weight decay {decay:g}" if decay else "Adam"
    dataset = DIGITS if options["dataset"] == "digits" else code(strip_local_path(options["dataset"], hub_ids))
    return {
        "data": f"{dataset}, split {escape(options['split'])}, {status['images']:,} images"
        + (", half of them mirrored at random" if options["horizontal_flip"] else ""),
        **start,
        "steps": f"{steps:,} of {seen // steps:,} images: {seen:,} images seen",
        "objective": escape(options["objective"]),
        "optimizer": f"{optimizer}, learning rate {options['learning_rate']:g} ({escape(options['lr_schedule'])} after "
        f"{options['warmup_steps']:,} steps of warm-up{_lengths(sources, steps)}), "
        f"gradients of norm at most {options['max_grad_norm']:g}",
        "dropout": f"{options['dropout']:g}",
        "weights": f"exponential moving average, decay {options['ema_decay'][0]:g}"
        + (" after a warm-up" if options["ema_warmup"] else ""),
        "precision": escape({"no": "float32"}.get(options["mixed_precision"], options["mixed_precision"])),
        "hardware": escape(status["hardware"]),
        "seed": str(options["seed"]),
    }


def _lengths(sources: Sources, steps: int) -> str:
    """Return the schedules of a run that was prolonged or ended early; nothing where the rate has no end."""
    lengths = sources.lengths
    if sources.options["lr_schedule"] == "constant" or not lengths or (len(lengths) == 1 and lengths[0][1] == steps):
        return ""
    first, *later = lengths
    changes = [f"from step {start:,} on that of {length:,}" for start, length in later]
    return ", " + ", ".join([f"the schedule of {first[1]:,} steps", *changes, f"ended at {steps:,}"])


def _about_the_samples(options: dict[str, Any], pipe: DDPMPipeline) -> str:
    if not options:
        return ""
    steps = options["num_inference_steps"] or len(pipe.scheduler)
    return f"{options['num_samples']} images of seed {options['seed']}, in {steps} steps; not chosen."


def _list(items: Any) -> str:
    return ", ".join(map(str, items))


def _check(path: Path, values: dict[str, Any], hints: dict[str, Any], required: bool = False) -> None:
    """Raise a `ValueError` that names the file and a key unless its values have these types."""
    try:
        missing = [name for name in hints if required and name not in values]
        if missing:
            raise ValueError(f"{missing[0]} is missing")
        check_types(values, hints)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _is_metric(line: dict[str, Any], last: int) -> bool:
    return (
        all(conforms(line.get(name), hint) for name, hint in {"step": int, "images": int, "loss": float}.items())
        and 1 <= line["step"] <= last
    )


def _read(path: Path, parse: Any) -> dict[str, Any]:
    """Return the contents of a file, nothing if there is none."""
    if not path.exists():
        return {}
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} cannot be read: it holds no names and values")
    return content
