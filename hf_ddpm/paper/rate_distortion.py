"""Rate and distortion of progressive lossy coding (Section 4.3, Fig. 5 and Table 4)."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from hf_ddpm.paper.context import FigureContext, captioned, table
from hf_ddpm.paper.options import RateDistortionOptions

RATE, DISTORTION = "rate, bits per dimension", "distortion, RMSE on [0, 255]"
STEPS = "T - t + 1, evaluations of the network"


def rate_distortion(context: FigureContext, options: RateDistortionOptions) -> None:
    """Evaluate the bound as `hf-ddpm evaluate --metrics nll` does; plot and tabulate rate and distortion."""
    bound = context.reference("nll", options.num_images).bound(context.pipe, context.options.seed)
    made_by, data = bound.pop("made_by"), bound
    rate, distortion, total = data["rate_bpd"], data["distortion"], len(data["rate_bpd"])
    steps = [total - t for t in range(total)]  # taken at t
    for suffix, curve, labels in (
        ("", (rate, distortion), (RATE, DISTORTION)),
        ("_rate", (steps, rate), (STEPS, RATE)),
        ("_distortion", (steps, distortion), (STEPS, DISTORTION)),
    ):
        context.plot(f"rate-distortion{suffix}.png", {"": curve}, x_label=labels[0], y_label=labels[1])
    count = min(options.rows, total)
    chosen = [round(row * total / count) for row in range(count)]
    rows = [{"steps": total - t, "rate_bpd": rate[t], "distortion": distortion[t]} for t in chosen]
    manner = "throughout" if falls(rows) else "but not throughout"
    paragraphs = [
        table(["T - t + 1", "rate (bits per dimension)", "RMSE on [0, 255]"], [list(row.values()) for row in rows]),
        f"Means over {data['num_images']} images of {made_by['dataset']['name']} ({made_by['dataset']['split']}): what "
        "has been received when the network has been evaluated so many times, and how far the estimate of the image is "
        f"from it then. From row to row the distortion falls as the rate rises, {manner}.",
        f"All in all: {data['total_bpd']:.4g} bits per dimension, of which {rate[0]:.4g} are the rate (L_1 to L_T) and "
        f"{data['decoder_bpd']:.4g} what remains to be said of the pixels (L_0).",
        captioned(
            "rate-distortion.png",
            "Distortion against rate",
            "Distortion against rate: how far the estimate is from the image when so many bits have been received.",
        ),
        captioned(
            "rate-distortion_rate.png",
            "Rate against steps",
            "Rate against steps: the bits received when the network has been evaluated so many times. The last steps, "
            "in which details are settled, take most of them.",
        ),
        captioned(
            "rate-distortion_distortion.png",
            "Distortion against steps",
            "Distortion against steps. The curve is rough where few images were evaluated.",
        ),
    ]
    numbers = {**data, "table": rows, "falls_throughout": falls(rows)}
    title = "Rate and distortion (Fig. 5, Table 4)"
    context.write("rate-distortion", title, paragraphs, numbers, options, made_by)


def falls(rows: Sequence[dict[str, Any]]) -> bool:
    """Return whether from row to row, from the last to the first, the rate rises and the distortion falls."""
    return all(
        before["rate_bpd"] < after["rate_bpd"] and before["distortion"] > after["distortion"]
        for after, before in pairwise(rows)
    )
