"""Ablation of prediction targets and objectives (Section 4.2, Table 2): train every row with several seeds."""

import itertools
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from hf_ddpm.config import NOT_ABOUT_WEIGHTS, Config, arguments_of, default_options, parse_config
from hf_ddpm.evaluation.options import UNRELATED_OPTIONS, EvaluateConfig, real_images
from hf_ddpm.images import bytes_to_unit, save_picture
from hf_ddpm.paper.context import captioned, sheet, table, with_error
from hf_ddpm.paper.options import AblationOptions
from hf_ddpm.sampling.folder import SampleFolder
from hf_ddpm.sampling.options import Sampling
from hf_ddpm.utils.files import write_text
from hf_ddpm.utils.jsonl import to_json
from hf_ddpm.utils.options import parse_options, require


@dataclass(frozen=True)
class Row:
    """A row of the paper's Table 2.

    Attributes:
        title: Name in tables.
        arguments: Arguments of `hf-ddpm train`.
        paper_fid: FID in the paper; None if training was unstable and the samples poor.
    """

    title: str
    arguments: tuple[str, ...]
    paper_fid: float | None


MEAN, EPSILON = ("--prediction_type", "mean"), ("--prediction_type", "epsilon")
LEARNED = ("--objective", "vlb", "--variance_type", "learned")
FIXED, SIMPLE = ("--objective", "vlb"), ("--objective", "simple")
ROWS = {
    "mean-learned": Row("posterior mean: L, learned diagonal variance", MEAN + LEARNED, 23.69),
    "mean-fixed": Row("posterior mean: L, fixed isotropic variance", MEAN + FIXED, 13.22),
    "mean-simple": Row("posterior mean: squared error", MEAN + SIMPLE, None),
    "epsilon-learned": Row("noise: L, learned diagonal variance", EPSILON + LEARNED, None),
    "epsilon-fixed": Row("noise: L, fixed isotropic variance", EPSILON + FIXED, 13.51),
    "epsilon-simple": Row("noise: squared error (L_simple)", EPSILON + SIMPLE, 3.17),
}
RESULTS = "results_ablation.json"
METRICS = {"fd": "Frechet distance", "is": "Inception score"}
SHOWN = 10


def ablation(options: AblationOptions, run: Callable[[str, list[str]], int]) -> None:
    """Train and evaluate the missing runs, then write `ablation.json`, `ablation.md` and `ablation.png`.

    Calling it again after an interruption resumes the runs.

    Args:
        options: Rows, seeds, and settings of the runs.
        run: Function that runs `hf-ddpm train` or `evaluate` with the given arguments and returns its exit code.

    Raises:
        ValueError: If an option is invalid, or a run with other options exists. Raised before training starts.
        OSError: If a run neither finishes nor diverges.
    """
    cells = list(itertools.product(options.rows, options.seeds))
    configs = [parse_config(training(options, *cell)) for cell in cells]
    for cell, config in zip(cells, configs, strict=True):
        has_steps = config.training.max_train_steps is not None
        require(config.training, "num_train_epochs", has_steps, "no epochs in an ablation; use --max_train_steps N")
        check_same(run_folder(options, *cell), config)
        parse_options(evaluation(options, run_folder(options, *cell), config), EvaluateConfig, Sampling)
    runs: dict[str, list[dict[str, Any]]] = {row: [] for row in options.rows}
    for (row, seed), config in zip(cells, configs, strict=True):
        folder, steps = run_folder(options, row, seed), config.training.max_train_steps
        if outcome(folder, steps) is None:
            code = run("train", training(options, row, seed))
            if outcome(folder, steps) is None:
                raise OSError(f"{folder}: training failed with exit code {code}; see its error above")
        result = outcome(folder, steps) or evaluated(options, folder, config)
        if result is None:
            code = run("evaluate", evaluation(options, folder, config))
            result = evaluated(options, folder, config)
            if result is None:
                raise OSError(f"{folder}: evaluation failed with exit code {code}; see its error above")
        runs[row].append({"seed": seed, **result})
    report(options, runs)


