from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import Accelerator

from hf_ddpm import UNet2DModel
from hf_ddpm.config import Config, parse_config
from hf_ddpm.training import memory
from hf_ddpm.training.memory import MemoryPlan, count_pass, fit_memory, free_memory, out_of_memory_explained
from hf_ddpm.utils.launch import run_script
from hf_ddpm.utils.options import Auto
from tests.conftest import TINY_RUN, TINY_UNET

B = 4


def set_free(monkeypatch, size):
    monkeypatch.setattr(memory, "shared_free_memory", lambda accelerator: size)


def plan(*words):
    return MemoryPlan(parse_config([*TINY_RUN, *words]), Accelerator(cpu=True))


def kept_by_autograd(unet, x, t, precision):
    """Return the bytes that autograd saves for the backward pass, including the inputs of recomputed blocks."""
    weights = {parameter.data_ptr() for parameter in unet.parameters()}
    sizes, alive = {}, []

    def note(tensor):
        if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in weights:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
        return tensor

    for stage in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        if stage.gradient_checkpointing:
            call = stage._gradient_checkpointing_func
            stage._gradient_checkpointing_func = lambda block, *inputs, call=call: call(block, *map(note, inputs))
    half = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    with half, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        unet(x, t)
    sizes.pop(x.data_ptr(), None)  # counted with the images
    return sum(sizes.values())


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_bytes_kept_by_pass_are_counted_exactly(precision, checkpointing):
    torch.manual_seed(0)
    unet = UNet2DModel(**TINY_UNET).train()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    x, t = torch.randn(B, 1, 8, 8), torch.arange(B)
    kept = kept_by_autograd(unet, x, t, precision)
    with memory.FakeTensorMode():
        fake = UNet2DModel(**TINY_UNET).train()
        if checkpointing:
            fake.enable_gradient_checkpointing()
        counted, most, _ = count_pass(fake, torch.empty(B, 1, 8, 8), torch.zeros(B, dtype=torch.int64), precision)
    # CPU kernels keep the mean and reciprocal deviation of each group in float32, fake tensors in the input's dtype.
    norms = sum(isinstance(part, torch.nn.GroupNorm) and ".resnets" not in name * checkpointing
                for name, part in unet.named_modules())  # fmt: skip
    fewer = norms * B * TINY_UNET["norm_num_groups"] * 2 * (4 - 2) if precision == "bf16" else 0
    assert kept - counted == fewer and most > counted


def test_convolution_keeps_its_input():
    # y = conv(2 x): 2 x is kept until the backward pass; x and the weights are counted elsewhere.
    network = torch.nn.Conv2d(4, 4, 3, padding=1)
    kept, most, small = count_pass(lambda_network(network), torch.ones(4, 4, 8, 8), torch.zeros(4))
    assert kept == 4 * 4 * 4 * 64 and most == small > kept


def lambda_network(network):
    network.forward = lambda x, t, forward=network.forward: forward(x * 2)
    return network


def test_all_copies_of_weights_are_counted():
    # Weights, an average and two moments; plus gradients with several passes, and plus one copy per further average.
    weights = 4 * UNet2DModel(**parse_config(TINY_RUN).unet()).num_parameters()
    assert plan().count().weights == 4 * weights
    assert plan("--gradient_accumulation_steps", "2").count().weights == 5 * weights
    assert plan("--ema_decay", "0.9", "0.99").count().weights == 5 * weights


def test_only_runs_that_do_not_fit_are_rejected(monkeypatch):
    need, config = plan().count().total, parse_config([*TINY_RUN, "--mixed_precision", "no"])
    set_free(monkeypatch, need)
    assert fit_memory(config, Accelerator(cpu=True)) is config
    set_free(monkeypatch, need - 1)
    with pytest.raises(ValueError, match=r"^--train_batch_size 8: a step needs about .* more than is free; expected "
                       r"--train_batch_size 4 --gradient_accumulation_steps 2 \(the same run\), or "
                       r"--gradient_checkpointing true, or --mixed_precision bf16"):  # fmt: skip
        fit_memory(config, Accelerator(cpu=True))
    config.training.check_memory = False
    assert fit_memory(config, Accelerator(cpu=True)) is config
    set_free(monkeypatch, None)
    assert plan().rejection() is None
    set_free(monkeypatch, 1000)
    assert "expected a smaller network or resolution" in plan().rejection()


