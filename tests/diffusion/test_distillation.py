"""Progressive distillation against the equations of Salimans & Ho 2022, in float64, and against the closed form."""

import math

import diffusers
import pytest
import torch

from hf_ddpm import GaussianDiffusion
from hf_ddpm.diffusion.distillation import Distillation, halved
from hf_ddpm.diffusion.losses import Objective
from hf_ddpm.diffusion.schedules import beta_schedule, trailing_timesteps

FULL = GaussianDiffusion(beta_schedule("squaredcos_cap_v2", 1000))


def alpha_sigma(time):
    """Return alpha and sigma of the paper after `time` diffusion steps of the cosine schedule."""
    if time == 0:
        return 1.0, 0.0
    ratios = [
        min(math.cos((i + 1 + 8) / 1008 * math.pi / 2) ** 2 / math.cos((i + 8) / 1008 * math.pi / 2) ** 2, 1.0)
        for i in range(time)
    ]
    bar = math.prod(max(ratio, 0.001) for ratio in ratios)
    return math.sqrt(bar), math.sqrt(1 - bar)


def ddim(z, x, t, s):
    """Eq. 8 of the paper: alpha_s x + sigma_s (z - alpha_t x) / sigma_t."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(t), alpha_sigma(s)
    return alpha_s * x + sigma_s * (z - alpha_t * x) / sigma_t


@pytest.mark.parametrize("total", [1000, 60, 7])
def test_every_second_step_of_teacher_is_step_of_student(total):
    process, rejected = GaussianDiffusion([0.01] * total), []
    for count in range(1, total // 2 + 1):
        try:
            student, teacher = (chain.timesteps.tolist() for chain in halved(process, count))
        except ValueError:
            rejected.append(count)
            continue
        assert teacher[1::2] == student and student[-1] == total - 1 and len(set(teacher)) == 2 * count
        if total % count == 0:
            assert [t - total // count for t in student] == [-1, *student[:-1]]
    multiples = {divisor << k for divisor in range(1, total + 1) if total % divisor == 0 for k in range(10)}
    assert not multiples & set(rejected)


@pytest.mark.parametrize("count", [1, 2, 4, 5, 8, 20, 100, 125, 500])
def test_trailing_timesteps_equal_those_of_diffusers(count):
    stock = diffusers.DDIMScheduler(timestep_spacing="trailing")
    stock.set_timesteps(count)
    assert stock.timesteps.tolist() == trailing_timesteps(1000, count)


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, 4, 3, 2, 2, generator=generator, dtype=torch.float64) * 2 - 1


def test_ddim_step_is_deterministic_ddim_posterior_and_ddim_start_its_inverse(images):
    x_start, x_t = images
    for chain in halved(FULL, 8):
        t = torch.tensor([0, 1, len(chain) - 2, len(chain) - 1])
        steps = chain.ddim_step(x_start, x_t, t)
        for i, index in enumerate(t.tolist()):
            mean, std = chain.ddim_posterior(x_start[i : i + 1], x_t[i : i + 1], index, 0.0)
            torch.testing.assert_close(steps[i : i + 1], mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(steps[0], x_start[0], rtol=0, atol=0)  # the last step returns the image
        torch.testing.assert_close(chain.ddim_start(steps, x_t, t), x_start, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("steps", [1, 4, 8, 16])
def test_target_is_that_of_algorithm_2(images, steps):
    # 1000 / 16 is not a whole number: the teacher's timesteps are rounded, and its first step has length 63.
    z, _ = images
    student, teacher = halved(FULL, steps)
    every = torch.arange(steps).repeat_interleave(len(z))
    z = z.repeat(steps, 1, 1, 1)

    def guess(x_t, time):  # an arbitrary network: its output depends on time and position, and may be out of range
        return torch.sin(3 * x_t) * (1.5 - time / 1000)

    def estimate(x_t, t, classes):
        assert classes is None
        return guess(x_t, teacher.timesteps[t].view(-1, 1, 1, 1) + 1).clamp(-1, 1)

    target = Distillation(estimate, teacher).target(student, z, every)
    times = [round(1000 - i * 1000 / (2 * steps)) for i in range(2 * steps)][::-1]
    for i, index in enumerate(every.tolist()):
        t, middle = times[2 * index + 1], times[2 * index]
        end = times[2 * index - 1] if index else 0
        z_t = z[i]
        z_middle = ddim(z_t, guess(z_t, t).clamp(-1, 1), t, middle)
        z_end = ddim(z_middle, guess(z_middle, middle).clamp(-1, 1), middle, end)
        (alpha_t, sigma_t), (alpha_end, sigma_end) = alpha_sigma(t), alpha_sigma(end)
        expected = (z_end - sigma_end / sigma_t * z_t) / (alpha_end - sigma_end / sigma_t * alpha_t)
        torch.testing.assert_close(target[i], expected, rtol=1e-6, atol=1e-6)
        # With this target, one step of the student equals two steps of the teacher.
        torch.testing.assert_close(ddim(z_t, target[i], t, end), z_end, rtol=1e-6, atol=1e-6)


def gaussian_estimate(chain, variance):
    """Return the optimal estimate of x_0 for Gaussian data: alpha c / (alpha^2 c + sigma^2) times x_t."""
    bars = chain.alphas_cumprod
    factors = bars.sqrt() * variance / (bars * variance + 1 - bars)
    return lambda x_t, t, classes: factors[t].view(-1, 1, 1, 1) * x_t


def test_target_for_gaussian_data_converges_to_exact_flow(images):
    # The exact flow keeps x_t / sqrt(alpha^2 c + sigma^2) constant.
    z, variance, errors = images[0], 0.3, []
    for steps in (5, 50, 500):
        student, teacher = halved(FULL, steps)
        t = torch.full((len(z),), steps // 5 * 3)  # the same time for all numbers of steps
        target = Distillation(gaussian_estimate(teacher, variance), teacher).target(student, z, t)
        end = student.ddim_step(target, z, t)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = (alpha_sigma(int(student.timesteps[i]) + 1) for i in (t[0], t[0] - 1))
        scale = math.sqrt((alpha_s**2 * variance + sigma_s**2) / (alpha_t**2 * variance + sigma_t**2))
        errors.append(float((end / z - scale).abs().max()) * steps)
    # The error of a step is proportional to the square of its length; that of all steps together, to the length.
    assert errors[1] < errors[0] / 5 and errors[2] < errors[1] / 5


def test_loss_is_zero_only_for_exact_prediction(images):
    z = images[0]
    student, teacher = halved(FULL, 4)
    t = torch.arange(4)
    for kind in ("v_prediction", "sample"):
        objective = Distillation(gaussian_estimate(teacher, 0.3), teacher, kind)
        target = objective.target(student, z, t)
        eps = (z - student.alphas_cumprod.sqrt().view(-1, 1, 1, 1) * target) / (1 - student.alphas_cumprod).sqrt().view(
            -1, 1, 1, 1
        )
        bars = student.alphas_cumprod.view(-1, 1, 1, 1)
        exact = target if kind == "sample" else bars.sqrt() * eps - (1 - bars).sqrt() * target
        assert objective(student, exact, z, t, z, z).abs().max() < 1e-10
        assert objective(student, exact + 0.1, z, t, z, z).min() > 1e-3


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_loss_is_larger_error_of_image_and_noise(images, kind):
    output, z = images
    student, teacher = halved(FULL, 4)
    t, bars = torch.arange(4), student.alphas_cumprod.view(-1, 1, 1, 1)
    assert (bars > 0.5).any() and (bars < 0.5).any()  # either error is the larger one somewhere
    objective = Distillation(lambda x_t, t, classes: torch.cos(x_t), teacher, kind)
    target = objective.target(student, z, t)
    start = output if kind == "sample" else bars.sqrt() * z - (1 - bars).sqrt() * output
    image_error = (start - target).square().mean((1, 2, 3))
    noises = [(z - bars.sqrt() * x) / (1 - bars).sqrt() for x in (start, target)]
    noise_error = (noises[0] - noises[1]).square().mean((1, 2, 3))
    loss = objective(student, output, z, t, z, z)
    torch.testing.assert_close(loss, torch.maximum(image_error, noise_error), rtol=1e-5, atol=1e-6)


def test_weight_is_one_without_signal():
    chain = GaussianDiffusion([0.1, 0.5, 1.0])
    snr = [0.9 / 0.1, 0.45 / 0.55, 0.0]
    x, t = torch.zeros(3, 1, 1, 1), torch.arange(3)
    weights = Objective("truncated_snr", "sample")(chain, x + 1, x, t, x, x)
    assert weights.tolist() == pytest.approx([max(ratio, 1) for ratio in snr])


def test_teacher_gets_classes_in_both_steps():
    calls = []
    student, teacher = halved(FULL, 4)

    def estimate(x_t, t, classes):
        calls.append((t.tolist(), classes.tolist()))
        return x_t

    x, t = torch.zeros(2, 1, 2, 2), torch.tensor([0, 3])
    Distillation(estimate, teacher)(student, x, x, t, x, x, torch.tensor([5, 7]))
    assert calls == [([1, 7], [5, 7]), ([0, 6], [5, 7])]


def test_invalid_arguments_are_rejected():
    with pytest.raises(ValueError, match="prediction_type='epsilon': expected one of v_prediction, sample"):
        Distillation(lambda x_t, t, classes: x_t, FULL, "epsilon")
    for steps in (0, 501):
        with pytest.raises(ValueError, match=f"student_steps={steps}: expected 1 to 500, half of the 1000"):
            halved(FULL, steps)
