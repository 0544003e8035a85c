import diffusers
import pytest
import torch
from accelerate.state import AcceleratorState

from benchmarks.equality import check_as_timed, exclusion_reason
from benchmarks.options import parse_benchmark
from benchmarks.ours import Ours
from benchmarks.setting import Setting, new_accelerator, own_precision
from benchmarks.stock import Stock
from hf_ddpm import UNet2DModel
from hf_ddpm.models.precision import Choice
from tests.benchmarks.conftest import WORDS, rows_by

CPU = torch.device("cpu")
TASKS = ("--tasks", "forward,sampling,train_step", "--against", "diffusers")


@pytest.fixture
def passes(monkeypatch):
    """Records for all passes: class of the network, whether with gradients, and whether in bf16."""
    seen = set()

    def watch(kind):
        original = kind.forward

        def forward(self, *args, **more):
            cast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
            bf16 = cast or self.conv_in.weight.dtype == torch.bfloat16
            seen.add((kind, torch.is_grad_enabled(), bf16))
            return original(self, *args, **more)

        monkeypatch.setattr(kind, "forward", forward)

    watch(UNet2DModel)
    watch(diffusers.UNet2DModel)
    monkeypatch.setattr("benchmarks.contender.count_flops", lambda network, *inputs: (1.0, 3.0))
    return seen


def test_ours_in_bf16_compared_with_others_in_float32(benchmark, passes):
    words = (*TASKS, "--check", "false", "--mixed_precision", "bf16", "--others_precision", "no")
    report, printed = benchmark(*words)
    assert passes == {
        (kind, grad, bf16) for kind, bf16 in ((UNet2DModel, True), (diffusers.UNet2DModel, False)) for grad in (0, 1)
    }
    precisions = {"hf_ddpm": "bf16", "diffusers": "no"}
    rows = rows_by(report)
    assert {row: entry["precision"] for row, entry in rows.items()} == {row: precisions[row[1]] for row in rows}
    assert "Precision: hf_ddpm in bf16; diffusers in float32. " in printed
    assert "| forward | diffusers | float32 | " in printed and "| train_step | hf_ddpm | bf16 | " in printed
    for row in rows.values():  # compared with the rates of the same precision
        assert row["of_matmul"] == row["flops_per_second"] / report["rates"][row["precision"]]["matmul"]


def test_all_contenders_use_one_precision_by_default(benchmark, passes):
    report, printed = benchmark(*TASKS, "--check", "false", "--mixed_precision", "bf16")
    assert {bf16 for _, _, bf16 in passes} == {True}
    assert "Precision: all contenders in bf16. " in printed and "| task | subject | median | " in printed
    assert {row["precision"] for row in report["rows"]} == {"bf16"} and report["rates"].keys() == {"bf16"}


def test_auto_uses_choice_of_package(benchmark, monkeypatch):
    def choose(network, shape, batch, training, compiled):
        assert type(network) is UNet2DModel and shape == (1, 8, 8) and not compiled
        bf16 = training or batch == 1
        return Choice("bf16", "bf16 pays") if bf16 else Choice("no", "float32 is faster")

    monkeypatch.setattr("benchmarks.setting.choose_precision", choose)
    words = ("--mixed_precision", "auto", "--check", "false", "--others_precision", "no")
    report, printed = benchmark(*TASKS, *words)
    actual = {task: row["precision"] for (task, subject), row in rows_by(report).items() if subject == "hf_ddpm"}
    assert actual == {"forward": "no", "sampling": "no", "sampling_1": "bf16", "train_step": "bf16"}
    assert report["precision_choices"] == ["float32 is faster", "bf16 pays"]
    line = "Precision: hf_ddpm in float32 and bf16 (auto: float32 is faster) (auto: bf16 pays); diffusers in float32. "
    assert line in printed
    assert parse_benchmark(["--preset", "digits"])[1].training.mixed_precision == "no"  # if the option is not given


def test_passes_in_half_precision_are_compared_with_float32(benchmark, tmp_path, monkeypatch):
    words = ("--mixed_precision", "bf16", "--others_precision", "no", "--tasks", "forward", "--against", "diffusers")
    report, printed = benchmark(*words)
    ours, theirs = report["equality"]
    timed = ours["outputs"]["passes as timed"]
    # bf16 has 8 bits: a rounding error is up to 2 ** -9, and tens of layers round.
    assert ours["subject"] == "hf_ddpm" and 2**-9 < timed["difference"] < timed["tolerance"] == 0.05
    assert theirs["subject"] == "diffusers" and theirs["outputs"].keys() == {"network", "gradients", "images"}
    difference = f"(relative error): passes as timed by {timed['difference']:.2g}."
    assert f"- Before timing, hf_ddpm differed from itself in float32 and not compiled {difference}" in printed
    assert "both in float32 and not compiled: network by" in printed

    class Unlike(Ours):
        def plain_network(self):
            return UNet2DModel(**self.setting.config.unet())  # random weights, as other libraries have

    class Wrong(Unlike):
        def predictor(self):
            right = super().predictor()
            return lambda: 1.06 * right()

    setting = Setting(*parse_benchmark([*WORDS, *words]), tmp_path)
    checks = check_as_timed(Unlike(setting), ["forward"])
    assert exclusion_reason(checks) is None and checks["passes as timed"]["difference"] == pytest.approx(
        timed["difference"], rel=0.1
    )
    checks = check_as_timed(Wrong(setting), ["forward"])
    assert checks["passes as timed"]["difference"] == pytest.approx(0.06, abs=0.02)
    assert exclusion_reason(checks).startswith("not compared: passes as timed: difference 0.0")


def test_accelerators_keep_their_precision():
    half, single = new_accelerator("bf16", CPU), new_accelerator("no", CPU)
    assert (half.mixed_precision, single.mixed_precision) == ("bf16", "no")
    with pytest.raises(KeyError), own_precision():
        raise KeyError
    assert AcceleratorState().mixed_precision == "no"  # precision of the last accelerator
    assert new_accelerator("bf16", CPU).mixed_precision == "bf16" and single.mixed_precision == "no"


@pytest.mark.slow
@pytest.mark.parametrize("dropout", ["0", "0.1"])
def test_contender_is_compiled_once_for_all_tasks(dropout, benchmark, monkeypatch):
    compiled, original = [], torch.nn.Module.compile
    backends = {}

    def compile(network, *, dynamic=None, **more):
        kind = type(network)

        def backend(graph, inputs):
            compiled.append((kind, torch.is_grad_enabled(), max(len(x) for x in inputs if x.dim() == 4)))
            return graph.forward

        # One backend per class: a new backend would compile again.
        return original(network, backend=backends.setdefault(kind, backend), dynamic=dynamic)

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    words = ("--tasks", "forward,train_step,training,sampling", "--against", "diffusers", "--mixed_precision", "bf16")
    report, _ = benchmark(*words, "--compile", "true", "--dropout", dropout)
    assert all(row["error"] is None for row in report["rows"])
    both = (Ours.network_class, Stock.network_class)
    # A graph without gradients for the batch and one for a single image, one with gradients.
    expected = [(kind, grad, batch) for kind in both for grad, batch in ((False, 8), (False, 1), (True, 8))]
    expected += [(Stock.network_class, True, 8)] * (dropout != "0")  # to check its gradients
    actual = [(kind, grad, 8 if batch > 1 else 1) for kind, grad, batch in compiled]
    assert sorted(actual, key=str) == sorted(expected, key=str)
