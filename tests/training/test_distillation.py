"""A distillation stage: compare the teacher with the samplers, and a run with a manual Algorithm 2."""

import json

import diffusers
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from hf_ddpm import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from hf_ddpm.config import Config, DataConfig
from hf_ddpm.data.batches import batch_indices
from hf_ddpm.data.store import load_images
from hf_ddpm.diffusion.distillation import Distillation, halved
from hf_ddpm.training.distillation import Teacher, student_scheduler
from hf_ddpm.training.randomness import draw
from tests.conftest import TINY_UNET

STEPS, BATCH, LR, COUNT = 3, 8, 1e-3, 8


def teacher_of(scheduler, guidance_scale=1.0, **options):
    """Return a pipeline of a tiny network, and the process and objective of a student with `COUNT` steps."""
    torch.manual_seed(0)
    AcceleratorState._reset_state()  # an earlier test may have set a precision
    unet = UNet2DModel(**TINY_UNET | {"dropout": 0.5, **options})
    names = {"0": "a", "1": "b"} if unet.config.num_class_embeds else None
    pipe = DDPMPipeline(unet, scheduler, names)
    student, process = halved(DDPMScheduler.from_config(scheduler.config).diffusion, COUNT)
    teacher = Teacher(pipe, process, Accelerator(cpu=True), guidance_scale)
    return pipe, student, Distillation(teacher, process)


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize(
    ("kind", "variance"),
    [("epsilon", "fixed_small"), ("v_prediction", "fixed_large"), ("sample", "learned"), ("mean", "learned_range")],
)
def test_teacher_takes_two_steps_of_its_own_sampler(kind, variance, schedule):
    learned = {"out_channels": 2} if "learned" in variance else {}
    scheduler = DDPMScheduler(beta_schedule=schedule, prediction_type=kind, variance_type=variance)
    pipe, student, objective = teacher_of(scheduler, **learned)
    sampler = DDIMScheduler.from_config(scheduler.config, timestep_spacing="trailing")
    sampler.set_timesteps(2 * COUNT)
    x_t = torch.randn(COUNT, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    t = torch.arange(COUNT)
    target = objective.target(student, x_t, t)
    assert not target.requires_grad
    for index in range(COUNT):
        z, clipped = x_t[index : index + 1], False
        with torch.no_grad():
            for time in sampler.timesteps[2 * (COUNT - 1 - index) :][:2]:
                step = sampler.step(pipe.unet(z, time).sample, time, z)
                z, clipped = step.prev_sample, clipped or bool((step.pred_original_sample.abs() == 1).any())
        actual = student.ddim_step(target[index : index + 1], x_t[index : index + 1], index)
        torch.testing.assert_close(actual, z, rtol=1e-4, atol=1e-4)
        assert clipped or index < COUNT - 1 or kind != "epsilon"  # with little signal, everything is clipped


def test_teacher_is_guided_and_its_variance_is_ignored():
    scheduler = DDPMScheduler(variance_type="learned_range", clip_sample=False)
    pipe, student, objective = teacher_of(scheduler, 3.0, out_channels=2, num_class_embeds=3)
    x_t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    t, classes = torch.tensor([5, 9]), torch.tensor([1, 0])
    actual = objective.estimate(x_t, t, classes)
    time = objective.teacher.timesteps[t]
    with torch.no_grad():
        given, none = (pipe.unet(x_t, time, labels).sample[:, :1] for labels in (classes, torch.tensor([2, 2])))
    eps = none + 3 * (given - none)
    bars = scheduler.diffusion.alphas_cumprod[time].float().view(-1, 1, 1, 1)
    torch.testing.assert_close(actual, (x_t - (1 - bars).sqrt() * eps) / bars.sqrt(), rtol=1e-4, atol=1e-4)


def student_of(steps, target="teacher"):
    options = {"teacher": "x", "student_steps": steps, "student_target": target, "prediction_type": "sample"}
    return Config.of(preset="digits", eval_metrics="", **options)


@pytest.mark.parametrize("schedule", ["linear", "quad", "sigmoid", "squaredcos_cap_v2"])
@pytest.mark.parametrize("rescaled", [False, True])
def test_sampler_of_student_has_process_of_its_teacher(schedule, rescaled):
    kind = {"prediction_type": "v_prediction", "clip_sample": False, "clip_sample_range": 2.0}
    teacher = DDPMScheduler(beta_schedule=schedule, rescale_betas_zero_snr=rescaled, **kind)
    for steps, expected in ((8, diffusers.DDIMScheduler), (16, DDIMScheduler)):
        sampler = student_scheduler(teacher, student_of(steps))
        assert type(sampler) is expected and sampler.config.prediction_type == "sample"
        assert (sampler.config.clip_sample, sampler.config.clip_sample_range) == (False, 2.0)
        torch.testing.assert_close(sampler.alphas_cumprod, teacher.alphas_cumprod, rtol=2e-4, atol=1e-7)
        sampler.set_timesteps(steps)
        assert sampler.timesteps.tolist() == halved(teacher.diffusion, steps)[0].timesteps.tolist()[::-1]
    for steps, target in ((501, "teacher"), (1001, "images")):
        with pytest.raises(ValueError, match=f"student_steps.{steps}"):
            student_scheduler(teacher, student_of(steps, target))
    assert len(student_scheduler(teacher, student_of(1000, "images"))) == 1000


def alphas_and_sigmas(times):
    """Return alpha and sigma of the digits preset's schedule at 0-based times, float64; 1 and 0 at -1."""
    u = (torch.arange(1001, dtype=torch.float64) / 1000 + 0.008) / 1.008 * torch.pi / 2
    bars = (torch.cos(u[1:]) ** 2 / torch.cos(u[:-1]) ** 2).clamp(min=0.001).cumprod(0)
    bars = torch.cat([bars, torch.ones(1, dtype=torch.float64)])[times].view(-1, 1, 1, 1)
    return bars.sqrt(), (1 - bars).sqrt()


def train_by_hand(folder):
    teacher, student = (diffusers.UNet2DModel.from_pretrained(folder / "unet") for _ in range(2))
    teacher.eval()
    images = load_images(DataConfig("digits", resolution=[8], channels=1))
    optimizer = torch.optim.Adam(student.parameters(), lr=LR)
    lines = []
    for step in range(STEPS):
        x0 = images[batch_indices(0, step, BATCH, 898)].double() / 127.5 - 1
        draws = draw(0, step, range(BATCH), (1, 8, 8), COUNT, "cpu")
        times = 1000 // COUNT * (draws.t + 1) - 1  # Algorithm 2: t = i / N
        alpha, sigma = alphas_and_sigmas(times)
        z_t = (alpha * x0 + sigma * draws.noise).float().double()
        z, before, after = z_t, times, times - 62  # half a step is 62.5, rounded
        for after in (times - 62, times - 125):
            (a, s), (a2, s2) = alphas_and_sigmas(before), alphas_and_sigmas(after)
            with torch.no_grad():
                eps = teacher(z.float(), before).sample.double()
            x = ((z - s * eps) / a).clamp(-1, 1)
            z, before = a2 * x + s2 / s * (z - a * x), after
        a2, s2 = alphas_and_sigmas(times - 125)
        target = (z - s2 / sigma * z_t) / (a2 - s2 / sigma * alpha)
        prediction = alpha * z_t - sigma * student(z_t.float(), times).sample
        losses = ((alpha / sigma) ** 2).clamp(min=1).flatten() * (target - prediction).square().mean((1, 2, 3))
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        quarters = [losses[draws.t // 2 == i] for i in range(4)]
        by_quarter = {f"loss_q{i + 1}": q.mean().item() if len(q) else None for i, q in enumerate(quarters)}
        lines.append({"loss": losses.mean().item(), **by_quarter})
    return student.state_dict(), lines


def test_stage_matches_algorithm_2(run_training, trained, tmp_path):
    words = ["--teacher", str(trained), "--student_steps", str(COUNT), "--prediction_type", "v_prediction"]
    words += ["--max_train_steps", str(STEPS), "--log_steps", "1", "--levels", "256", "--max_grad_norm", "1e9"]
    run_training(tmp_path, *words, "--warmup_steps", "0", "--learning_rate", str(LR), "--dropout", "0")
    weights, lines = train_by_hand(trained)
    actual = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for mine, expected in zip(actual, lines, strict=True):
        assert {name: mine[name] for name in expected} == pytest.approx(expected, rel=1e-3)
    start = load_file(trained / "unet" / "diffusion_pytorch_model.safetensors")
    for name, value in load_file(tmp_path / "checkpoints" / f"step-{STEPS:09d}" / "unet.safetensors").items():
        if not name.endswith("to_k.bias"):  # its gradient is zero but for rounding
            assert (value - weights[name]).norm() < 0.02 * (weights[name] - start[name]).norm(), name
