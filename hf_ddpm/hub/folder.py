"""What of a model's folder belongs on the Hub: only what is named here, never checkpoints, samples or pickles."""

import json
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from hf_ddpm.utils.files import one_line
from hf_ddpm.utils.jsonl import as_lines, read_lines, to_json
from hf_ddpm.utils.public import public_values

BESIDE = (
    "README.md",
    "samples.png",
    "loss.png",
    "results*_nearest.png",
    "results*.json",
    "config.yaml",
    "metrics.jsonl",
    "evaluations.jsonl",
)
FURTHER = ("ema-*", "best")  # pipelines of their own, with what is beside them


def model_files(folder: Path) -> list[str]:
    """Returns what of a model's folder belongs on the Hub: pipelines, card, pictures, results, configuration, metrics.

    Args:
        folder: A pipeline as `save_pretrained` writes it, with what scripts/train.py leaves beside it.

    Returns:
        Paths below the folder, with slashes.

    Raises:
        ValueError: If a pipeline is not whole.
    """
    further = [index.parent for name in FURTHER for index in sorted(folder.glob(f"{name}/model_index.json"))]
    files = [file for pipeline in (folder, *further) for file in (*_pipeline(pipeline), *matching(pipeline, BESIDE))]
    return [file.relative_to(folder).as_posix() for file in files]


def public_content(file: Path) -> bytes | Path:
    """Returns what is pushed of a file: the file, but of options, results and configurations only what is public.

    Paths and URLs lose all but their last part, see `hf_ddpm.utils.public`.
    """
    dump = partial(to_json, indent=2)
    if file.name == "config.yaml":
        read, make_public, write = _read_yaml, _public_options, partial(yaml.safe_dump, sort_keys=False)
    elif file.name == "evaluations.jsonl":
        read, make_public, write = read_lines, _public_options, as_lines
    elif file.match("results*.json"):
        read, make_public, write = _read, _public_results, dump
    elif file.suffix == ".json":
        read, make_public, write = _read, _without_origin, dump
    else:
        return file
    given = read(file)
    public = make_public(given, file.parent)
    return file if public == given else (write(public).rstrip("\n") + "\n").encode()


def _public_options(options: Any, folder: Path) -> Any:
    """Returns options with the names that the run in the folder has found to be Hub ids."""
    record = folder / "export.json"
    return public_values(options, _hub_ids(_read(record) if record.is_file() else {}))


def _public_results(results: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Returns figures, each with the names that its evaluation has found to be Hub ids."""
    known = {
        name: _hub_ids(figure.get("made_by")) if isinstance(figure, dict) else [] for name, figure in results.items()
    }
    known["model"] = [name for names in known.values() for name in names]
    return {name: public_values(figure, known[name]) for name, figure in results.items()}


def _without_origin(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Returns a configuration of diffusers without the path that it was loaded from."""
    return {name: value for name, value in config.items() if name != "_name_or_path"}


def _hub_ids(record: Any) -> list[str]:
    found = record.get("hub_ids") if isinstance(record, dict) else None
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []


def matching(folder: Path, patterns: Iterable[str]) -> Iterator[Path]:
    """Returns the files of a folder that have one of the names."""
    return (file for pattern in patterns for file in sorted(folder.glob(pattern)) if file.is_file())


def _pipeline(folder: Path) -> list[Path]:
    index = folder / "model_index.json"
    if not index.is_file():
        raise ValueError(f"model {str(folder)!r} cannot be pushed: it has no model_index.json")
    files = [index]
    for name, entry in _read(index).items():
        if isinstance(entry, list) and len(entry) == 2 and not name.startswith("_") and entry[0] is not None:
            files += _component(folder / name)
    if len(files) == 1:
        raise ValueError(f"model {str(folder)!r} cannot be pushed: its model_index.json names no components")
    return files


def _component(folder: Path) -> list[Path]:
    scheduler, config = folder / "scheduler_config.json", folder / "config.json"
    if scheduler.is_file():
        return [scheduler]
    indexes, weights = list(matching(folder, ["*.safetensors.index.json"])), list(matching(folder, ["*.safetensors"]))
    shards = {folder / shard for index in indexes for shard in _read(index).get("weight_map", {}).values()}
    missing = [path for path in (config, *sorted(shards)) if not path.is_file()]
    if missing or not weights:
        what = missing[0].name if missing else "weights, *.safetensors"
        raise ValueError(f"model {str(folder.parent)!r} cannot be pushed: {folder.name}/ has no {what}")
    for file in weights:
        try:
            with safe_open(file, framework="numpy"):  # reads the header, which says how long the file is
                pass
        except (OSError, SafetensorError) as error:
            raise ValueError(f"model {str(folder.parent)!r} cannot be pushed: {file} is damaged: {error}") from error
    return [config, *indexes, *weights]


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no object of JSON")
    return content


def _read_yaml(file: Path) -> Any:
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{file} is no YAML: {one_line(error)}") from error