def run_folder(options: AblationOptions, row: str, seed: int) -> Path:
    """Return the folder of a run."""
    return Path(options.output) / "ablation" / f"{row}-seed{seed}"


def training(options: AblationOptions, row: str, seed: int) -> list[str]:
    """Return the arguments of `hf-ddpm train` for a run."""
    values = {
        "preset": options.preset,
        "config": options.config,
        "seed": seed,
        "output_dir": run_folder(options, row, seed),
        "max_train_steps": options.max_train_steps,
        "eval_metrics": "",
    }
    arguments = [*arguments_of(values), *ROWS[row].arguments]
    is_auto = parse_config(arguments).training.mixed_precision == "auto"
    return [*arguments, "--mixed_precision", "no"] if is_auto else arguments  # the same precision for all rows


def check_same(folder: Path, config: Config) -> None:
    """Raise a `ValueError` if a folder contains a run with other options."""
    try:
        stored = default_options() | yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    new = {name: value for name, value in config.to_dict().items() if name not in {*NOT_ABOUT_WEIGHTS, "output_dir"}}
    if new["max_train_steps"] > (stored["max_train_steps"] or 0):
        del new["max_train_steps"]  # the run is resumed
    changed = [f"{name}={new[name]!r} (was {stored[name]!r})" for name in new if stored[name] != new[name]]
    if changed:
        raise ValueError(f"{folder}: contains a run with other options ({', '.join(changed)}); choose another --output")


def outcome(folder: Path, steps: int) -> dict[str, Any] | None:
    """Return `diverged_at` of a diverged run, an empty dictionary for a finished run, None for any other."""
    try:
        status = json.loads((folder / "status.json").read_text())
        if status["status"] == "failed" and status["error"].startswith("FloatingPointError"):
            return {"diverged_at": status["step"]}
        return {} if status["status"] == "finished" and status["step"] >= steps else None
    except (FileNotFoundError, KeyError, ValueError):  # a killed process may leave an empty file
        return None


def evaluation(options: AblationOptions, folder: Path, config: Config) -> list[str]:
    """Return the arguments of `hf-ddpm evaluate` for a run."""
    total = config.diffusion.num_train_timesteps
    steps = options.num_inference_steps or total
    require(options, "num_inference_steps", steps <= total, f"at most {total}, the number of diffusion steps")
    values = {
        **real_images(config),
        "model": folder,
        "output": folder / RESULTS,
        "metrics": ",".join(METRICS),
        "num_images": options.num_images,
        "num_inference_steps": steps,
        "seed": config.training.seed,
        "mixed_precision": "no",
    }
    return arguments_of(values)


def evaluated(options: AblationOptions, folder: Path, config: Config) -> dict[str, Any] | None:
    """Return the results of a run, or None if they are missing or were made with other weights or options."""
    request, sampling = parse_options(evaluation(options, folder, config), EvaluateConfig, Sampling)
    replaced = sampling.replaced_variance(config.diffusion.variance_type, config.diffusion.num_train_timesteps)
    expected = {"request": asdict(request), "sampling": asdict(sampling) | {"variance": replaced}}
    try:
        results, exported = (json.loads((folder / name).read_text()) for name in (RESULTS, "export.json"))
        metrics = {name: results[name] for name in METRICS}
    except (FileNotFoundError, KeyError, ValueError):
        return None
    same = results["model"]["checksum"] == exported["checksum"] and all(
        metric["made_by"][kind].get(name) == value
        for metric in metrics.values()
        for kind, values in expected.items()
        for name, value in values.items()
        if name not in UNRELATED_OPTIONS
    )
    return metrics if same else None


def report(options: AblationOptions, results: dict[str, list[dict[str, Any]]]) -> None:
    """Write the three files."""
    rows = {}
    for row, runs in results.items():
        rows[row] = {"title": ROWS[row].title, "words": ROWS[row].arguments, "paper_fid": ROWS[row].paper_fid}
        rows[row] |= {metric: spread([run[metric]["value"] for run in runs if metric in run]) for metric in METRICS}
        rows[row] |= {"diverged": sum("diverged_at" in run for run in runs), "runs": runs}
    same, pairs = agreement({row: None if entry["diverged"] else entry["fd"] for row, entry in rows.items()})
    summary = {"options": asdict(options), "rows": rows, "pairs": pairs, "pairs_in_the_order_of_the_paper": same}
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, content in (("json", to_json(summary, indent=2) + "\n"), ("md", text(summary))):
        write_text(folder / f"ablation.{suffix}", content)
    draw(options, results)


