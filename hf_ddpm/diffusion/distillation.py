"""Progressive distillation: train a student to match two steps of its teacher in one step."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from hf_ddpm.diffusion.gaussian import GaussianDiffusion
from hf_ddpm.diffusion.losses import Objective
from hf_ddpm.diffusion.schedules import check_one_of, trailing_timesteps

STUDENT_PREDICTIONS = ("v_prediction", "sample")

# The teacher's clipped estimate of x_0 as a function of x_t, the timesteps of the teacher's process, and the classes.
Estimate = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def halved(diffusion: GaussianDiffusion, steps: int) -> tuple[GaussianDiffusion, GaussianDiffusion]:
    """Return the respaced processes of a student and of its teacher, which takes twice as many steps.

    Step `t` of the student covers the steps `2 t + 1` and `2 t` of the teacher.

    Args:
        diffusion: The process that the first teacher was trained for, with `T` steps.
        steps: Number of steps of the student, in [1, T / 2].

    Returns:
        The student's process, with `steps` steps.
        The teacher's process, with `2 * steps` steps.

    Raises:
        ValueError: If `steps` is out of range, or rounding makes the timesteps of the two processes differ.
    """
    total = len(diffusion)
    if not 1 <= 2 * steps <= total:
        raise ValueError(f"student_steps={steps}: expected 1 to {total // 2}, half of the {total} diffusion steps")
    student, teacher = (trailing_timesteps(total, count) for count in (steps, 2 * steps))
    if teacher[::2] != student:  # by rounding
        raise ValueError(f"student_steps={steps}: expected a divisor of {total}, or a divisor times a power of two")
    return diffusion.respaced(student), diffusion.respaced(teacher)


@dataclass(frozen=True)
class Distillation:
    r"""Objective of progressive distillation (Salimans & Ho 2022, Algorithm 2).

    From $z_t = \alpha_t x_0 + \sigma_t \epsilon$ the teacher takes two deterministic steps: to $t' = t - 1/2N$, then to
    $t'' = t - 1/N$. The student learns the estimate $\tilde x$ that leads to the same $z_{t''}$ in a single step:

    $$
    \tilde x = \frac{z_{t''} - (\sigma_{t''} / \sigma_t) \, z_t}
    {\alpha_{t''} - (\sigma_{t''} / \sigma_t) \, \alpha_t}, \quad
    L = \max\Big( \frac{\alpha_t^2}{\sigma_t^2}, 1 \Big) \, \| \tilde x - \hat x(z_t) \|^2
    $$

    Args:
        estimate: The teacher's estimate of $x_0$ as a function of $x_t$, the timesteps and the classes. It has no
            gradient and is clipped as in the teacher's sampler.
        teacher: The teacher's process, see `halved`.
        prediction_type: Quantity that the student predicts, one of `STUDENT_PREDICTIONS`. Predicting the noise is not
            possible: where $z_t$ is pure noise, it does not determine the image.

    Raises:
        ValueError: If `prediction_type` is unknown.

    Examples:
        A teacher with a perfect estimate, and a student with an error of 1/2 at steps where the weight is 1:

        >>> import torch
        >>> full = GaussianDiffusion(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
        >>> student, teacher = halved(full, 4)
        >>> x_start, noise, t = torch.zeros(2, 3, 8, 8), torch.randn(2, 3, 8, 8), torch.tensor([2, 3])
        >>> objective = Distillation(lambda x_t, t, classes: x_start, teacher, "sample")
        >>> objective(student, x_start + 0.5, x_start, t, noise, student.q_sample(x_start, t, noise))
        tensor([0.2500, 0.2500])
    """

    estimate: Estimate
    teacher: GaussianDiffusion
    prediction_type: str = "v_prediction"

    def __post_init__(self) -> None:
        """Check the prediction type."""
        check_one_of("prediction_type", self.prediction_type, STUDENT_PREDICTIONS)

    def __call__(
        self,
        diffusion: GaussianDiffusion,
        output: Tensor,
        x_start: Tensor,
        t: Tensor,
        noise: Tensor,
        x_t: Tensor,
        classes: Tensor | None = None,
    ) -> Tensor:
        """Evaluate the objective `truncated_snr` with the student's target in place of the images.

        Args:
            diffusion: The student's process.
            output: The student's prediction at `x_t`, shape `(B, C, H, W)`.
            x_start: Not used: the teacher's estimates replace the images.
            t: Timesteps of the student's process, int64, shape `(B,)`.
            noise: Not used.
            x_t: The diffused images $z_t$, shape of `output`.
            classes: Class labels, int64, shape `(B,)`; None for unconditional networks.

        Returns:
            The loss per image, averaged over its pixels, float32, shape `(B,)`.
        """
        x_hat = diffusion.predict_start(output.float(), x_t, t, self.prediction_type)
        target = self.target(diffusion, x_t, t, classes)
        return Objective("truncated_snr", "sample")(diffusion, x_hat, target, t, noise, x_t)

    def target(self, diffusion: GaussianDiffusion, x_t: Tensor, t: Tensor, classes: Tensor | None = None) -> Tensor:
        r"""Return the student's target: the estimate $\tilde x$ with which one step equals two steps of the teacher.

        Args:
            diffusion: The student's process.
            x_t: The diffused images $z_t$, shape `(B, C, H, W)`.
            t: Timesteps of the student's process, int64, shape `(B,)`.
            classes: Class labels, int64, shape `(B,)`; None for an unconditional teacher.

        Returns:
            $\tilde x$, same shape.
        """
        z = x_t
        for step in (2 * t + 1, 2 * t):
            z = self.teacher.ddim_step(self.estimate(z, step, classes), z, step)
        return diffusion.ddim_start(z, x_t, t)
