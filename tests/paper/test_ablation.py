import itertools
import json
import math
import tempfile
from pathlib import Path

import pytest
import yaml
from PIL import Image

from hf_ddpm.config import parse_config
from hf_ddpm.diffusion.losses import Objective
from hf_ddpm.evaluation.options import EvaluateConfig
from hf_ddpm.paper import options as figure_options
from hf_ddpm.paper.ablation import (
    RESULTS,
    ROWS,
    ablation,
    agreement,
    evaluated,
    evaluation,
    outcome,
    run_folder,
    spread,
    training,
)
from hf_ddpm.paper.options import AblationOptions
from hf_ddpm.sampling.options import Sampling
from hf_ddpm.utils.options import parse_options
from tests.conftest import load_script

TINY = """
block_out_channels: [8, 16]
norm_num_groups: 4
layers_per_block: 1
train_batch_size: 8
num_samples: 4
num_inference_steps: 2
log_steps: 2
lr_schedule: constant
warmup_steps: 2
"""


@pytest.fixture(scope="module")
def train():
    mains = {name: load_script(name).main for name in ("train", "evaluate")}

    def run(script, arguments):
        try:
            return mains[script](arguments)
        except FloatingPointError:
            return 1

    return run


def options(folder, more="", **others):
    config = Path(tempfile.mkdtemp()) / "tiny.yaml"
    config.write_text(TINY + more)
    few = {"rows": ["mean-fixed", "epsilon-simple"], "seeds": [3, 4], "max_train_steps": 2, "num_images": 8}
    return AblationOptions(**{"output": str(folder), "config": str(config), "num_inference_steps": 2, **few, **others})


def written(folder):
    return json.loads((folder / "ablation.json").read_text())


def test_rows_have_options_of_table_2():
    expected = {
        "mean-learned": ("mean", "vlb", "learned"), "mean-fixed": ("mean", "vlb", "fixed_small"),
        "mean-simple": ("mean", "simple", "fixed_small"), "epsilon-learned": ("epsilon", "vlb", "learned"),
        "epsilon-fixed": ("epsilon", "vlb", "fixed_small"), "epsilon-simple": ("epsilon", "simple", "fixed_small"),
    }  # fmt: skip
    for row, (prediction, objective, variance) in expected.items():
        config = parse_config(training(AblationOptions(), row, 5))
        assert config.diffusion.prediction_type == prediction and config.training.objective == objective
        assert config.diffusion.variance_type == variance and config.training.seed == 5
        Objective(objective, prediction, variance)  # raises a ValueError for invalid combinations
    assert list(expected) == list(ROWS) == figure_options.ROWS
    assert [row.paper_fid for row in ROWS.values()] == [23.69, 13.22, None, None, 13.51, 3.17]


