from itertools import cycle

import pytest
import torch
from diffusers.models import modeling_utils

from hf_ddpm import UNet2DModel
from hf_ddpm.config import Config
from hf_ddpm.models import precision
from hf_ddpm.models.precision import Choice, cast_copy, choose_precision, has_bf16, on_main_process
from hf_ddpm.training.dry_run import count_flops
from tests.conftest import TINY_UNET

SHAPE = (1, 8, 8)
CPU = torch.device("cpu")


@pytest.fixture
def measured(monkeypatch):
    """Measure also tiny networks, on any machine."""
    monkeypatch.setattr(precision, "FEWEST_FLOPS", 0)
    monkeypatch.setattr(precision, "has_bf16", lambda device: True)


def set_times(monkeypatch, *times):
    """Set the durations of the passes, in the order float32, bf16, float32, ..."""
    durations = cycle(times)
    monkeypatch.setattr(precision, "_seconds", lambda work, device: next(durations))


@pytest.mark.parametrize(
    ("times", "choice"),
    [
        ((1.4, 1.0), Choice("bf16", "precision bf16: 1.4 times as fast as float32 here")),
        ((1.15, 1.0), Choice("bf16", "precision bf16: 1.1 times as fast as float32 here")),
        ((1.14, 1.0), Choice("no", "precision float32: bf16 is only 1.1 times as fast here")),
        ((0.8, 1.0), Choice("no", "precision float32: bf16 is only 0.8 times as fast here")),
    ],
)
def test_bf16_is_chosen_if_it_is_clearly_faster(measured, monkeypatch, tiny_unet, times, choice):
    set_times(monkeypatch, *times)
    assert choose_precision(tiny_unet, SHAPE, batch=4) == choice


def test_cast_copy_logs_no_warning(monkeypatch, tiny_unet):
    logged = []
    monkeypatch.setattr(modeling_utils.logger, "warning", logged.append)
    half = cast_copy(tiny_unet, "bf16")
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16} and logged == []
    assert {weight.dtype for weight in tiny_unet.parameters()} == {torch.float32}


def test_warm_up_and_outliers_do_not_matter(measured, monkeypatch, tiny_unet):
    # One warm-up pass each, then three passes each, one of them slow: the ratios are 2, 2 / 9 and 2.
    set_times(monkeypatch, 1, 9, 2, 1, 2, 9, 2, 1)
    assert choose_precision(tiny_unet, SHAPE, batch=4).line == "precision bf16: 2.0 times as fast as float32 here"


