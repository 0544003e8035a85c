"""Presets of options, the automatic choice of one, and its adjustment to other images."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from hf_ddpm.utils.options import option, require_value

PRESETS = resources.files("hf_ddpm.presets")
Arguments = dict[str, list[str] | None]  # command-line arguments by option name; None stands for the default


@dataclass(frozen=True)
class Given:
    """Given options that affect the choice and adjustment of a preset.

    Attributes:
        dataset: Name of the dataset.
        resolution: Height and width, or one number for both.
        block_out_channels: Channels per resolution; if given, no preset is chosen.
        attention_resolutions: Resolutions with self-attention.
        init_from: A model whose network and process replace the preset's.
    """

    dataset: str | None = option("", None)
    resolution: list[int] | None = option("", None)
    block_out_channels: list[int] | None = option("", None)
    attention_resolutions: list[int] | None = option("", None)
    init_from: str | None = option("", None)


def preset_names() -> list[str]:
    """Return the names of the presets."""
    return sorted(path.name.removesuffix(".yaml") for path in PRESETS.iterdir() if path.name.endswith(".yaml"))


def preset_path(name: str) -> Any:
    """Return the file of a preset; raise a `ValueError` with the existing names if the name is unknown."""
    require_value("preset", name, name in preset_names(), f"one of {', '.join(preset_names())}")
    return PRESETS / f"{name}.yaml"


def choose_preset(given: Given) -> tuple[str | None, str]:
    """Choose a preset; return its name and a line about the choice, or None if the network is given."""
    if not given.dataset or given.block_out_channels:
        return None, ""
    network = ", with the network of --init_from" if given.init_from else ""
    if given.dataset == "digits":
        return "digits", f"--preset digits (default for this dataset){network}"
    name, sides = "small-32", given.resolution or [32]
    if min(sides) >= 48:
        name = "small-64"
    if network:
        return name, f"--preset {name} (default at this resolution){network}"
    other = "" if given.resolution else "--resolution 64 (small-64), "
    return name, f"--preset {name} (default at this resolution). Others: {other}--preset cifar10 (the paper's)"


def fit_preset(name: str, preset: Arguments, given: Given, of_data: Mapping[str, Any]) -> tuple[Arguments, str]:
    """Adjust the options of a preset to other images.

    For another dataset, options about the preset's own dataset, metrics and license are removed. If the network does
    not reach a resolution with self-attention, the next lower resolution that it reaches, or else its lowest one, gets
    self-attention instead.

    Args:
        name: The name of the preset.
        preset: Its options.
        given: The given options.
        of_data: Defaults of the options that describe a dataset.

    Returns:
        The options, and a line about removed options, empty if no option is removed.
    """
    own, line = preset.get("dataset"), ""
    if own is not None and given.dataset is not None and own != [given.dataset]:
        # The resolution stays: the network is designed for it.
        removed = {key: preset[key] for key in preset if key in of_data and key not in ("dataset", "resolution")}
        preset = {key: value for key, value in preset.items() if key not in removed}
        shown = [f"--{key} {' '.join(value or [])}" for key, value in removed.items() if _differs(value, of_data[key])]
        unused = " ".join(shown)
        line = f"--preset {name}: options not used with --dataset {given.dataset}: {unused}" if shown else ""
    if given.resolution and not given.attention_resolutions:
        widths, attended = preset["block_out_channels"] or (), _integers(preset["attention_resolutions"])
        reached = [min(given.resolution) >> stage for stage in range(len(given.block_out_channels or widths))]
        if not set(attended) <= {0, *reached}:
            fitting = next((size for size in reached if size <= max(attended)), reached[-1])
            preset = preset | {"attention_resolutions": [str(fitting)]}
    return preset, line


def _differs(arguments: list[str] | None, default: Any) -> bool:
    return arguments is not None and arguments not in ([str(default)], [str(default).lower()])


def _integers(arguments: list[str] | None) -> list[int]:
    return [int(word) for word in arguments or ()]
