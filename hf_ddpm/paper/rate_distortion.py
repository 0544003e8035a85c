"""Rate and distortion of progressive lossy coding (Section 4.3, Fig. 5 and Table 4)."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from hf_ddpm.paper.options import RateDistortionConfig
from hf_ddpm.paper.study import Study, table

RATE, DISTORTION, STEPS = (
    "rate, bits a dimension",
    "distortion, RMSE on [0, 255]",
    "T - t + 1, evaluations of the network",
)


def rate_distortion(study: Study, options: RateDistortionConfig) -> None:
    """Evaluates the bound as `hf-ddpm evaluate --metrics nll` does; writes `rate-distortion`, .json, .md and .png.

    Args:
        study: The model and its data.
        options: How many images.

    Raises:
        ValueError: If an argument is not allowed, or the scheduler is not a `DDPMScheduler`.
    """
    figures = study.evaluator("nll", options.num_images).bound(study.pipe, study.subject.seed)
    made_by = figures.pop("made_by")
    rate, distortion = figures["rate_bpd"], figures["distortion"]
    total = len(rate)
    steps = [total - t for t in range(total)]  # taken when the process stands at t
    for name, curve, labels in (
        ("rate-distortion", (rate, distortion), (RATE, DISTORTION)),
        ("rate-distortion_rate", (steps, rate), (STEPS, RATE)),
        ("rate-distortion_distortion", (steps, distortion), (STEPS, DISTORTION)),
    ):
        study.plot(f"{name}.png", {"": curve}, x_label=labels[0], y_label=labels[1])
    count = min(options.rows, total)
    chosen = [round(row * total / count) for row in range(count)]
    rows = [{"steps": total - t, "rate_bpd": rate[t], "distortion": distortion[t]} for t in chosen]
    figures = {**figures, "table": rows, "falls_throughout": falls(rows)}
    title = "Rate and distortion (Fig. 5, Table 4)"
    study.write("rate-distortion", title, text(figures, made_by["dataset"]), figures, asdict(options), made_by)


def falls(rows: Sequence[dict[str, Any]]) -> bool:
    """Returns whether from row to row, from the last to the first, the rate rises and the distortion falls."""
    return all(
        before["rate_bpd"] < after["rate_bpd"] and before["distortion"] > after["distortion"]
        for after, before in zip(rows, rows[1:], strict=False)
    )


def text(figures: dict[str, Any], data: dict[str, Any]) -> str:
    """Returns what was found, in Markdown."""
    rows = [list(row.values()) for row in figures["table"]]
    manner = "throughout" if figures["falls_throughout"] else "but not throughout"
    return "\n\n".join(
        [
            table(["T - t + 1", "rate (bits a dimension)", "RMSE on [0, 255]"], rows),
            f"Means over {figures['num_images']} images of {data['name']} ({data['split']}): what has been received "
            "when the network has been evaluated so many times, and how far the estimate of the image is from it then. "
            f"From row to row the distortion falls as the rate rises, {manner}.",
            f"All in all: {figures['total_bpd']:.4g} bits a dimension, of which {figures['rate_bpd'][0]:.4g} are the "
            f"rate (L_1 to L_T) and {figures['decoder_bpd']:.4g} what remains to be said of the pixels (L_0).",
            "![Distortion against rate](rate-distortion.png)",
            "![Rate against steps](rate-distortion_rate.png)",
            "![Distortion against steps](rate-distortion_distortion.png)",
        ]
    )