def spread(values: list[float]) -> dict[str, float] | None:
    """Return mean and standard deviation of the values of several seeds, or None without values."""
    if not values:
        return None
    deviation = {"standard_deviation": statistics.stdev(values)} if len(values) > 1 else {}
    return {"mean": statistics.fmean(values), **deviation}


def agreement(distances: dict[str, dict[str, float] | None]) -> tuple[int, int]:
    """Return the number of row pairs ordered as in the paper, and the number of pairs that the paper orders.

    Rows without a value rank last.
    """
    same = pairs = 0
    for row, other in itertools.combinations(distances, 2):
        paper = [math.inf if ROWS[name].paper_fid is None else ROWS[name].paper_fid for name in (row, other)]
        ours = [math.inf if entry is None else entry["mean"] for entry in (distances[row], distances[other])]
        if paper[0] != paper[1]:
            pairs += 1
            same += ours[0] != ours[1] and (ours[0] < ours[1]) == (paper[0] < paper[1])
    return same, pairs


def text(summary: dict[str, Any]) -> str:
    """Return the text of the figure, in Markdown."""
    rows, options = summary["rows"].values(), summary["options"]
    cells = []
    for row in rows:
        paper = "-" if row["paper_fid"] is None else row["paper_fid"]
        diverged = f"{row['diverged']} of {len(row['runs'])}"
        cells.append([row["title"], *(as_text(row[metric]) for metric in METRICS), diverged, paper])
    paragraphs = [
        "## Ablation of prediction targets and objectives (Table 2)",
        table(["prediction: objective", *METRICS.values(), "diverged", "FID in the paper"], cells),
    ]
    finished = [run["fd"] for row in rows for run in row["runs"] if "fd" in run]
    if finished:
        fd, made_by, data = finished[0], finished[0]["made_by"], finished[0]["made_by"]["dataset"]
        paragraphs += [
            f"Preset {options['preset']}, seeds {', '.join(map(str, options['seeds']))}: mean ± standard deviation "
            f"over the finished runs. {fd['num_images']} samples with {made_by['sampling']['num_inference_steps']} "
            f"steps, compared with {fd['reference_images']} images of {data['name']} ({data['reference_split']}); "
            f"features: {made_by['extractor']['name']}. The paper's FID is for CIFAR-10.",
            captioned("ablation.png", "Samples of every row", "Samples of every row, for the first finished seed."),
        ]
    paragraphs.append(
        f"The FID of the paper orders {summary['pairs']} pairs of rows; here, "
        f"{summary['pairs_in_the_order_of_the_paper']} of them have the same order. Rows with a diverged run, or "
        "without a FID in the paper, rank last."
    )
    return "\n\n".join(paragraphs) + "\n"


def as_text(entry: dict[str, float] | None) -> str:
    """Return mean and standard deviation as text."""
    return "-" if entry is None else with_error(entry["mean"], entry.get("standard_deviation"))


def draw(options: AblationOptions, results: dict[str, list[dict[str, Any]]]) -> None:
    """Draw samples of every row, for its first finished seed."""
    rows = []
    for row, runs in results.items():
        finished = [run for run in runs if "fd" in run]
        if finished:
            name = Path(finished[0]["fd"]["made_by"]["samples"]).name
            samples = SampleFolder.read(
                run_folder(options, row, finished[0]["seed"]) / "results_ablation_samples" / name
            )
            rows.append((row, bytes_to_unit(samples[torch.arange(min(SHOWN, len(samples)))])))
    if rows:
        save_picture(sheet(rows, [""] * len(rows[0][1])), Path(options.output) / "ablation.png")
