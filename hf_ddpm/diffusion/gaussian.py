r"""The diffusion process of Ho et al. 2020 (arXiv 2006.11239): forward, posterior and the conversions between them.

A forward process adds Gaussian noise to an image :math:`x_0` in :math:`T` steps,

.. math:: q(x_t \mid x_{t-1}) = \mathcal{N}(\sqrt{1 - \beta_t} \, x_{t-1}, \beta_t I) \tag{2}

and a network learns to walk back, :math:`p_\theta(x_{t-1} \mid x_t) = \mathcal{N}(\mu_\theta(x_t, t), \sigma_t^2 I)`.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hf_ddpm.diffusion.schedules import check_one_of, shift_right

PREDICTION_TYPES = ("epsilon", "sample", "mean", "v_prediction")
LEARNED = ("learned", "learned_range")
VARIANCE_TYPES = ("fixed_small", "fixed_large", *LEARNED)

# Up to this share of the variance of x_T may be signal.
NOISE_SIGNAL = 1e-3


class GaussianDiffusion:
    r"""A discrete Gaussian diffusion, as a function of its variances :math:`\beta_t` alone.

    It takes the *outputs* of a network, never the network. All coefficients are computed once in float64 and enter
    float32 arithmetic at the very end: :math:`1 - \bar\alpha_t` loses its digits in float32 at small `t`.

    Time `t` is 0-based: the paper's :math:`t` minus 1. It is an index into this process, given either as an `int` for
    the whole batch (no tensor is made, no device waits) or as an int64 tensor with one entry an image, which is not
    checked: that would be a wait.

    Args:
        betas: The variances :math:`\beta_t` in (0, 1], shape `(T,)`.

    Attributes:
        betas: :math:`\beta_t`, float64, shape `(T,)`, on the CPU as all tables.
        alphas_cumprod: :math:`\bar\alpha_t = \prod_{s \le t} (1 - \beta_s)`, float64, shape `(T,)`.
        timesteps: What the network is shown at index `t`, int64, shape `(T,)`; `t` itself unless respaced.

    Raises:
        ValueError: If a variance lies outside (0, 1].

    Example:
        What the right noise says of the image (Eq. 15) is the image.

        >>> diffusion = GaussianDiffusion(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
        >>> x_start, noise, t = torch.full((2, 3, 8, 8), 0.5), torch.randn(2, 3, 8, 8), torch.tensor([0, 500])
        >>> x_t = diffusion.q_sample(x_start, t, noise)
        >>> torch.allclose(diffusion.predict_start(noise, x_t, t), x_start, atol=1e-5)
        True
    """

    def __init__(self, betas: Tensor | Sequence[float]):
        self.betas = torch.as_tensor(betas, dtype=torch.float64, device="cpu")
        if self.betas.ndim != 1 or len(self.betas) == 0 or not bool(((self.betas > 0) & (self.betas <= 1)).all()):
            raise ValueError("betas must be a sequence of variances in (0, 1]")
        self.alphas_cumprod = torch.cumprod(1 - self.betas, dim=0)
        self.timesteps = torch.arange(len(self.betas))

        before = shift_right(self.alphas_cumprod)
        noise_ratio = ((1 - before) / (1 - self.alphas_cumprod)).sqrt()
        posterior_var = self.betas * (1 - before) / (1 - self.alphas_cumprod)
        # The posterior of the first step is a point. Its log-variance would be -inf: the paper's likelihood takes
        # that of the second step instead, and for both choices of the variance.
        first = posterior_var[1:2] if len(self) > 1 else self.betas
        self._tables = {
            "signal": self.alphas_cumprod.sqrt(),
            "noise": (1 - self.alphas_cumprod).sqrt(),
            "posterior_start": before.sqrt() * self.betas / (1 - self.alphas_cumprod),
            "posterior_x_t": (1 - self.betas).sqrt() * (1 - before) / (1 - self.alphas_cumprod),
            "fixed_small": torch.cat([first, posterior_var[1:]]).log(),
            "fixed_large": torch.cat([first, self.betas[1:]]).log(),
            "log_beta": self.betas.log(),
            "snr": self.alphas_cumprod / (1 - self.alphas_cumprod),
            "ddim_x_t": noise_ratio,
            "ddim_start": before.sqrt() - noise_ratio * self.alphas_cumprod.sqrt(),
        }
        # What a network was trained for is a single step of the whole process: respaced processes keep these.
        self._tables |= {
            "mean_start": self._tables["posterior_start"],
            "mean_x_t": self._tables["posterior_x_t"],
            "step_var": posterior_var,
            "is_single": torch.ones_like(self.betas),
        }
        self._on_device: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def __len__(self) -> int:
        """Returns the number of steps of this process."""
        return len(self.betas)

    def respaced(self, timesteps: Sequence[int]) -> "GaussianDiffusion":
        r"""Returns the process that visits only some of the steps: the same marginals, and the same network.

        Its variances are :math:`\beta'_i = 1 - \bar\alpha_{\tau_i} / \bar\alpha_{\tau_{i-1}}`
        (Nichol & Dhariwal 2021, Eq. 19).

        Args:
            timesteps: The steps :math:`\tau_i` to keep, distinct, in any order.

        Returns:
            The process, shorter; its `timesteps` tell what the network is to be shown.

        Raises:
            ValueError: If a step lies outside [0, T) or stands twice.
        """
        kept = sorted(timesteps)
        for t in kept:
            if not 0 <= t < len(self):
                raise ValueError(f"timesteps hold {t}, which is not in [0, {len(self)})")
        if not kept or len(set(kept)) < len(kept):
            raise ValueError(f"timesteps must be distinct steps, at least one: {kept}")
        alphas_cumprod = self.alphas_cumprod[kept]
        process = GaussianDiffusion(1 - alphas_cumprod / shift_right(alphas_cumprod))
        process.timesteps = self.timesteps[kept]
        for name in ("mean_start", "mean_x_t", "step_var"):
            process._tables[name] = self._tables[name][kept]
        is_adjacent = torch.diff(torch.tensor(kept), prepend=torch.tensor([-1])) == 1
        process._tables["is_single"] = is_adjacent * self._tables["is_single"][kept]
        return process

    def q_sample(self, x_start: Tensor, t: int | Tensor, noise: Tensor) -> Tensor:
        r"""Diffuses images to step `t` at once.

        .. math:: x_t = \sqrt{\bar\alpha_t} \, x_0 + \sqrt{1 - \bar\alpha_t} \, \epsilon \tag{4}

        Args:
            x_start: Images :math:`x_0` in [-1, 1], shape `(B, C, H, W)`.
            t: Step in [0, T).
            noise: Standard normal :math:`\epsilon`, same shape.

        Returns:
            :math:`x_t`, same shape.
        """
        return self._at("signal", t, x_start) * x_start + self._at("noise", t, x_start) * noise

    def q_jump(self, x_s: Tensor, s: int, t: int, noise: Tensor) -> Tensor:
        r"""Diffuses images from step `s` on to a later step `t` at once.

        .. math:: x_t = \sqrt{\bar\alpha_t / \bar\alpha_s} \, x_s + \sqrt{1 - \bar\alpha_t / \bar\alpha_s} \, \epsilon
            \sim q(x_t \mid x_s)

        which is Eq. 2 for each of the steps in between, and Eq. 4 for `s = -1`, the images themselves.

        Args:
            x_s: Images at step `s`, shape `(B, C, H, W)`.
            s: Step in [-1, t).
            t: Step in [0, T), the same for all images.
            noise: Standard normal :math:`\epsilon`, same shape.

        Returns:
            :math:`x_t`, same shape.

        Raises:
            ValueError: If a step is not in its range.
        """
        ratio = self._alpha_bar(t, s) / self._alpha_bar(s)
        return math.sqrt(ratio) * x_s + math.sqrt(1 - ratio) * noise

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: int | Tensor) -> tuple[Tensor, float | Tensor]:
        r"""Returns mean and log-variance of the forward posterior :math:`q(x_{t-1} \mid x_t, x_0)`.

        .. math:: \tilde\mu_t = \frac{\sqrt{\bar\alpha_{t-1}} \beta_t}{1 - \bar\alpha_t} x_0
            + \frac{\sqrt{\alpha_t} (1 - \bar\alpha_{t-1})}{1 - \bar\alpha_t} x_t, \quad
            \tilde\beta_t = \frac{1 - \bar\alpha_{t-1}}{1 - \bar\alpha_t} \beta_t \tag{6, 7}

        With the network's estimate for `x_start` the mean is that of the reverse step,
        :math:`\mu_\theta(x_t, t)` (Eq. 11).

        Args:
            x_start: :math:`x_0`, or an estimate, shape `(B, C, H, W)`.
            x_t: The diffused images, same shape.
            t: Step in [0, T).

        Returns:
            :math:`\tilde\mu_t`, same shape, and :math:`\log \tilde\beta_t`, broadcastable to it. At `t = 0`, where
            the variance is zero, the log-variance is that of step 1.
        """
        mean = self._at("posterior_start", t, x_t) * x_start + self._at("posterior_x_t", t, x_t) * x_t
        return mean, self._at("fixed_small", t, x_t)

    def log_var(
        self, t: int | Tensor, like: Tensor, variance_type: str, output: Tensor | None = None
    ) -> float | Tensor:
        r"""Returns :math:`\log \sigma_t^2` of the reverse step.

        - `fixed_large`: :math:`\beta_t`, best for :math:`x_0 \sim \mathcal{N}(0, I)` (Section 3.2).
        - `fixed_small`: :math:`\tilde\beta_t`, best for a single point :math:`x_0`.
        - `learned`: the network's own, a diagonal. It is that of a single step of the whole process,
          :math:`v = \tilde\beta_t + c_t^2 \operatorname{Var}(x_0 \mid x_t)` with the coefficient :math:`c_t` of
          :math:`x_0` in Eq. 7; in a longer step of a respaced process it is that step's
          :math:`\tilde\beta'_t + c_t'^2 \operatorname{Var}(x_0 \mid x_t)`, with the variance of pixels kept in [0, 1].
        - `learned_range`: between the two, :math:`u \log \beta_t + (1 - u) \log \tilde\beta_t` with
          :math:`u = (o + 1) / 2` of the network's output :math:`o` (Nichol & Dhariwal 2021, Eq. 15).

        At `t = 0` the fixed ones, and :math:`\tilde\beta_t` above, are :math:`\tilde\beta_1`: it is the variance of
        the decoder, and sampling adds no noise there.

        Args:
            t: Step in [0, T).
            like: A tensor of the shape, dtype and device that the result is to be combined with.
            variance_type: One of `VARIANCE_TYPES`.
            output: What the network says about the variance, shape of `like`; for the learned ones.

        Returns:
            The natural logarithm of the variance, broadcastable to `like`.

        Raises:
            ValueError: If `variance_type` is not allowed, or `output` is missing.
        """
        check_one_of("variance_type", variance_type, VARIANCE_TYPES)
        if variance_type not in LEARNED:
            return self._at(variance_type, t, like)
        if output is None:
            raise ValueError(f"variance_type={variance_type!r} needs a network with twice the channels of the images")
        if variance_type == "learned":
            return output if self._is_whole else self._rescaled(output, t)
        u = (output + 1) / 2
        return u * self._at("log_beta", t, like) + (1 - u) * self._at("fixed_small", t, like)

    def target(self, x_start: Tensor, t: int | Tensor, noise: Tensor, prediction_type: str = "epsilon") -> Tensor:
        r"""Returns what a network of the given kind is trained to say about :math:`x_t`.

        - `epsilon`: the noise :math:`\epsilon` (Eq. 14).
        - `sample`: the image :math:`x_0`.
        - `mean`: the posterior mean :math:`\tilde\mu_t(x_t, x_0)` (Eq. 7), the baseline of Table 2.
        - `v_prediction`: :math:`v = \sqrt{\bar\alpha_t} \, \epsilon - \sqrt{1 - \bar\alpha_t} \, x_0`
          (Salimans & Ho 2022).

        Args:
            x_start: Images :math:`x_0`, shape `(B, C, H, W)`.
            t: Step in [0, T).
            noise: The :math:`\epsilon` of `q_sample`, same shape.
            prediction_type: One of `PREDICTION_TYPES`.

        Returns:
            The target, same shape.

        Raises:
            ValueError: If `prediction_type` is not allowed.
        """
        check_one_of("prediction_type", prediction_type, PREDICTION_TYPES)
        if prediction_type == "epsilon":
            return noise
        if prediction_type == "sample":
            return x_start
        if prediction_type == "mean":
            x_t = self.q_sample(x_start, t, noise)
            return self._at("mean_start", t, x_t) * x_start + self._at("mean_x_t", t, x_t) * x_t
        return self._at("signal", t, noise) * noise - self._at("noise", t, noise) * x_start

    def predict_start(
        self, prediction: Tensor, x_t: Tensor, t: int | Tensor, prediction_type: str = "epsilon"
    ) -> Tensor:
        r"""Returns the image that a network's prediction amounts to.

        .. math:: \hat x_0 = \frac{x_t - \sqrt{1 - \bar\alpha_t} \, \hat\epsilon}{\sqrt{\bar\alpha_t}} \tag{15}

        for the noise; the inverse of what `target` says for the other kinds.

        Args:
            prediction: The output of the network, shape `(B, C, H, W)`.
            x_t: Its input, same shape.
            t: Step in [0, T).
            prediction_type: One of `PREDICTION_TYPES`.

        Returns:
            :math:`\hat x_0`, same shape, not clipped.

        Raises:
            ValueError: If `prediction_type` is not allowed.
        """
        check_one_of("prediction_type", prediction_type, PREDICTION_TYPES)
        if prediction_type == "epsilon":
            return (x_t - self._at("noise", t, x_t) * prediction) / self._at("signal", t, x_t)
        if prediction_type == "sample":
            return prediction
        if prediction_type == "mean":
            return (prediction - self._at("mean_x_t", t, x_t) * x_t) / self._at("mean_start", t, x_t)
        return self._at("signal", t, x_t) * x_t - self._at("noise", t, x_t) * prediction

    def p_mean(
        self,
        prediction: Tensor,
        x_t: Tensor,
        t: int | Tensor,
        prediction_type: str = "epsilon",
        bound: Callable[[Tensor], Tensor] = lambda x_start: x_start,
    ) -> tuple[Tensor, Tensor]:
        r"""Returns the mean of the reverse step and the image that it is heading for.

        .. math:: \mu_\theta(x_t, t) = \tilde\mu_t(x_t, \hat x_0) \tag{11}

        A prediction of type `mean` is itself the mean, as in the paper's code: bounding the image does not change it.
        Only the longer steps of a respaced process go through :math:`\hat x_0`.

        Args:
            prediction: The output of the network, shape `(B, C, H, W)`.
            x_t: Its input, same shape.
            t: Step in [0, T).
            prediction_type: One of `PREDICTION_TYPES`.
            bound: Keeps an estimate of the image within the range of images.

        Returns:
            :math:`\mu_\theta` and :math:`\hat x_0`, both of the same shape.

        Raises:
            ValueError: If `prediction_type` is not allowed.
        """
        x_start = bound(self.predict_start(prediction, x_t, t, prediction_type))
        mean, _ = self.q_posterior(x_start, x_t, t)
        if prediction_type == "mean":
            mean = prediction if self._is_whole else torch.where(self._is_single(t, x_t), prediction, mean)
        return mean, x_start

    def ddim_posterior(self, x_start: Tensor, x_t: Tensor, t: int, eta: float) -> tuple[Tensor, float]:
        r"""Returns mean and standard deviation of the non-Markovian posterior of DDIM (Song et al. 2021, Eqs. 7, 16).

        .. math:: \mathcal{N}\Big(\sqrt{\bar\alpha_{t-1}} \, x_0 + \sqrt{1 - \bar\alpha_{t-1} - \sigma_t^2} \;
            \frac{x_t - \sqrt{\bar\alpha_t} \, x_0}{\sqrt{1 - \bar\alpha_t}}, \; \sigma_t^2 I\Big), \quad
            \sigma_t = \eta \sqrt{\tilde\beta_t}

        It has the marginals of Eq. 4 for every :math:`\eta`; at :math:`\eta = 1` it is the posterior of Eqs. 6 and 7,
        at :math:`\eta = 0` nothing is random.

        Args:
            x_start: :math:`x_0`, or an estimate, shape `(B, C, H, W)`.
            x_t: The diffused images, same shape.
            t: Step in [0, T), the same for all images.
            eta: :math:`\eta` in [0, 1].

        Returns:
            The mean, same shape, and :math:`\sigma_t`, which is 0 at `t = 0`.
        """
        before = self._alpha_bar(t - 1)
        std = eta * math.sqrt(self.betas[t].item() * (1 - before) / (1 - self.alphas_cumprod[t].item()))
        eps = self.predict_eps(x_start, x_t, t)
        return math.sqrt(before) * x_start + math.sqrt(max(1 - before - std**2, 0.0)) * eps, std

    def ddim_inverse(self, eps: Tensor, x_s: Tensor, s: int, t: int) -> Tensor:
        r"""Returns the :math:`x_t` from which a DDIM step with the noise `eps` leads to :math:`x_s`.

        .. math:: x_t = \sqrt{\bar\alpha_t} \;
            \frac{x_s - \sqrt{1 - \bar\alpha_s} \, \hat\epsilon}{\sqrt{\bar\alpha_s}}
            + \sqrt{1 - \bar\alpha_t} \, \hat\epsilon

        It is `ddim_posterior` at :math:`\eta = 0`, solved for :math:`x_t` (Song et al. 2021, Eq. 13 backwards).

        Args:
            eps: :math:`\hat\epsilon`, the noise predicted at :math:`x_t`, shape `(B, C, H, W)`.
            x_s: Images at step `s`, same shape.
            s: Step in [-1, t); -1 stands for the images themselves.
            t: Step in [0, T), the same for all images.

        Returns:
            :math:`x_t`, same shape.

        Raises:
            ValueError: If a step is not in its range.
        """
        before, after = self._alpha_bar(s), self._alpha_bar(t, s)
        x_start = (x_s - math.sqrt(1 - before) * eps) / math.sqrt(before)
        return math.sqrt(after) * x_start + math.sqrt(1 - after) * eps

    def ddim_step(self, x_start: Tensor, x_t: Tensor, t: int | Tensor) -> Tensor:
        r"""Takes a deterministic step of DDIM (Song et al. 2021, Eq. 12; Salimans & Ho 2022, Eq. 8).

        .. math:: x_{t-1} = \sqrt{\bar\alpha_{t-1}} \, x_0 + \frac{\sqrt{1 - \bar\alpha_{t-1}}}{\sqrt{1 - \bar\alpha_t}}
            \big( x_t - \sqrt{\bar\alpha_t} \, x_0 \big)

        It is the mean of `ddim_posterior` at :math:`\eta = 0`; here every image may have a step of its own.

        Args:
            x_start: :math:`x_0`, or an estimate, shape `(B, C, H, W)`.
            x_t: The diffused images, same shape.
            t: Step in [0, T).

        Returns:
            :math:`x_{t-1}`, same shape; `x_start` itself at `t = 0`.
        """
        return self._at("ddim_start", t, x_t) * x_start + self._at("ddim_x_t", t, x_t) * x_t

    def ddim_start(self, x_prev: Tensor, x_t: Tensor, t: int | Tensor) -> Tensor:
        r"""Returns the image for which `ddim_step` leads from `x_t` to `x_prev` (Salimans & Ho 2022, Algorithm 2).

        .. math:: \tilde x_0 = \frac{x_{t-1} - (\sigma_{t-1} / \sigma_t) \, x_t}
            {\alpha_{t-1} - (\sigma_{t-1} / \sigma_t) \, \alpha_t}, \quad
            \alpha_t = \sqrt{\bar\alpha_t}, \; \sigma_t = \sqrt{1 - \bar\alpha_t}

        Args:
            x_prev: :math:`x_{t-1}`, shape `(B, C, H, W)`.
            x_t: The diffused images, same shape.
            t: Step in [0, T).

        Returns:
            :math:`\tilde x_0`, same shape; `x_prev` itself at `t = 0`.
        """
        return (x_prev - self._at("ddim_x_t", t, x_t) * x_t) / self._at("ddim_start", t, x_t)

    def predict_eps(self, x_start: Tensor, x_t: Tensor, t: int | Tensor) -> Tensor:
        r"""Returns the noise that leads from `x_start` to `x_t`, the inverse of Eq. 4.

        .. math:: \hat\epsilon = \frac{x_t - \sqrt{\bar\alpha_t} \, \hat x_0}{\sqrt{1 - \bar\alpha_t}}

        Args:
            x_start: :math:`x_0`, or an estimate, shape `(B, C, H, W)`.
            x_t: The diffused images, same shape.
            t: Step in [0, T).

        Returns:
            :math:`\hat\epsilon`, same shape.
        """
        return (x_t - self._at("signal", t, x_t) * x_start) / self._at("noise", t, x_t)

    def score(self, eps: Tensor, t: int | Tensor) -> Tensor:
        r"""Returns the score of the diffused data that a noise prediction amounts to.

        .. math:: \nabla_{x_t} \log q(x_t) \approx -\frac{\epsilon_\theta(x_t, t)}{\sqrt{1 - \bar\alpha_t}}

        since :math:`\nabla_{x_t} \log q(x_t \mid x_0) = -\epsilon / \sqrt{1 - \bar\alpha_t}`: Eq. 14 is denoising score
        matching (Vincent 2011) over all noise levels at once, and Algorithm 2 looks like annealed Langevin dynamics
        with this score (Song & Ermon 2019), as Section 3.2 of the paper says.

        Args:
            eps: The predicted noise, shape `(B, C, H, W)`.
            t: Step in [0, T).

        Returns:
            The score, same shape.
        """
        return -eps / self._at("noise", t, eps)

    def snr(self, t: int | Tensor, like: Tensor) -> float | Tensor:
        r"""Returns the signal-to-noise ratio :math:`\bar\alpha_t / (1 - \bar\alpha_t)`, broadcastable to `like`."""
        return self._at("snr", t, like)

    def _rescaled(self, log_var: Tensor, t: int | Tensor) -> Tensor:
        """Turns the log-variance of a single step into that of the step of this process, which may be longer."""
        excess = torch.exp(log_var) - self._at("step_var", t, log_var)
        pixel_var = (excess / self._at("mean_start", t, log_var) ** 2).clamp(0, 1)
        posterior_var = torch.exp(torch.as_tensor(self._at("fixed_small", t, log_var)))
        longer = torch.log(posterior_var + self._at("posterior_start", t, log_var) ** 2 * pixel_var)
        return torch.where(self._is_single(t, log_var), log_var, longer)

    @property
    def _is_whole(self) -> bool:
        return bool(self._tables["is_single"].all())

    def _is_single(self, t: int | Tensor, like: Tensor) -> Tensor:
        """Returns whether steps lead to the next time of the whole process, broadcastable to `like`."""
        return torch.as_tensor(self._at("is_single", t, like), device=like.device) > 0

    def _alpha_bar(self, t: int, above: int = -2) -> float:
        r"""Returns :math:`\bar\alpha_t` as a number, 1 at -1; a `ValueError` unless `t` is a step above another one."""
        if not above < t < len(self):
            raise ValueError(f"t={t} is not in [{above + 1}, {len(self)})")
        return self.alphas_cumprod[t].item() if t >= 0 else 1.0

    def _at(self, name: str, t: int | Tensor, like: Tensor) -> float | Tensor:
        """Gathers a coefficient at `t`: a number, or one an image, shaped to multiply `like`."""
        table = self._tables[name]
        if not isinstance(t, Tensor):
            if not 0 <= t < len(table):
                raise ValueError(f"t={t} is not in [0, {len(table)})")
            return table[t].item()
        # Low-precision images meet float32 coefficients and so promote to float32: in bfloat16 the coefficients of
        # the first steps would round to "no noise at all".
        key = (name, t.device, torch.promote_types(like.dtype, torch.float32))
        if key not in self._on_device:
            self._on_device[key] = table.to(device=key[1], dtype=key[2])
        return self._on_device[key][t].view(-1, *[1] * (like.ndim - 1))


def start_signal(pixels: int) -> float:
    """Returns the largest share of the variance that may be signal where sampling starts from noise.

    All pixels together show the brightness of an image: the more of them, the less signal each may hold.

    Args:
        pixels: Number of pixels of an image, per channel.
    """
    return min(NOISE_SIGNAL, 1 / pixels)


def is_noise(alphas_cumprod: Tensor, t: int, limit: float) -> bool:
    r"""Returns whether a reverse process may start at `t` from :math:`\mathcal{N}(0, I)`.

    That is so if the signal is small, :math:`\bar\alpha_t \le` `limit`, or hardly larger than at the end:
    :math:`\bar\alpha_t \le 1.5 \bar\alpha_T`.

    Args:
        alphas_cumprod: :math:`\bar\alpha_t`, shape `(T,)`.
        t: Step in [0, T).
        limit: What is small, see `start_signal`.
    """
    return bool(alphas_cumprod[t] <= max(limit, 1.5 * float(alphas_cumprod[-1])))