@pytest.fixture(scope="module")
def finished(train, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablation")
    ablation(options(folder), train)
    return folder


def test_rows_are_trained_evaluated_and_summarized(finished):
    rows = written(finished)["rows"]
    assert list(rows) == ["mean-fixed", "epsilon-simple"]
    for name, row in rows.items():
        values = []
        for run in row["runs"]:
            results = json.loads((finished / "ablation" / f"{name}-seed{run['seed']}" / RESULTS).read_text())
            assert run["fd"] == results["fd"] and run["is"] == results["is"] and run["fd"]["num_images"] == 8
            values.append(run["fd"]["value"])
        assert row["fd"]["mean"] == pytest.approx(sum(values) / 2) and row["diverged"] == 0
        assert row["fd"]["standard_deviation"] == pytest.approx(abs(values[0] - values[1]) / math.sqrt(2))
    assert values[0] != values[1]  # two seeds
    text = (finished / "ablation.md").read_text()
    assert "| noise: squared error (L_simple) |" in text and "| 0 of 2 | 3.17 |" in text and " ± " in text
    assert "8 samples with 2 steps, compared with 898 images of digits (train); features: digits" in text
    with Image.open(finished / "ablation.png") as picture:
        assert picture.height > 2 * 64


def test_finished_runs_are_not_trained_again(finished, train):
    before = (finished / "ablation.md").read_text()
    ablation(options(finished), lambda script, arguments: pytest.fail("ran again"))
    assert (finished / "ablation.md").read_text() == before


def test_runs_of_older_versions_without_newer_options_are_reused(finished):
    for file in (finished / "ablation").glob("*/config.yaml"):
        stored = yaml.safe_load(file.read_text())
        for name in ("num_train_epochs", "lr_power", "weight_decay", "adam_beta1"):
            del stored[name]
        file.write_text(yaml.safe_dump(stored))
    ablation(options(finished), lambda script, arguments: pytest.fail("ran again"))


def test_results_with_other_evaluation_options_are_not_reused(finished):
    for more, others in [("", {}), ("eval_split: validation", {}), ("eval_extractor: org/model", {}),
                         ("", {"num_images": 9}), ("", {"num_inference_steps": 3})]:  # fmt: skip
        new = options(finished, more, **others)
        results = evaluated(new, run_folder(new, "mean-fixed", 3), parse_config(training(new, "mean-fixed", 3)))
        assert (results is None) == bool(more or others)


def test_results_of_few_steps_with_small_variance_are_reused(train, tmp_path):
    chosen = options(tmp_path, "variance_type: fixed_large\n", rows=["epsilon-simple"], seeds=[3])
    ablation(chosen, train)
    config = parse_config(training(chosen, "epsilon-simple", 3))
    results = evaluated(chosen, run_folder(chosen, "epsilon-simple", 3), config)
    assert results is not None and results["fd"]["made_by"]["sampling"]["variance"] == "fixed_small"


def test_runs_are_evaluated_with_their_value_range(tmp_path):
    chosen = options(tmp_path, "value_range: [0, 4095]\n")
    config = parse_config(training(chosen, "mean-fixed", 3))
    arguments = evaluation(chosen, run_folder(chosen, "mean-fixed", 3), config)
    request, _ = parse_options(arguments, EvaluateConfig, Sampling)
    assert request.value_range == config.data.value_range == [0, 4095]


def test_runs_with_other_options_are_rejected(finished):
    for other, change in [({"more": "learning_rate: 0.5"}, r"learning_rate=0.5 \(was 0.001\)"),
                          ({"max_train_steps": 1}, r"max_train_steps=1 \(was 2\)")]:  # fmt: skip
        message = rf"mean-fixed-seed3: contains a run with other options \({change}\); choose another --output$"
        with pytest.raises(ValueError, match=message):
            ablation(options(finished, **other), lambda script, arguments: pytest.fail("trained"))


def test_interrupted_and_extended_runs_are_resumed(finished, train):
    status = finished / "ablation" / "mean-fixed-seed3" / "status.json"
    status.write_text(json.dumps({**json.loads(status.read_text()), "status": "preempted"}))
    calls = []
    ablation(options(finished), lambda script, arguments: (calls.append(arguments), train(script, arguments))[1])
    assert calls and all(str(status.parent) in " ".join(arguments) for arguments in calls)
    one, before = {"rows": ["mean-fixed"], "seeds": [3], "max_train_steps": 3}, written(finished)["rows"]["mean-fixed"]
    ablation(options(finished, **one), train)
    assert json.loads(status.read_text())["step"] == 3
    (run,) = written(finished)["rows"]["mean-fixed"]["runs"]
    assert run["fd"]["value"] != before["runs"][0]["fd"]["value"]  # evaluated again with the new weights


def test_diverged_rows_have_dash(train, tmp_path):
    fast = "learning_rate: 1e30\nmax_grad_norm: 1e30\n"
    wild = options(tmp_path, fast, rows=["epsilon-simple"], seeds=[0], max_train_steps=4)
    ablation(wild, train)
    row = written(tmp_path)["rows"]["epsilon-simple"]
    assert row["diverged"] == 1 and row["fd"] is None and "diverged_at" in row["runs"][0]
    assert "| noise: squared error (L_simple) | - | - | 1 of 1 | 3.17 |" in (tmp_path / "ablation.md").read_text()
    ablation(wild, lambda script, arguments: pytest.fail("ran again"))


def test_failed_run_stops_ablation(tmp_path):
    with pytest.raises(OSError, match="mean-fixed-seed3: training failed with exit code 7; see its error above"):
        ablation(options(tmp_path), lambda script, arguments: 7)
    folder = tmp_path / "ablation" / "mean-fixed-seed3"
    folder.mkdir(parents=True)
    (folder / "status.json").write_text('{"status": "failed", "step": 1, "error": "OSError: disk full"}')
    assert outcome(folder, 1) is None
    (folder / "status.json").write_text("")
    assert outcome(folder, 1) is None
    (folder / "status.json").write_text('{"status": "finished", "step": 2}')
    with pytest.raises(OSError, match="mean-fixed-seed3: evaluation failed with exit code 7; see its error above"):
        ablation(options(tmp_path), lambda script, arguments: 7)


def test_invalid_options_are_reported_before_training(tmp_path):
    for wrong, message in [
        ({"rows": ["x"]}, r"--rows x: expected any of mean-learned"),
        ({"seeds": [1, 1]}, r"--seeds 1 1: expected each value only once"),
        ({"seeds": []}, r"--seeds: expected one or more seeds"),
        ({"max_train_steps": 0}, "--max_train_steps 0: expected at least 1"),
        ({"num_inference_steps": 1001}, "--num_inference_steps 1001: expected at most 1000, the number of diff"),
        ({"num_images": 1}, "--num_images 1: expected at least 2"),
        ({"preset": "cats"}, "--preset cats: expected one of"),
        ({"config": "none.yaml"}, "--config none.yaml: cannot be read"),
        ({"max_train_steps": None, "more": "num_train_epochs: 2"}, "--num_train_epochs 2: .* use --max_train_steps N"),
        ({"more": "eval_split: train"}, "split.*train.*: equals the reference split, .*expected another split"),
    ]:
        with pytest.raises(ValueError, match=message):
            ablation(options(tmp_path, **wrong), lambda script, arguments: pytest.fail("trained"))
    assert not any(tmp_path.iterdir())


def test_agreement_counts_pairs_in_order_of_paper():
    def entries(values):
        return {name: None if math.isnan(value) else {"mean": value} for name, value in values.items()}

    nan = math.nan
    paper = dict(zip(ROWS, [23.69, 13.22, nan, nan, 13.51, 3.17], strict=True))
    # The paper orders all of the 15 pairs except that of its two rows without FID.
    assert agreement(entries(paper)) == (14, 14)
    assert agreement(entries({**paper, "mean-fixed": 14.0})) == (13, 14)
    assert agreement(entries(dict.fromkeys(ROWS, 1.0))) == (0, 14)
    assert len(list(itertools.combinations(ROWS, 2))) == 15
    assert spread([]) is None and spread([2.0]) == {"mean": 2.0}
    assert spread([1.0, 3.0]) == {"mean": 2.0, "standard_deviation": pytest.approx(math.sqrt(2))}
