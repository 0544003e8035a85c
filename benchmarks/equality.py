"""Outputs of contenders, compared before they are timed."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.contender import NETWORK_TASKS, Contender
from benchmarks.measure import clock_of, reason
from benchmarks.options import STEPS
from benchmarks.setting import SEED
from benchmarks.stock import Stock

Check = dict[str, Any]

# Of outputs relative to the largest entry; of images in [0, 1], after a few steps, absolute. The tables of diffusers
# have float32 errors of about 1e-4 at the last steps.
TOLERANCES = {"network": 1e-4, "gradients": 1e-4, "images": 1e-3}
FEW_STEPS = 10

# Of passes as they are timed, relative to their norm in float32.
PASSES = {"no": 1e-4, "bf16": 0.05, "fp16": 0.02}
# Of gradients of compiled networks, relative to the largest one.
COMPILED = {"no": 1e-4, "bf16": 0.2, "fp16": 0.1}
# Of both in float32 with rounded factors.
TF32 = 1e-2
# Factor of a loss whose gradients underflow in fp16 without it.
SCALE = 2.0**16


def compare(contenders: Sequence[Contender], tasks: Sequence[str]) -> list[dict[str, Any]]:
    """Compares outputs, and refuses a comparison of times with a contender whose outputs are wrong.

    Args:
        contenders: The first is this package.
        tasks: What is to be timed.

    Returns:
        For each contender whose outputs were compared: `subject` and its `outputs`, as of `check_equal` and
        `check_as_timed`.
    """
    checks, alike = [], {}
    for contender in contenders:
        outputs = {}
        try:
            if isinstance(contender, Stock):
                alike = alike or check_equal(contenders[0], contender)  # the same if it is not compiled
                outputs |= alike
            if refusal_of(outputs) is None:
                outputs |= check_as_timed(contender, tasks)
        except ModuleNotFoundError:
            continue  # which its rows say
        except Exception as error:  # whatever others raise
            contender.refusal = f"not compared: {reason(error)}"
        else:
            contender.refusal = refusal_of(outputs)
        if outputs:
            checks.append({"subject": contender.name, "outputs": outputs})
    return checks


def check_equal(ours: Contender, theirs: Contender) -> dict[str, Check]:
    """Compares networks and gradients on the same input, and images of the same seed after a few steps.

    In float32, not compiled.

    Returns:
        For `network`, `gradients` and `images`: the largest `difference`, its `tolerance` and whether they are `equal`.
    """
    checks = {}
    theirs.setting.allow_tf32(False)
    try:
        for name, outputs in {"network": _predictions, "gradients": _gradients, "images": _images}.items():
            right, found = outputs(ours), outputs(theirs)
            scale = 1.0 if name == "images" else right.abs().max().item()
            checks[name] = _check((found - right).abs().max().item() / scale, TOLERANCES[name])
    finally:
        theirs.setting.allow_tf32(theirs.setting.config.training.tf32)
    return checks


def check_as_timed(contender: Contender, tasks: Sequence[str]) -> dict[str, Check]:
    """Compares passes in half precision or compiled, and compiled gradients, with the same network in float32.

    This package checks its compiled gradients itself.

    Returns:
        As `check_equal`, for `passes as timed` and `gradients as timed`, if they are of the tasks.
    """
    checks, passes = {}, set(tasks) & set(NETWORK_TASKS) - set(STEPS)
    precision = contender.precision(contender.setting.batch)
    if passes and (contender.compiled or precision != "no"):
        found = _first(contender, False, lambda: contender.predictor()().float())
        right = _pass_in_float32(contender)
        difference = ((found - right).norm() / right.norm()).item()
        checks["passes as timed"] = _check(difference, _tolerance(contender, PASSES, precision))
    if set(tasks) & set(STEPS) and contender.compiled and isinstance(contender, Stock):
        right = _gradients(contender, contender.setting.batch)
        found = _first(contender, True, lambda: _compiled_gradients(contender))
        difference = ((found - right).abs().max() / right.abs().max()).item()
        precision = contender.precision(contender.setting.batch, training=True)
        checks["gradients as timed"] = _check(difference, _tolerance(contender, COMPILED, precision))
    return checks


def refusal_of(checks: dict[str, Check]) -> str | None:
    """Returns why outputs are not equal, or None."""
    for name, check in checks.items():
        if not check["equal"]:
            return f"not compared: its {name} differ by {check['difference']:.2g}, {check['tolerance']:g} is allowed"
    return None


def _first(contender: Contender, training: bool, compute: Callable[[], Tensor]) -> Tensor:
    """Returns what is computed, and notes the time, which is that of compiling for the most part."""
    clock = clock_of(contender.setting.device)
    start = clock()
    found = compute()
    contender.spent[training] = clock() - start
    return found


def _check(difference: float, tolerance: float) -> Check:
    return {"difference": difference, "tolerance": tolerance, "equal": difference <= tolerance}  # false for NaN


def _tolerance(contender: Contender, tolerances: dict[str, float], precision: str) -> float:
    setting = contender.setting
    is_rounded = setting.device.type == "cuda" and setting.config.training.tf32
    return max(tolerances[precision], TF32 if is_rounded else 0)


@torch.no_grad()
def _predictions(contender: Contender) -> Tensor:
    return contender.plain_network().eval()(*contender.setting.inputs(2)).sample


@torch.no_grad()
def _pass_in_float32(contender: Contender) -> Tensor:
    x, t = contender.setting.inputs(contender.setting.batch)
    network = contender.plain_network().eval()
    network.load_state_dict(contender.network.state_dict())  # not all contenders have our weights
    output = network(x, contender.times(t))
    return getattr(output, "sample", output)


def _gradients(contender: Contender, batch: int = 2) -> Tensor:
    network = contender.plain_network().eval()
    return _flat(network, network(*contender.setting.inputs(batch)).sample)


def _compiled_gradients(contender: Stock) -> Tensor:
    """Returns gradients of the network that is timed; not in training if there is dropout, whose masks differ."""
    setting, network = contender.setting, contender.trained
    x, t = setting.inputs(setting.batch)
    network.train(setting.config.model.dropout == 0)
    return _flat(network, network(x.to(contender.weight_dtype), t).sample)


def _flat(network: torch.nn.Module, output: Tensor) -> Tensor:
    """Returns the gradients of a loss as one vector; zeros where a compiler has lost one."""
    (output.float().square().mean() * SCALE).backward()
    weights = [parameter for _, parameter in sorted(network.named_parameters())]
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in weights]
    network.zero_grad()
    return torch.cat([gradient.flatten().float() for gradient in found])


def _images(contender: Contender) -> Tensor:
    setting, source = contender.setting, torch.Generator(contender.setting.device).manual_seed(SEED)
    pipe, steps = contender.plain_pipeline(), min(FEW_STEPS, setting.steps)
    pipe.set_progress_bar_config(disable=True)
    return torch.from_numpy(pipe(batch_size=2, generator=source, num_inference_steps=steps, output_type="np").images)
