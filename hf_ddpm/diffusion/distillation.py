"""Progressive distillation: the objective of a student that takes one step for two of its teacher."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from hf_ddpm.diffusion.gaussian import GaussianDiffusion
from hf_ddpm.diffusion.losses import truncated_snr
from hf_ddpm.diffusion.schedules import check_one_of, trailing_timesteps

STUDENT_PREDICTIONS = ("v_prediction", "sample")

# Returns the teacher's bounded estimate of x_0 at steps of its process: of x_t, the steps, and classes if it has any.
Estimate = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def halved(diffusion: GaussianDiffusion, steps: int) -> tuple[GaussianDiffusion, GaussianDiffusion]:
    """Returns the processes of a student and of its teacher, which takes twice as many steps.

    Step `t` of the student is the steps `2 t + 1` and `2 t` of the teacher.

    Args:
        diffusion: The process that the first teacher was trained for.
        steps: Steps of the student, at least 1 and at most half of those of `diffusion`.

    Returns:
        The process of the student, of `steps` steps, and that of the teacher.

    Raises:
        ValueError: If `steps` is not allowed.
    """
    total = len(diffusion)
    if not 1 <= 2 * steps <= total:
        raise ValueError(f"student_steps={steps} is not allowed: 1 to {total // 2}, half of the {total} of the process")
    student, teacher = (trailing_timesteps(total, count) for count in (steps, 2 * steps))
    if teacher[::2] != student:  # by rounding
        raise ValueError(f"student_steps={steps} is not allowed: a divisor of {total}, times 1, 2, 4, ...")
    return diffusion.respaced(student), diffusion.respaced(teacher)


@dataclass(frozen=True)
class Distillation:
    r"""Progressive distillation (Salimans & Ho 2022, Algorithm 2): one DDIM step of a student is two of its teacher.

    From :math:`z_t = \alpha_t x_0 + \sigma_t \epsilon` of an image the teacher takes two deterministic steps, over
    :math:`t' = t - 1/2N` to :math:`t'' = t - 1/N`. The student is to estimate the image that takes it there in one:

    .. math:: \tilde x = \frac{z_{t''} - (\sigma_{t''} / \sigma_t) \, z_t}
        {\alpha_{t''} - (\sigma_{t''} / \sigma_t) \, \alpha_t}, \quad
        L = \max\Big( \frac{\alpha_t^2}{\sigma_t^2}, 1 \Big) \, \| \tilde x - \hat x(z_t) \|^2

    Args:
        estimate: The teacher; what it returns has no gradient, and is clipped as its sampler clips it.
        teacher: Its process, see `halved`.
        prediction_type: What the student predicts, one of `STUDENT_PREDICTIONS`: where :math:`z_t` is noise, noise that
            is predicted gives no image.

    Raises:
        ValueError: If `prediction_type` is not allowed.

    Example:
        A teacher that knows the image, and a student that is wrong by 1/2, where the weight is 1.

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
        """Checks the prediction."""
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
        """Evaluates the objective; arguments are those of `Objective`.

        Args:
            diffusion: The process of the student.
            output: What the student predicts at `x_t`, shape `(B, C, H, W)`.
            x_start: The images; not used, as the teacher has the say.
            t: Their steps, int64, shape `(B,)`.
            noise: Not used.
            x_t: The diffused images :math:`z_t`, same shape.
            classes: Their classes, int64, shape `(B,)`, if the networks have any.

        Returns:
            The loss of each image, the mean over its pixels, float32, shape `(B,)`.
        """
        error = diffusion.predict_start(output.float(), x_t, t, self.prediction_type) - self.target(
            diffusion, x_t, t, classes
        )
        return error.square().flatten(1).mean(dim=1) * truncated_snr(diffusion, t, x_t)

    def target(self, diffusion: GaussianDiffusion, x_t: Tensor, t: Tensor, classes: Tensor | None = None) -> Tensor:
        r"""Returns :math:`\tilde x`, the image that leads the student in one step to where two of the teacher lead.

        Args:
            diffusion: The process of the student.
            x_t: The diffused images :math:`z_t`, shape `(B, C, H, W)`.
            t: Their steps in it, int64, shape `(B,)`.
            classes: Their classes, if the teacher has any.

        Returns:
            :math:`\tilde x`, same shape.
        """
        z = x_t
        for step in (2 * t + 1, 2 * t):
            z = self.teacher.ddim_step(self.estimate(z, step, classes), z, step)
        return diffusion.ddim_start(z, x_t, t)
