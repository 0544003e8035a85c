"""What of a model's folder belongs on the Hub: only what is named here, never checkpoints, samples or pickles."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from hf_ddpm.files import one_line, public_name
from hf_ddpm.lines import as_lines, read_lines, to_json

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
    """Returns what is pushed of a file: it, but that options and results lose the paths of this machine."""
    if file.name == "config.yaml":
        read, write = _read_yaml, lambda value: yaml.safe_dump(value, sort_keys=False)
    elif file.name == "evaluations.jsonl":
        read, write = read_lines, as_lines
    elif file.match("results*.json"):
        read, write = _read, lambda value: to_json(value, indent=2) + "\n"
    else:
        return file
    given = read(file)
    public = _public(given)
    return file if public == given else write(public).encode()


def _public(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _public(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_public(item) for item in value]
    return public_name(value) if isinstance(value, str) and value else value


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