def test_auto_divides_global_batch_so_that_it_fits(monkeypatch):
    words = ["--gradient_accumulation_steps", "3", "--train_batch_size", "auto"]  # of 8 x 3 images
    by_hand = ["--train_batch_size", "6", "--gradient_accumulation_steps", "4"]
    set_free(monkeypatch, None)
    need = plan(*by_hand).count().total
    for free, batch in ((need, 6), (need - 1, 4), (10**12, 24), (None, 24), (0, 1)):
        set_free(monkeypatch, free)
        training = plan(*words).config.training
        assert (training.train_batch_size, training.global_batch_size(2)) == (batch, 48)
        assert type(training.train_batch_size) is int


@pytest.mark.parametrize(
    ("words", "batch"),
    [("--preset cifar10", 128), ("", 64), ("--preset digits --train_batch_size 16", 16), ("--config FILE", 64),
     ("--preset cifar10 --config FILE", 128)],
)  # fmt: skip
def test_auto_starts_from_batch_size_given_before(words, batch, tmp_path):
    (tmp_path / "auto.yaml").write_text("dataset: digits\ntrain_batch_size: auto\n")
    argv = words.replace("FILE", str(tmp_path / "auto.yaml")).split()
    argv += [] if "--config" in words else ["--dataset", "digits", "--train_batch_size=auto"]
    taken = parse_config(argv).training.train_batch_size
    assert taken == batch and isinstance(taken, Auto)
    assert not isinstance(parse_config([*argv, "--train_batch_size", "5"]).training.train_batch_size, Auto)


def test_run_records_and_resumes_batch_size_of_auto(run_training, monkeypatch, tmp_path):
    words = ["--train_batch_size", "auto", "--max_train_steps"]
    set_free(monkeypatch, plan("--train_batch_size", "4", "--gradient_accumulation_steps", "2").count().total)
    run_training(tmp_path, *words, "2")
    stored = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert (stored["train_batch_size"], stored["gradient_accumulation_steps"]) == (4, 2)
    set_free(monkeypatch, 10**12)
    assert run_training(tmp_path, *words, "4") == 0
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["train_batch_size"] == 8


def test_unresolved_auto_is_saved_as_its_number(tmp_path):
    Config.of(preset="digits", train_batch_size="auto").save(tmp_path / "config.yaml")
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["train_batch_size"] == 64


def test_dry_run_that_does_not_fit_prints_count(run_training, monkeypatch, tmp_path, capsys):
    set_free(monkeypatch, 1000)
    assert run_training(tmp_path / "run", "--dry_run") == 0
    output = capsys.readouterr().out
    assert "parameters:" in output and "memory:" in output and "not measured:   --train_batch_size 8" in output


def test_out_of_memory_error_in_training_is_one_line(monkeypatch, capsys):
    def fail(argv):
        with out_of_memory_explained(parse_config(TINY_RUN)):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes.\n")

    with pytest.raises(SystemExit, match="1"):
        run_script(fail)
    line = capsys.readouterr().err
    assert "error: not enough memory; try --train_batch_size 4 --gradient_accumulation_steps 2 (the same run)" in line
    assert line.count("\n") == 1
    with pytest.raises(RuntimeError, match="other"), out_of_memory_explained(parse_config(TINY_RUN)):
        raise RuntimeError("other")


@pytest.mark.parametrize(
    ("groups", "folder", "files"),
    [
        ("0::/a/b", "a", {"memory.max": "900", "memory.current": "500", "memory.stat": "anon 5\ninactive_file 100\n"}),
        ("4:memory:/a", "memory/a", {"memory.limit_in_bytes": "900", "memory.usage_in_bytes": "500",
                                     "memory.stat": "total_inactive_file 100\n"}),
    ],
)  # fmt: skip
def test_free_memory_of_machine_or_control_group(monkeypatch, tmp_path, groups, folder, files):
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:       1 kB\n")
    (tmp_path / "own").write_text(f"{groups}\n2:cpu:/x\n")
    for name, path in (("MEMINFO", "meminfo"), ("OWN_CGROUPS", "own"), ("CGROUPS", "")):
        monkeypatch.setattr(memory, name, tmp_path / path)
    cpu = torch.device("cpu")
    assert free_memory(cpu) == 1024
    (tmp_path / folder).mkdir(parents=True)
    for name, text in files.items():
        (tmp_path / folder / name).write_text(text)
    assert free_memory(cpu) == 900 - 500 + 100
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert free_memory(cpu) == 250
    monkeypatch.setattr(memory, "MEMINFO", Path("/none"))
    assert free_memory(cpu) is None


def test_processes_use_smallest_free_memory(monkeypatch):
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), num_processes=2, gather=lambda mine: torch.stack([mine, torch.tensor(70)])
    )
    for mine, agreed in ((100, 70), (None, 70), (50, 50)):
        monkeypatch.setattr(memory, "free_memory", lambda device, mine=mine: mine)
        assert memory.shared_free_memory(accelerator) == agreed
