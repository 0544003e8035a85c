"""Presets: options by name, one of which is chosen for images without a preset, and what of them fits other images."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from hf_ddpm.utils.options import option, require_value

PRESETS = resources.files("hf_ddpm.presets")
Words = dict[str, list[str] | None]  # options by name, as words of a command line; None is the default


@dataclass(frozen=True)
class Given:
    """Given options that decide which preset is chosen and what is taken of it.

    Attributes:
        dataset: Name of the images.
        resolution: Their height and width, or one number for both.
        block_out_channels: Channels of a network, for which no preset is chosen.
        attention_resolutions: Where it has self-attention.
        init_from: A model whose network and process replace those of the preset.
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
    """Return the file of a preset, or raise a `ValueError` that lists all."""
    require_value("preset", name, name in preset_names(), f"one of {', '.join(preset_names())}")
    return PRESETS / f"{name}.yaml"


def choose_preset(given: Given) -> tuple[str | None, str]:
    """Choose a preset for images, and return its name with a line on the choice; None for a given network."""
    if not given.dataset or given.block_out_channels:
        return None, ""
    network = ", with the network of --init_from" if given.init_from else ""
    if given.dataset == "digits":
        return "digits", f"--preset digits (default for this data set){network}"
    name, sides = "small-32", given.resolution or [32]
    if min(sides) >= 48:
        name = "small-64"
    if network:
        return name, f"--preset {name} (default at this resolution){network}"
    other = "" if given.resolution else "--resolution 64 (small-64), "
    return name, f"--preset {name} (default at this resolution). Others: {other}--preset cifar10 (the paper's)"


def fit_preset(name: str, preset: Words, given: Given, of_data: Mapping[str, Any]) -> tuple[Words, str]:
    """Return the options of a preset that fit other images than its own.

    What describes its own data set, its metrics and license is left out for another data set. Self-attention at a
    resolution that the network does not reach is at the next lower one that it reaches, or at its lowest.

    Args:
        name: The name of the preset.
        preset: Its options.
        given: The options that it is for.
        of_data: Options that describe a data set, with their defaults.

    Returns:
        The options, and a line on those left out; empty if there are none.
    """
    own, line = preset.get("dataset"), ""
    if own is not None and given.dataset is not None and own != [given.dataset]:
        # The resolution is that of the network.
        left = {key: value for key, value in preset.items() if key in of_data and key not in ("dataset", "resolution")}
        preset = {key: value for key, value in preset.items() if key not in left}
        shown = [f"--{key} {' '.join(value or [])}" for key, value in left.items() if _differs(value, of_data[key])]
        line = f"--preset {name}: not for --dataset {given.dataset}: {' '.join(shown)}" if shown else ""
    if given.resolution and not given.attention_resolutions:
        widths, attended = preset["block_out_channels"] or (), _numbers(preset["attention_resolutions"])
        reached = [min(given.resolution) >> stage for stage in range(len(given.block_out_channels or widths))]
        if not set(attended) <= {0, *reached}:
            fitting = next((size for size in reached if size <= max(attended)), reached[-1])
            preset = preset | {"attention_resolutions": [str(fitting)]}
    return preset, line


def _differs(words: list[str] | None, default: Any) -> bool:
    return words is not None and words not in ([str(default)], [str(default).lower()])


def _numbers(words: list[str] | None) -> list[int]:
    return [int(word) for word in words or ()]
