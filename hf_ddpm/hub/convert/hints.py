"""Options for facts that a checkpoint does not contain. Imports nothing slow: `--help` needs them."""

from dataclasses import dataclass, fields
from typing import Literal

from hf_ddpm.utils.options import option, require, require_at_least

PROCESS = ("resolution", "num_train_timesteps", "beta_schedule", "prediction_type", "variance_type")
HEADS = ("num_heads", "num_head_channels", "use_new_attention_order", "rescale_timesteps")
KNOWN = {"ho2020": ("weights", *PROCESS), "improved-diffusion": (*HEADS, *PROCESS), "stock": ()}


@dataclass
class Hints:
    """Facts that weights leave open; by default those of the repository that they come from."""

    resolution: int | None = option("height and width of the images; by default what the network suggests", None)
    weights: Literal["ema", "raw"] | None = option("ho2020: averaged or raw weights; the averaged by default", None)
    num_train_timesteps: int | None = option("number T of diffusion steps; 1000 by default", None)
    beta_schedule: Literal["linear", "quad", "const", "squaredcos_cap_v2"] | None = option(
        "variances of the forward process; linear by default", None
    )
    prediction_type: Literal["epsilon", "sample", "mean"] | None = option(
        "what the network predicts; epsilon by default", None
    )
    variance_type: Literal["fixed_small", "fixed_large", "learned", "learned_range"] | None = option(
        "variance of the reverse steps; by default what goes with the network", None
    )
    num_heads: int | None = option("improved-diffusion: attention heads; 4 by default", None)
    num_head_channels: int | None = option("improved-diffusion: channels of a head, instead of num_heads", None)
    use_new_attention_order: bool | None = option(
        "improved-diffusion: split queries, keys and values before heads; false by default", None
    )
    rescale_timesteps: bool | None = option(
        "improved-diffusion: the network was trained on steps scaled to [0, 1000); true by default", None
    )

    def __post_init__(self) -> None:
        """Check the values."""
        require_at_least(self, 1, "resolution", "num_heads", "num_head_channels")
        require_at_least(self, 2, "num_train_timesteps")

    def check(self, layout: str) -> None:
        """Raise a `ValueError` if a hint is given that checkpoints of the layout have no use for."""
        for hint in fields(self):
            holds = hint.name in KNOWN[layout] or getattr(self, hint.name) is None
            require(self, hint.name, holds, f"{layout} checkpoints leave it no choice")

    def assumptions(self, layout: str) -> list[str]:
        """Return a line on the defaults taken."""
        defaults = [name for name in KNOWN[layout] if getattr(self, name) is None]
        return [f"by default, since the file does not say: {', '.join(defaults)} (see --help)"] if defaults else []

    def check_resolution(self, multiple: int) -> None:
        """Raise a `ValueError` unless a resolution, if it is given, can be halved as often as in the network."""
        fits = self.resolution is None or self.resolution % multiple == 0
        require(self, "resolution", fits, f"a multiple of {multiple}")

    def variance(self, channels: int, outputs: int, learned: str, fixed: str) -> str:
        """Choose the kind of variance that a network's outputs allow.

        Args:
            channels: Channels of the images.
            outputs: Channels that the network returns.
            learned: The default of a network that predicts the variance.
            fixed: The default of one that does not.

        Raises:
            ValueError: If the number of outputs is neither that of the images nor twice it, or the hint contradicts it.
        """
        if outputs not in (channels, 2 * channels):
            raise ValueError(f"the network returns {outputs} channels for {channels}: as many or twice as many can be")
        is_learned = outputs == 2 * channels
        allowed = ("learned", "learned_range") if is_learned else ("fixed_small", "fixed_large")
        fits = self.variance_type is None or self.variance_type in allowed
        require(self, "variance_type", fits, f"{' or '.join(allowed)}, as the network returns {outputs} channels")
        return self.variance_type or (learned if is_learned else fixed)
