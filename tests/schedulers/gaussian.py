"""Samplers on images of one brightness, N(0, 1/4), for which the best network is known.

    python -m tests.schedulers.gaussian > docs/samplers.md

writes a table of all samplers: the standard deviation of the brightness that they sample, 0.5 in the data.
"""

import inspect
import sys
import warnings

import diffusers
import torch
from tqdm.auto import tqdm

from hf_ddpm import DDIMScheduler, DDPMScheduler
from hf_ddpm.schedulers.stock import check_stock

INTRODUCTION = """\
# Samplers on data of which the best network is known

`python -m tests.schedulers.gaussian > docs/samplers.md` wrote this page, with diffusers {version}. The data are
images of 32x32 pixels of one brightness, N(0, 0.25); T = 1000. A cell is the standard deviation of the
brightness of 400 samples, by number of steps. 0.5 is right; the cells have a standard error of 0.02. The linear
schedule ends at a small signal, which costs deterministic samplers 0.05. With few steps, the first step of the
cosine schedule is too long for samplers of first order.

The pipeline refuses settings in which a sampler is wrong. Nothing is clipped here, since the data have no
range. With the cosine schedule, which ends without any signal, samplers of diffusers that do not clip are
refused unless they start earlier; `find_scheduler` and `--scheduler` give solvers that clip. Names without
`hf_ddpm` are schedulers of diffusers."""

STD = 0.5
STOCK = [
    "DDIM", "DDPM", "PNDM", "LMSDiscrete", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete",
    "KDPM2AncestralDiscrete", "DPMSolverMultistep", "DPMSolverSinglestep", "DEISMultistep", "UniPCMultistep",
    "SASolver", "IPNDM", "EDMEuler", "FlowMatchEulerDiscrete",
]  # fmt: skip
SAMPLERS = {
    "hf_ddpm.DDPMScheduler": (DDPMScheduler, {}),
    "hf_ddpm.DDPMScheduler, fixed_large": (DDPMScheduler, {"variance_type": "fixed_large"}),
    "hf_ddpm.DDIMScheduler": (DDIMScheduler, {}),
    **{name: (getattr(diffusers, f"{name}Scheduler"), {}) for name in STOCK},
    "DPMSolverMultistep, sde": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
}
SPACINGS = ("leading", "linspace", "trailing")
COUNTS = (7, 10, 50, 150, 334, 1000)


def sampled_std(scheduler, pixels=1024, images=400):
    """Returns the standard deviation of the brightness of samples from the best network, its steps set."""
    log_bars = torch.log(torch.cumprod(1 - scheduler.betas.double(), 0))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(images, pixels, generator=generator) * scheduler.init_noise_sigma
    options = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for t in scheduler.timesteps:
        x_t = scheduler.scale_model_input(x, t)
        low = int(t)
        ab = torch.lerp(log_bars[low], log_bars[min(low + 1, len(log_bars) - 1)], float(t) - low).exp().item()
        # E[v | x_t] of the brightness v, of which every pixel is an observation with noise.
        v = ab**0.5 * STD**2 / (ab * STD**2 + (1 - ab) / pixels) * x_t.double().mean(dim=1, keepdim=True)
        eps = ((x_t - ab**0.5 * v) / (1 - ab) ** 0.5).float()
        x = scheduler.step(eps, t, x, **options).prev_sample
    return x.double().mean(dim=1).std().item()


def prepared(name, spacing, count, schedule="linear"):
    """Returns a sampler with its steps set; raises the `ValueError` that a pipeline would."""
    kind, options = SAMPLERS[name]
    config = DDPMScheduler(clip_sample=False, beta_schedule=schedule).config
    scheduler = kind.from_config(config, timestep_spacing=spacing, **options)
    scheduler.set_timesteps(count)
    check_stock(scheduler, count, from_noise=True)
    return scheduler


def cell(name, spacing, count, schedule):
    try:
        scheduler = prepared(name, spacing, count, schedule)
    except ValueError:
        return "refused"
    return f"{sampled_std(scheduler):.2f}"


def main():
    warnings.simplefilter("ignore")
    diffusers.logging.set_verbosity_error()
    print(INTRODUCTION.format(version=diffusers.__version__))
    for schedule in ("linear", "squaredcos_cap_v2"):
        print(f"\n## {schedule}\n\n| sampler | spacing | {' | '.join(map(str, COUNTS))} |")
        print("| --- | --- | " + " | ".join("---:" for _ in COUNTS) + " |")
        for name in tqdm(SAMPLERS, file=sys.stderr):
            for spacing in SPACINGS:
                cells = [cell(name, spacing, count, schedule) for count in COUNTS]
                print(f"| {name} | {spacing} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
