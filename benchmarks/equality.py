"""Compare the outputs of contenders before timing."""

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

# Largest differences: of outputs relative to the largest entry; of images in [0, 1] after a few steps, absolute. The
# tables of diffusers schedulers have float32 errors of about 1e-4 in the last steps.
TOLERANCES = {"network": 1e-4, "gradients": 1e-4, "images": 1e-3}
FEW_STEPS = 10

# Tolerances of passes as timed, relative to the norm in float32.
PASSES = {"no": 1e-4, "bf16": 0.05, "fp16": 0.02}
# Tolerances of gradients of compiled networks, relative to the largest gradient.
COMPILED = {"no": 1e-4, "bf16": 0.2, "fp16": 0.1}
# Tolerance of both in float32 with TF32.
TF32 = 1e-2
# Loss scale, without which gradients underflow in fp16.
SCALE = 2.0**16


def compare(contenders: Sequence[Contender], tasks: Sequence[str]) -> list[dict[str, Any]]:
    """Compare outputs, and exclude contenders whose outputs are wrong by setting their `exclusion`.

    Args:
        contenders: The contenders; the first is this package.
        tasks: The tasks to be timed.

    Returns:
        For each contender whose outputs were compared: `subject` and `outputs`, the results of `check_equal` and
        `check_as_timed`.
    """
    checks, alike = [], {}
    for contender in contenders:
        outputs = {}
        try:
            if isinstance(contender, Stock):
                alike = alike or check_equal(contenders[0], contender)  # the same if it is not compiled
                outputs |= alike
            if exclusion_reason(outputs) is None:
                outputs |= check_as_timed(contender, tasks)
        except ModuleNotFoundError:
            continue  # reported in its rows
        except Exception as error:  # other libraries may raise anything
            contender.exclusion = f"not compared: {reason(error)}"
        else:
            contender.exclusion = exclusion_reason(outputs)
        if outputs:
            checks.append({"subject": contender.name, "outputs": outputs})
    return checks


def check_equal(ours: Contender, theirs: Contender) -> dict[str, Check]:
    """Compare outputs and gradients for the same input, and images of the same seed after a few steps.

    All are computed in float32 and not compiled.

    Returns:
        For `network`, `gradients` and `images`: the largest `difference`, its `tolerance` and whether they are `equal`.
    """
    checks = {}
    theirs.setting.allow_tf32(False)
    try:
        for name, outputs in {"network": _predictions, "gradients": _gradients, "images": _images}.items():
            expected, actual = outputs(ours), outputs(theirs)
            scale = 1.0 if name == "images" else expected.abs().max().item()
            checks[name] = _check((actual - expected).abs().max().item() / scale, TOLERANCES[name])
    finally:
        theirs.setting.allow_tf32(theirs.setting.config.training.tf32)
    return checks


def check_as_timed(contender: Contender, tasks: Sequence[str]) -> dict[str, Check]:
    """Compare half-precision or compiled passes, and compiled gradients, with the same network in float32.

    Compiled gradients of this package are not compared here: `compile_network` checks them.

    Returns:
        Checks like the result of `check_equal`, for `passes as timed` and `gradients as timed`, if the tasks need them.
    """
    checks, passes = {}, set(tasks) & set(NETWORK_TASKS) - set(STEPS)
    precision = contender.precision(contender.setting.batch)
    if passes and (contender.compiled or precision != "no"):
        actual = _first(contender, False, lambda: contender.predictor()().float())
        expected = _pass_in_float32(contender)
        difference = ((actual - expected).norm() / expected.norm()).item()
        checks["passes as timed"] = _check(difference, _tolerance(contender, PASSES, precision))
    if set(tasks) & set(STEPS) and contender.compiled and isinstance(contender, Stock):
        expected = _gradients(contender, contender.setting.batch)
        actual = _first(contender, True, lambda: _compiled_gradients(contender))
        difference = ((actual - expected).abs().max() / expected.abs().max()).item()
        precision = contender.precision(contender.setting.batch, training=True)
        checks["gradients as timed"] = _check(difference, _tolerance(contender, COMPILED, precision))
    return checks


def exclusion_reason(checks: dict[str, Check]) -> str | None:
    """Return an error message if outputs differ, or None."""
    for name, check in checks.items():
        if not check["equal"]:
            limit = f"expected at most {check['tolerance']:g}"
            return f"not compared: {name}: difference {check['difference']:.2g}; {limit}"
    return None


def _first(contender: Contender, training: bool, compute: Callable[[], Tensor]) -> Tensor:
    """Return the result of `compute`, and record its time, which is mostly compilation."""
    clock = clock_of(contender.setting.device)
    start = clock()
    result = compute()
    contender.spent[training] = clock() - start
    return result


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
    output = network(x, contender.timesteps(t))
    return getattr(output, "sample", output)


def _gradients(contender: Contender, batch: int = 2) -> Tensor:
    network = contender.plain_network().eval()
    return _flat(network, network(*contender.setting.inputs(batch)).sample)


def _compiled_gradients(contender: Stock) -> Tensor:
    """Return gradients of the timed network; with dropout, whose masks differ, in evaluation mode."""
    setting, network = contender.setting, contender.trained
    x, t = setting.inputs(setting.batch)
    network.train(setting.config.model.dropout == 0)
    return _flat(network, network(x.to(contender.weight_dtype), t).sample)


def _flat(network: torch.nn.Module, output: Tensor) -> Tensor:
    """Return the gradients of a loss as one vector, with zeros for gradients that a compiler has dropped."""
    (output.float().square().mean() * SCALE).backward()
    weights = [parameter for _, parameter in sorted(network.named_parameters())]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in weights]
    network.zero_grad()
    return torch.cat([gradient.flatten().float() for gradient in gradients])


def _images(contender: Contender) -> Tensor:
    setting, source = contender.setting, torch.Generator(contender.setting.device).manual_seed(SEED)
    pipe, steps = contender.plain_pipeline(), min(FEW_STEPS, setting.steps)
    pipe.set_progress_bar_config(disable=True)
    return torch.from_numpy(pipe(batch_size=2, generator=source, num_inference_steps=steps, output_type="np").images)
