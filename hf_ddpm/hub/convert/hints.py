"""Options for settings that a checkpoint does not contain. Imports nothing slow, so that `--help` stays fast."""

from dataclasses import dataclass, fields
from typing import Literal

from hf_ddpm.utils.options import option, require, require_at_least

PROCESS = ("resolution", "num_train_timesteps", "beta_schedule", "prediction_type", "variance_type")
HEADS = ("num_heads", "num_head_channels", "use_new_attention_order", "rescale_timesteps")
KNOWN = {"ho2020": ("weights", *PROCESS), "improved-diffusion": (*HEADS, *PROCESS), "stock": ()}


@dataclass
class Hints:
    """Settings that are not stored in a checkpoint; by default the settings of the original repository."""

    resolution: int | None = option("height and width of the images (default: inferred from the network)", None)
    weights: Literal["ema", "raw"] | None = option("ho2020: averaged (ema) or raw weights (default: ema)", None)
    num_train_timesteps: int | None = option("number T of diffusion steps (default: 1000)", None)
    beta_schedule: Literal["linear", "quad", "const", "squaredcos_cap_v2"] | None = option(
        "noise schedule (default: linear)", None
    )
    prediction_type: Literal["epsilon", "sample", "mean"] | None = option(
        "prediction target of the network (default: epsilon)", None
    )
    variance_type: Literal["fixed_small", "fixed_large", "learned", "learned_range"] | None = option(
        "variance of the reverse steps (default: inferred from the network)", None
    )
    num_heads: int | None = option("improved-diffusion: number of attention heads (default: 4)", None)
    num_head_channels: int | None = option(
        "improved-diffusion: channels per attention head, instead of num_heads", None
    )
    use_new_attention_order: bool | None = option(
        "improved-diffusion: split queries, keys and values before heads (default: false)", None
    )
    rescale_timesteps: bool | None = option(
        "improved-diffusion: the network was trained on steps scaled to [0, 1000) (default: true)", None
    )

    def __post_init__(self) -> None:
        """Check the values."""
        require_at_least(self, 1, "resolution", "num_heads", "num_head_channels")
        require_at_least(self, 2, "num_train_timesteps")

    def check(self, layout: str) -> None:
        """Raise a `ValueError` if a hint is given that does not apply to checkpoints of the layout."""
        for hint in fields(self):
            holds = hint.name in KNOWN[layout] or getattr(self, hint.name) is None
            require(self, hint.name, holds, f"does not apply to {layout} checkpoints; expected no value")

    def assumptions(self, layout: str) -> list[str]:
        """Return a line that lists the options left at their defaults, if any."""
        defaults = [name for name in KNOWN[layout] if getattr(self, name) is None]
        return [f"defaults used, not stored in the file: {', '.join(defaults)} (see --help)"] if defaults else []

    def check_resolution(self, multiple: int) -> None:
        """Raise a `ValueError` if a resolution is given that the network cannot halve often enough."""
        fits = self.resolution is None or self.resolution % multiple == 0
        require(self, "resolution", fits, f"a multiple of {multiple}")

    def variance(self, channels: int, outputs: int, learned: str, fixed: str) -> str:
        """Return the variance type: the hint, or a default that matches the number of output channels.

        Args:
            channels: Number of image channels.
            outputs: Number of output channels of the network.
            learned: Default for a network that predicts the variance.
            fixed: Default for a network that does not.

        Raises:
            ValueError: If `outputs` is neither `channels` nor `2 * channels`, or the hint does not match.
        """
        if outputs not in (channels, 2 * channels):
            raise ValueError(f"the network has {outputs} output channels; expected {channels} or {2 * channels}")
        is_learned = outputs == 2 * channels
        allowed = ("learned", "learned_range") if is_learned else ("fixed_small", "fixed_large")
        fits = self.variance_type is None or self.variance_type in allowed
        require(self, "variance_type", fits, f"{' or '.join(allowed)}, since the network has {outputs} output channels")
        return self.variance_type or (learned if is_learned else fixed)
