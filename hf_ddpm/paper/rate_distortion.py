"""Rate and distortion of progressive lossy coding (Section 4.3, Fig. 5 and Table 4)."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from hf_ddpm.paper.context import FigureContext, captioned, table
from hf_ddpm.paper.options import RateDistortionOptions

RATE, DISTORTION = "rate, bits per dimension", "distortion, RMSE on [0, 255]"
STEPS = "T - t + 1, network evaluations"


def rate_distortion(context: FigureContext, options: RateDistortionOptions) -> None:
    """Evaluate the bound as `hf-ddpm evaluate --metrics nll` does; plot and tabulate rate and distortion."""
    bound = context.reference("nll", options.num_images).bound(context.pipe, context.options.seed)
    made_by, data = bound.pop("made_by"), bound
    rate, distortion, total = data["rate_bpd"], data["distortion"], len(data["rate_bpd"])
    steps = [total - t for t in range(total)]  # network evaluations for the estimate at t
    for suffix, curve, labels in (
        ("", (rate, distortion), (RATE, DISTORTION)),
        ("_rate", (steps, rate), (STEPS, RATE)),
        ("_distortion", (steps, distortion), (STEPS, DISTORTION)),
    ):
        context.plot(f"rate-distortion{suffix}.png", {"": curve}, x_label=labels[0], y_label=labels[1])
    count = min(options.rows, total)
    chosen = [round(row * total / count) for row in range(count)]
    rows = [{"steps": total - t, "rate_bpd": rate[t], "distortion": distortion[t]} for t in chosen]
    trend = "in every row" if is_monotonic(rows) else "but not in every row"
    paragraphs = [
        table(["T - t + 1", "rate (bits per dimension)", "RMSE on [0, 255]"], [list(row.values()) for row in rows]),
        f"Means over {data['num_images']} images of {made_by['dataset']['name']} ({made_by['dataset']['split']}): the "
        "bits transmitted after the given number of network evaluations, and the RMSE between the image and its "
        f"estimate at that point. The distortion falls as the rate rises, {trend}.",
        f"Total: {data['total_bpd']:.4g} bits per dimension, {rate[0]:.4g} for the rate (L_1 to L_T) and "
        f"{data['decoder_bpd']:.4g} for the remaining details of the pixels (L_0).",
        captioned(
            "rate-distortion.png",
            "Distortion against rate",
            "Distortion against rate: RMSE between the image and its estimate, against the bits transmitted so far.",
        ),
        captioned(
            "rate-distortion_rate.png",
            "Rate against steps",
            "Rate against steps: bits transmitted against the number of network evaluations. Most bits are transmitted "
            "in the last steps, which determine details.",
        ),
        captioned(
            "rate-distortion_distortion.png",
            "Distortion against steps",
            "Distortion against steps. With few images the curve is noisy.",
        ),
    ]
    numbers = {**data, "table": rows, "falls_throughout": is_monotonic(rows)}
    title = "Rate and distortion (Fig. 5, Table 4)"
    context.write("rate-distortion", title, paragraphs, numbers, options, made_by)


def is_monotonic(rows: Sequence[dict[str, Any]]) -> bool:
    """Return whether the rate rises and the distortion falls in every row, from the last to the first."""
    return all(
        before["rate_bpd"] < after["rate_bpd"] and before["distortion"] > after["distortion"]
        for after, before in pairwise(rows)
    )
