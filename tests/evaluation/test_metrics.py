"""Metric modules for `evaluate` (slow, since importing `evaluate` takes seconds)."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import hf_ddpm
from hf_ddpm.evaluation.frechet import Moments, frechet_distance
from hf_ddpm.evaluation.inception_score import inception_score
from hf_ddpm.evaluation.kernel import kernel_distance, squared_mmd
from hf_ddpm.evaluation.precision_recall import precision_recall
from tests.conftest import LIMIT

METRICS = Path(hf_ddpm.__file__).parent / "evaluation" / "metrics"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    import evaluate

    cache = str(tmp_path_factory.mktemp("metrics"))
    return lambda name: evaluate.load(str(METRICS / name), cache_dir=cache)


@pytest.fixture(scope="module")
def sets():
    rng = np.random.default_rng(0)
    return rng.normal(size=(60, 5)).astype(np.float32), rng.normal(loc=0.5, size=(50, 5)).astype(np.float32)


def compute(metric, generated, real, **options):
    # Add rows of both kinds, mixed, in batches.
    rows = [(row.tobytes(), kind) for kind, part in ((False, generated), (True, real)) for row in part]
    for start in range(7):
        features, is_real = zip(*rows[start::7], strict=True)
        metric.add_batch(features=list(features), is_real=list(is_real))
    return metric.compute(**options)


def test_modules_equal_functions(load, sets):
    generated, real = sets
    x, y = torch.tensor(generated), torch.tensor(real)
    distance = frechet_distance(Moments.of(x), Moments.of(y))
    assert compute(load("frechet_distance"), *sets)["frechet_distance"] == pytest.approx(distance, rel=1e-12)
    double = compute(load("frechet_distance"), generated.astype(float), real.astype(float), dtype="float64")
    assert double["frechet_distance"] == pytest.approx(distance, rel=1e-12)
    assert compute(load("kernel_distance"), *sets)["kernel_distance"] == pytest.approx(squared_mmd(x, y), rel=1e-12)
    precision, recall = precision_recall(x, y, k=2)
    assert compute(load("precision_recall"), *sets, k=2) == {"precision": precision, "recall": recall}


def test_blocks_are_shuffled_by_seed(load, sets):
    metric = load("kernel_distance")
    for part in sets:
        kind = part is sets[1]
        metric.add_batch(features=[row.tobytes() for row in part], is_real=[kind] * len(part))
    value, error = kernel_distance(*map(torch.tensor, sets), block_size=10, seed=3)
    assert metric.compute(block_size=10, seed=3) == {"kernel_distance": value, "standard_error": error}


def test_inception_score_module_equals_function(load):
    p = np.random.default_rng(1).dirichlet(np.ones(4), 40).astype(np.float32)
    metric = load("inception_score")
    metric.add_batch(probabilities=[row.tobytes() for row in p])
    score, deviation = inception_score(torch.tensor(p), splits=4, seed=2)
    assert metric.compute(splits=4, seed=2) == {"inception_score": score, "standard_deviation": deviation}


def test_nats_are_converted_to_bits_per_dimension(load):
    # A uniform byte has ln 256 nats, which are 8 bits.
    result = load("bits_per_dim").compute(nats=[12 * math.log(256)] * 3, dimensions=12)
    assert result == {"bits_per_dim": pytest.approx(8), "standard_error": pytest.approx(0)}
    result = load("bits_per_dim").compute(nats=[math.log(2), 3 * math.log(2)], dimensions=1)
    assert result == {"bits_per_dim": pytest.approx(2), "standard_error": pytest.approx(1)}
    assert load("bits_per_dim").compute(nats=[math.log(2)], dimensions=1) == {"bits_per_dim": pytest.approx(1)}


def test_invalid_rows_raise_errors(load, sets):
    for bad, options, message in [
        ([b"1234", b"12345678"], {}, r"rows of \[4, 8\] bytes: expected equal lengths, a multiple of 4"),
        ([b"1234", b"1234"], {"dtype": "float64"}, r"rows of \[4\] bytes: expected .* a multiple of 8"),
        ([b"1234", b"1234"], {"dtype": "int8"}, "dtype='int8': expected one of float32, float64"),
    ]:
        metric = load("frechet_distance")
        metric.add_batch(features=bad, is_real=[True, False])
        with pytest.raises(ValueError, match=message):
            metric.compute(**options)
    with pytest.raises(ValueError, match="dimensions=0: expected at least 1"):
        load("bits_per_dim").compute(nats=[1.0], dimensions=0)


PROCESS = """
import sys
import evaluate, numpy as np
folder, cache, data, rank = *sys.argv[1:4], int(sys.argv[4])
metric = evaluate.load(folder, num_process=2, process_id=rank, experiment_id="two", cache_dir=cache)
generated, real = (np.load(f"{data}/{name}.npy")[rank::2] for name in ("generated", "real"))
for part, kind in ((generated, False), (real, True)):
    metric.add_batch(features=[row.tobytes() for row in part], is_real=[kind] * len(part))
result = metric.compute()
print(result["frechet_distance"].hex() if rank == 0 else result)
"""


def test_two_processes_give_result_of_one(sets, tmp_path):
    for name, part in zip(("generated", "real"), sets, strict=True):
        np.save(tmp_path / f"{name}.npy", part)
    command = [sys.executable, "-c", PROCESS, str(METRICS / "frechet_distance"), str(tmp_path / "cache"), str(tmp_path)]
    ranks = [subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(2)]
    outputs = [process.communicate(timeout=LIMIT)[0].split() for process in ranks]
    alone = frechet_distance(*(Moments.of(torch.tensor(part)) for part in sets))
    assert float.fromhex(outputs[0][-1]) == pytest.approx(alone, rel=1e-12) and outputs[1][-1] == "None"