@pytest.mark.parametrize("training", [False, True])
def test_measurement_changes_no_state(measured, training):
    torch.manual_seed(0)
    unet = UNet2DModel(**TINY_UNET, num_class_embeds=3).train(not training)
    unet.mid_block.train(training)
    unet.conv_out.weight.grad = torch.ones_like(unet.conv_out.weight)
    weights = {name: value.clone() for name, value in unet.state_dict().items()}
    modes, state = [module.training for module in unet.modules()], torch.get_rng_state()
    assert choose_precision(unet, SHAPE, batch=4, training=training).precision in ("no", "bf16")
    assert all(torch.equal(value, weights[name]) for name, value in unet.state_dict().items())
    assert [name for name, value in unet.named_parameters() if value.grad is not None] == ["conv_out.weight"]
    assert bool((unet.conv_out.weight.grad == 1).all())
    assert [module.training for module in unet.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    assert all(
        getattr(module, "keys", None) is None for module in unet.modules() if isinstance(module, torch.nn.Dropout)
    )


@pytest.mark.parametrize("training", [False, True])
def test_both_precisions_are_measured_as_they_are_used(measured, monkeypatch, tiny_unet, training):
    """Passes alternate, with gradients and dropout for training, without them for sampling."""
    passes = []

    def record(module, inputs, output):
        passes.append((output.dtype, torch.is_grad_enabled(), module.training))

    tiny_unet.conv_in.register_forward_hook(record)
    choose_precision(tiny_unet, SHAPE, batch=4, training=training)
    assert passes[:4] == [(dtype, training, training) for dtype in (torch.float32, torch.bfloat16)] * 2


def fail(*args):
    pytest.fail("measured")


def test_no_measurement_if_choice_is_clear(monkeypatch, tiny_unet):
    monkeypatch.setattr(precision, "measure_gain", fail)
    monkeypatch.setattr(precision, "has_bf16", lambda device: True)
    small = "precision float32: the network is too small for bf16 to be faster"
    assert choose_precision(tiny_unet, SHAPE, batch=4) == Choice("no", small)
    digits = UNet2DModel(**Config.of(preset="digits").unet())
    assert choose_precision(digits, SHAPE, batch=64, training=True) == Choice("no", small)
    half = UNet2DModel(**TINY_UNET).bfloat16()
    assert choose_precision(half, SHAPE, 4) == Choice("no", "precision bfloat16: the precision of the weights")
    monkeypatch.setattr(precision, "has_bf16", lambda device: False)
    line = "precision float32: no native bf16 on this CPU device"
    assert choose_precision(tiny_unet, SHAPE, batch=4) == Choice("no", line)


def test_compiled_networks_use_bf16_if_device_supports_it(monkeypatch):
    monkeypatch.setattr(precision, "measure_gain", fail)
    digits = UNet2DModel(**Config.of(preset="digits").unet())
    for supported, batch, expected in ((True, 64, "bf16"), (True, 1, "no"), (False, 64, "no")):
        monkeypatch.setattr(precision, "has_bf16", lambda device, supported=supported: supported)
        assert choose_precision(digits, SHAPE, batch, compiled=True).precision == expected


def test_presets_for_color_images_are_measured(monkeypatch):
    monkeypatch.setattr(precision, "measure_gain", lambda *args: 1.5)
    monkeypatch.setattr(precision, "has_bf16", lambda device: True)
    for preset in ("small-32", "small-64"):
        config = Config.of(preset=preset, dataset="images")
        unet = UNet2DModel(**config.unet())
        assert choose_precision(unet, (3, *config.data.size), batch=8).precision == "bf16"


def test_bf16_is_chosen_if_float32_does_not_fit_into_memory(measured, monkeypatch, tiny_unet):
    def out_of_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(precision, "measure_gain", out_of_memory)
    assert choose_precision(tiny_unet, SHAPE, batch=4).precision == "bf16"


def test_has_bf16_depends_on_device(monkeypatch):
    for capability, expected in (((7, 5), False), ((8, 0), True), ((8, 9), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert has_bf16(torch.device("cuda")) is expected
    for flags, expected in (
        ({}, False), ({"avx512_bf16": True}, True), ({"amx_bf16": True, "avx512_bf16": False}, True)
    ):  # fmt: skip
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda flags=flags: flags, raising=False)
        assert has_bf16(CPU) is expected
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert has_bf16(CPU) and not has_bf16(torch.device("mps"))


def test_measured_passes_have_limited_operations(monkeypatch, tiny_unet):
    """The batch is limited by the number of operations; if one image is too large, it is made smaller."""
    per_image, _ = count_flops(tiny_unet, torch.zeros(1, *SHAPE), 0)

    def shape(most):
        monkeypatch.setattr(precision, "MEASURED_FLOPS", {"cpu": most})
        return tuple(precision._inputs(tiny_unet, SHAPE, batch=4)[0].shape)

    assert shape(3.5 * per_image) == (3, *SHAPE) and shape(100 * per_image) == (4, *SHAPE)
    # Half the height and width: a quarter of the operations, or fewer with attention.
    assert shape(0.9 * per_image) == (3, 1, 4, 4)
    assert shape(1) == (1, 1, 2, 2)


def test_other_processes_get_value_of_main_process(monkeypatch):
    """Run as the second of two processes."""

    def broadcast(values, src):
        assert src == 0
        values[0] = Choice("bf16", "measured there")

    assert on_main_process(lambda: 1) == 1  # a single process
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    assert on_main_process(fail).precision == "bf16"
