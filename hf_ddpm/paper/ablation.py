"""Prediction targets and objectives (Section 4.2, Table 2): train every row, from several seeds, and compare."""

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

from hf_ddpm.config import BESIDE_TRAINING, Config, default_options, parse_config
from hf_ddpm.evaluation.options import NOT_OF_FIGURES, EvaluateConfig, real_images
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
        words: Its options of `hf-ddpm train`.
        paper: Its FID in the paper; None if training was unstable and the samples poor.
    """

    title: str
    words: tuple[str, ...]
    paper: float | None


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
    """Train and evaluate what is missing, and write `ablation`, .json, .md and .png; resume after a kill.

    Args:
        options: Rows, seeds, and settings of the runs.
        run: Runs `hf-ddpm train` or `evaluate` with a command line, and returns its exit code.

    Raises:
        ValueError: If an option is not allowed, or there are runs of other options: before anything is trained.
        OSError: If a run ends otherwise than finished or diverged.
    """
    cells = list(itertools.product(options.rows, options.seeds))
    configs = [parse_config(training(options, *cell)) for cell in cells]
    for cell, config in zip(cells, configs, strict=True):
        require(config.training, "num_train_epochs", config.training.max_train_steps is not None, "not in an ablation")
        check_same(run_folder(options, *cell), config)
        parse_options(evaluation(options, run_folder(options, *cell), config), EvaluateConfig, Sampling)
    runs: dict[str, list[dict[str, Any]]] = {row: [] for row in options.rows}
    for (row, seed), config in zip(cells, configs, strict=True):
        folder, steps = run_folder(options, row, seed), config.training.max_train_steps
        if outcome(folder, steps) is None:
            code = run("train", training(options, row, seed))
            if outcome(folder, steps) is None:
                raise OSError(f"{folder}: the training ended with code {code}, see above")
        result = outcome(folder, steps) or evaluated(options, folder, config)
        if result is None:
            code = run("evaluate", evaluation(options, folder, config))
            result = evaluated(options, folder, config)
            if result is None:
                raise OSError(f"{folder}: the evaluation ended with code {code}, see above")
        runs[row].append({"seed": seed, **result})
    report(options, runs)


def run_folder(options: AblationOptions, row: str, seed: int) -> Path:
    """Return the folder of a run."""
    return Path(options.output) / "ablation" / f"{row}-seed{seed}"


def training(options: AblationOptions, row: str, seed: int) -> list[str]:
    """Return the command line of `hf-ddpm train` for a run."""
    given = {
        "preset": options.preset,
        "config": options.config,
        "seed": seed,
        "output_dir": run_folder(options, row, seed),
        "max_train_steps": options.max_train_steps,
        "eval_metrics": "",
    }
    words = [*command_line(given), *ROWS[row].words]
    is_auto = parse_config(words).training.mixed_precision == "auto"
    return [*words, "--mixed_precision", "no"] if is_auto else words  # all rows in one precision


def check_same(folder: Path, config: Config) -> None:
    """Raise a `ValueError` if a folder holds a run of other options."""
    try:
        stored = default_options() | yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    asked = {name: value for name, value in config.to_dict().items() if name not in {*BESIDE_TRAINING, "output_dir"}}
    if asked["max_train_steps"] > (stored["max_train_steps"] or 0):
        del asked["max_train_steps"]  # it is resumed
    changed = [f"{name}={asked[name]!r} (was {stored[name]!r})" for name in asked if stored[name] != asked[name]]
    if changed:
        raise ValueError(f"{folder} holds a run of other options, choose another output: {', '.join(changed)}")


def outcome(folder: Path, steps: int) -> dict[str, Any] | None:
    """Return `diverged_at` of a run that has diverged, nothing of one that has finished; None if it is missing."""
    try:
        status = json.loads((folder / "status.json").read_text())
        if status["status"] == "failed" and status["error"].startswith("FloatingPointError"):
            return {"diverged_at": status["step"]}
        return {} if status["status"] == "finished" and status["step"] >= steps else None
    except (FileNotFoundError, KeyError, ValueError):  # a kill may have left an empty file
        return None


def evaluation(options: AblationOptions, folder: Path, config: Config) -> list[str]:
    """Return the command line of `hf-ddpm evaluate` for a run."""
    total = config.diffusion.num_train_timesteps
    steps = options.num_inference_steps or total
    require(options, "num_inference_steps", steps <= total, f"at most the {total} of the process")
    given = {
        **real_images(config),
        "model": folder,
        "output": folder / RESULTS,
        "metrics": ",".join(METRICS),
        "num_images": options.num_images,
        "num_inference_steps": steps,
        "seed": config.training.seed,
        "mixed_precision": "no",
    }
    return command_line(given)


def command_line(given: dict[str, Any]) -> list[str]:
    """Return options as the words of a command line; None is left to the default."""
    return [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]


def evaluated(options: AblationOptions, folder: Path, config: Config) -> dict[str, Any] | None:
    """Return the figures of a run, or None if they are missing, of other weights, or of another request."""
    request, sampling = parse_options(evaluation(options, folder, config), EvaluateConfig, Sampling)
    replaced = sampling.replaced_variance(config.diffusion.variance_type, config.diffusion.num_train_timesteps)
    asked = {"request": asdict(request), "sampling": asdict(sampling) | {"variance": replaced}}
    try:
        results, exported = (json.loads((folder / name).read_text()) for name in (RESULTS, "export.json"))
        figures = {name: results[name] for name in METRICS}
    except (FileNotFoundError, KeyError, ValueError):
        return None
    same = results["model"]["checksum"] == exported["checksum"] and all(
        figure["made_by"][kind].get(name) == value
        for figure in figures.values()
        for kind, values in asked.items()
        for name, value in values.items()
        if name not in NOT_OF_FIGURES
    )
    return figures if same else None


def report(options: AblationOptions, found: dict[str, list[dict[str, Any]]]) -> None:
    """Write the three files."""
    rows = {}
    for row, runs in found.items():
        rows[row] = {"title": ROWS[row].title, "words": ROWS[row].words, "paper_fid": ROWS[row].paper}
        rows[row] |= {metric: spread([run[metric]["value"] for run in runs if metric in run]) for metric in METRICS}
        rows[row] |= {"diverged": sum("diverged_at" in run for run in runs), "runs": runs}
    same, pairs = agreement({row: None if entry["diverged"] else entry["fd"] for row, entry in rows.items()})
    figures = {"options": asdict(options), "rows": rows, "pairs": pairs, "pairs_in_the_order_of_the_paper": same}
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    for name, words in (("json", to_json(figures, indent=2) + "\n"), ("md", text(figures))):
        write_text(folder / f"ablation.{name}", words)
    draw(options, found)


def spread(values: list[float]) -> dict[str, float] | None:
    """Return mean and standard deviation of the values of several seeds; None if there is none."""
    if not values:
        return None
    deviation = {"standard_deviation": statistics.stdev(values)} if len(values) > 1 else {}
    return {"mean": statistics.fmean(values), **deviation}


def agreement(distances: dict[str, dict[str, float] | None]) -> tuple[int, int]:
    """Return how many pairs of rows are in the order of the paper, and how many pairs it orders; a dash is last."""
    same = pairs = 0
    for row, other in itertools.combinations(distances, 2):
        paper = [math.inf if ROWS[name].paper is None else ROWS[name].paper for name in (row, other)]
        here = [math.inf if found is None else found["mean"] for found in (distances[row], distances[other])]
        if paper[0] != paper[1]:
            pairs += 1
            same += here[0] != here[1] and (here[0] < here[1]) == (paper[0] < paper[1])
    return same, pairs


def text(figures: dict[str, Any]) -> str:
    """Return the text of the figure, in Markdown."""
    rows, options = figures["rows"].values(), figures["options"]
    cells = []
    for row in rows:
        paper = "-" if row["paper_fid"] is None else row["paper_fid"]
        diverged = f"{row['diverged']} of {len(row['runs'])}"
        cells.append([row["title"], *(in_words(row[metric]) for metric in METRICS), diverged, paper])
    words = [
        "## What to predict and what to minimize (Table 2)",
        table(["what is predicted: what is minimized", *METRICS.values(), "diverged", "FID in the paper"], cells),
    ]
    finished = [run["fd"] for row in rows for run in row["runs"] if "fd" in run]
    if finished:
        fd, made_by, data = finished[0], finished[0]["made_by"], finished[0]["made_by"]["dataset"]
        words += [
            f"Preset {options['preset']}, seeds {', '.join(map(str, options['seeds']))}: mean and standard deviation "
            f"over the seeds that finished. {fd['num_images']} images in {made_by['sampling']['num_inference_steps']} "
            f"steps against the {fd['reference_images']} of {data['name']} ({data['reference_split']}), features: "
            f"{made_by['extractor']['name']}. The paper's figures are of CIFAR-10.",
            captioned("ablation.png", "Samples of every row", "Samples of the first seed that finished, row by row."),
        ]
    words.append(
        f"{figures['pairs_in_the_order_of_the_paper']} of the {figures['pairs']} pairs of rows that the paper's FID "
        "orders are in the same order here; a row of which a run diverged, like a dash of the paper, is last."
    )
    return "\n\n".join(words) + "\n"


def in_words(found: dict[str, float] | None) -> str:
    """Return mean and standard deviation as text."""
    return "-" if found is None else with_error(found["mean"], found.get("standard_deviation"))


def draw(options: AblationOptions, found: dict[str, list[dict[str, Any]]]) -> None:
    """Draw samples of every row, those of its first seed that finished."""
    rows = []
    for row, runs in found.items():
        finished = [run for run in runs if "fd" in run]
        if finished:
            name = Path(finished[0]["fd"]["made_by"]["samples"]).name
            samples = SampleFolder.read(
                run_folder(options, row, finished[0]["seed"]) / "results_ablation_samples" / name
            )
            rows.append((row, bytes_to_unit(samples[torch.arange(min(SHOWN, len(samples)))])))
    if rows:
        save_picture(sheet(rows, [""] * len(rows[0][1])), Path(options.output) / "ablation.png")
