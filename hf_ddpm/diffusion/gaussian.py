r"""The diffusion process of Ho et al. 2020 (arXiv 2006.11239): forward process, posterior, reverse steps.

The forward process adds Gaussian noise to an image $x_0$ in $T$ steps,

$$
q(x_t \mid x_{t-1}) = \mathcal{N}(\sqrt{1 - \beta_t} \, x_{t-1}, \beta_t I) \tag{2}
$$

and a network learns the reverse process, $p_\theta(x_{t-1} \mid x_t) = \mathcal{N}(\mu_\theta(x_t, t), \sigma_t^2 I)$.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hf_ddpm.diffusion.schedules import check_one_of, shift_right

PREDICTION_TYPES = ("epsilon", "sample", "mean", "v_prediction")
LEARNED = ("learned", "learned_range")
VARIANCE_TYPES = ("fixed_small", "fixed_large", *LEARNED)

# Largest share of signal in the variance of x_T at which x_T still counts as noise.
NOISE_SIGNAL = 1e-3


class GaussianDiffusion:
    r"""A discrete Gaussian diffusion process, defined by its variances $\beta_t$.

    Methods take the *outputs* of a network, never the network. All coefficients are computed once in float64 and
    converted to float32 only when they meet images: in float32, $1 - \bar\alpha_t$ would lose precision at small `t`.

    The timestep `t` is a 0-based index into this process, so `t` is the paper's $t$ minus 1. Pass an `int` for the
    whole batch (this makes no tensor and needs no synchronization with the device), or an int64 tensor with one entry
    per image. Tensors are not checked, as this would synchronize.

    Args:
        betas: The variances $\beta_t$ in (0, 1], shape `(T,)`.

    Attributes:
        betas: $\beta_t$, float64, shape `(T,)`, on the CPU like all coefficients.
        alphas_cumprod: $\bar\alpha_t = \prod_{s \le t} (1 - \beta_s)$, float64, shape `(T,)`.
        timesteps: Timestep to pass to the network at index `t`, int64, shape `(T,)`; `t` itself unless respaced.

    Raises:
        ValueError: If `betas` is empty or not one-dimensional, or a variance lies outside (0, 1].

    Examples:
        From the true noise, Eq. 15 recovers the image:

        >>> diffusion = GaussianDiffusion(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
        >>> x_start, noise, t = torch.full((2, 3, 8, 8), 0.5), torch.randn(2, 3, 8, 8), torch.tensor([0, 500])
        >>> x_t = diffusion.q_sample(x_start, t, noise)
        >>> torch.allclose(diffusion.predict_start(noise, x_t, t), x_start, atol=1e-5)
        True
    """

    def __init__(self, betas: Tensor | Sequence[float]):
        self.betas = torch.as_tensor(betas, dtype=torch.float64, device="cpu")
        if self.betas.ndim != 1 or len(self.betas) == 0 or not bool(((self.betas > 0) & (self.betas <= 1)).all()):
            raise ValueError("betas: expected a sequence of variances in (0, 1]")
        self.alphas_cumprod = torch.cumprod(1 - self.betas, dim=0)
        self.timesteps = torch.arange(len(self.betas))

        before = shift_right(self.alphas_cumprod)
        noise_ratio = ((1 - before) / (1 - self.alphas_cumprod)).sqrt()
        posterior_var = self.betas * (1 - before) / (1 - self.alphas_cumprod)
        # The posterior at t = 0 is a single point with log-variance -inf. Like the paper's code, the likelihood uses
        # the posterior variance of the next step there, for both fixed variances.
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
        # Networks are trained for single steps of the full process: respaced processes keep these coefficients.
        self._tables |= {
            "mean_start": self._tables["posterior_start"],
            "mean_x_t": self._tables["posterior_x_t"],
            "step_var": posterior_var,
            "is_single": torch.ones_like(self.betas),
        }
        self._on_device: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def __len__(self) -> int:
        """Return the number $T$ of steps of this process."""
        return len(self.betas)

    def respaced(self, timesteps: Sequence[int]) -> "GaussianDiffusion":
        r"""Return the process restricted to some timesteps, with the same marginals and for the same network.

        Its variances are $\beta'_i = 1 - \bar\alpha_{\tau_i} / \bar\alpha_{\tau_{i-1}}$
        (Nichol & Dhariwal 2021, Eq. 19).

        Args:
            timesteps: The timesteps $\tau_i$ to keep, distinct, in any order.

        Returns:
            The shorter process. Its `timesteps` are the inputs for the network.

        Raises:
            ValueError: If `timesteps` is empty, or a timestep lies outside [0, T) or is repeated.
        """
        kept = sorted(timesteps)
        for t in kept:
            if not 0 <= t < len(self):
                raise ValueError(f"timesteps: {t} is not in [0, {len(self)})")
        if not kept or len(set(kept)) < len(kept):
            raise ValueError(f"timesteps={kept}: expected at least one timestep, and no repeated ones")
        alphas_cumprod = self.alphas_cumprod[kept]
        process = GaussianDiffusion(1 - alphas_cumprod / shift_right(alphas_cumprod))
        process.timesteps = self.timesteps[kept]
        for name in ("mean_start", "mean_x_t", "step_var"):
            process._tables[name] = self._tables[name][kept]
        is_adjacent = torch.diff(torch.tensor(kept), prepend=torch.tensor([-1])) == 1
        process._tables["is_single"] = is_adjacent * self._tables["is_single"][kept]
        return process

    def q_sample(self, x_start: Tensor, t: int | Tensor, noise: Tensor) -> Tensor:
        r"""Diffuse images to timestep `t` directly.

        $$
        x_t = \sqrt{\bar\alpha_t} \, x_0 + \sqrt{1 - \bar\alpha_t} \, \epsilon \tag{4}
        $$

        Args:
            x_start: Images $x_0$ in [-1, 1], shape `(B, C, H, W)`.
            t: Timestep in [0, T).
            noise: Standard normal $\epsilon$, same shape.

        Returns:
            $x_t$, same shape.
        """
        return self._at("signal", t, x_start) * x_start + self._at("noise", t, x_start) * noise

    def q_jump(self, x_s: Tensor, s: int, t: int, noise: Tensor) -> Tensor:
        r"""Diffuse images from timestep `s` to a later timestep `t` directly.

        $$
        x_t = \sqrt{\bar\alpha_t / \bar\alpha_s} \, x_s + \sqrt{1 - \bar\alpha_t / \bar\alpha_s} \, \epsilon
        \sim q(x_t \mid x_s)
        $$

        This is Eq. 2 applied at every timestep in between; for `s = -1` (images without noise) it is Eq. 4.

        Args:
            x_s: Images at timestep `s`, shape `(B, C, H, W)`.
            s: Timestep in [-1, t); -1 for images without noise.
            t: Timestep in [0, T), the same for all images.
            noise: Standard normal $\epsilon$, same shape.

        Returns:
            $x_t$, same shape.

        Raises:
            ValueError: If a timestep is out of range.
        """
        ratio = self._alpha_bar(t, s) / self._alpha_bar(s)
        return math.sqrt(ratio) * x_s + math.sqrt(1 - ratio) * noise

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: int | Tensor) -> tuple[Tensor, float | Tensor]:
        r"""Return the mean and the log-variance of the forward posterior $q(x_{t-1} \mid x_t, x_0)$.

        $$
        \tilde\mu_t = \frac{\sqrt{\bar\alpha_{t-1}} \beta_t}{1 - \bar\alpha_t} x_0
        + \frac{\sqrt{\alpha_t} (1 - \bar\alpha_{t-1})}{1 - \bar\alpha_t} x_t, \quad
        \tilde\beta_t = \frac{1 - \bar\alpha_{t-1}}{1 - \bar\alpha_t} \beta_t \tag{6, 7}
        $$

        If `x_start` is the network's estimate, the mean is the mean of the reverse step, $\mu_\theta(x_t, t)$ (Eq. 11).

        Args:
            x_start: $x_0$, or an estimate of it, shape `(B, C, H, W)`.
            x_t: The diffused images, same shape.
            t: Timestep in [0, T).

        Returns:
            The mean $\tilde\mu_t$, same shape.
            The log-variance $\log \tilde\beta_t$, broadcastable to the mean. At `t = 0`, where the variance is zero, it
                is the variance at `t = 1`.
        """
        mean = self._at("posterior_start", t, x_t) * x_start + self._at("posterior_x_t", t, x_t) * x_t
        return mean, self._at("fixed_small", t, x_t)

    def log_var(
        self, t: int | Tensor, like: Tensor, variance_type: str, output: Tensor | None = None
    ) -> float | Tensor:
        r"""Return the log-variance $\log \sigma_t^2$ of the reverse step.

        - `fixed_large`: $\beta_t$, optimal for $x_0 \sim \mathcal{N}(0, I)$ (Section 3.2).
        - `fixed_small`: $\tilde\beta_t$, optimal if $x_0$ is always the same point (Section 3.2).
        - `learned`: predicted by the network per pixel. The prediction holds for a single step of the full process:
          $v = \tilde\beta_t + c_t^2 \operatorname{Var}(x_0 \mid x_t)$, where $c_t$ is the coefficient of $x_0$ in
          Eq. 7. For a longer step of a respaced process it is converted to
          $\tilde\beta'_t + c_t'^2 \operatorname{Var}(x_0 \mid x_t)$, with $\operatorname{Var}(x_0 \mid x_t)$ clamped
          to [0, 1].
        - `learned_range`: interpolates the two fixed variances, $u \log \beta_t + (1 - u) \log \tilde\beta_t$ with
          $u = (o + 1) / 2$ and the network's output $o$ (Nichol & Dhariwal 2021, Eq. 15).

        At `t = 0`, both fixed variances and $\tilde\beta_t$ above are replaced by the paper's $\tilde\beta_2$, that of
        `t = 1`. It is the variance of the decoder (Eq. 13); sampling adds no noise at `t = 0`.

        Args:
            t: Timestep in [0, T).
            like: A tensor with the shape, dtype and device that the result is combined with.
            variance_type: One of `VARIANCE_TYPES`.
            output: The network's output for the variance, shape of `like`; required by `learned` and `learned_range`.

        Returns:
            The natural logarithm of the variance, broadcastable to `like`.

        Raises:
            ValueError: If `variance_type` is unknown, or `output` is missing.
        """
        check_one_of("variance_type", variance_type, VARIANCE_TYPES)
        if variance_type not in LEARNED:
            return self._at(variance_type, t, like)
        if output is None:
            raise ValueError(
                f"variance_type={variance_type!r}: expected a network output with twice the channels of the images"
            )
        if variance_type == "learned":
            return output if self._is_whole else self._rescaled(output, t)
        u = (output + 1) / 2
        return u * self._at("log_beta", t, like) + (1 - u) * self._at("fixed_small", t, like)

    def target(self, x_start: Tensor, t: int | Tensor, noise: Tensor, prediction_type: str = "epsilon") -> Tensor:
        r"""Return the training target of a network, given its prediction type.

        - `epsilon`: the noise $\epsilon$ (Eq. 14).
        - `sample`: the image $x_0$.
        - `mean`: the posterior mean $\tilde\mu_t(x_t, x_0)$ (Eq. 7), the baseline of Table 2.
        - `v_prediction`: $v = \sqrt{\bar\alpha_t} \, \epsilon - \sqrt{1 - \bar\alpha_t} \, x_0$
          (Salimans & Ho 2022).

        Args:
            x_start: Images $x_0$, shape `(B, C, H, W)`.
            t: Timestep in [0, T).
            noise: The noise $\epsilon$ passed to `q_sample`, same shape.
            prediction_type: One of `PREDICTION_TYPES`.

        Returns:
            The target, same shape.

        Raises:
            ValueError: If `prediction_type` is unknown.
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
        r"""Return the estimate $\hat x_0$ of the image that follows from a network's prediction.

        For noise predictions,

        $$
        \hat x_0 = \frac{x_t - \sqrt{1 - \bar\alpha_t} \, \hat\epsilon}{\sqrt{\bar\alpha_t}} \tag{15}
        $$

        For other prediction types, it is the $x_0$ whose `target` is the prediction.

        Args:
            prediction: Output of the network, shape `(B, C, H, W)`.
            x_t: Input of the network, same shape.
            t: Timestep in [0, T).
            prediction_type: One of `PREDICTION_TYPES`.

        Returns:
            $\hat x_0$, same shape, not clipped.

        Raises:
            ValueError: If `prediction_type` is unknown.
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
        r"""Return the mean of the reverse step and the estimate $\hat x_0$ that it uses.

        $$
        \mu_\theta(x_t, t) = \tilde\mu_t(x_t, \hat x_0) \tag{11}
        $$

        With `prediction_type="mean"`, the prediction itself is the mean, as in the paper's code, and clipping
        $\hat x_0$ does not change it. Only longer steps of a respaced process compute the mean from $\hat x_0$.

        Args:
            prediction: Output of the network, shape `(B, C, H, W)`.
            x_t: Input of the network, same shape.
            t: Timestep in [0, T).
            prediction_type: One of `PREDICTION_TYPES`.
            bound: Function that clips $\hat x_0$ to the range of images; by default nothing is clipped.

        Returns:
            The mean $\mu_\theta$, same shape.
            The estimate $\hat x_0$, same shape.

        Raises:
            ValueError: If `prediction_type` is unknown.
        """
        x_start = bound(self.predict_start(prediction, x_t, t, prediction_type))
        mean, _ = self.q_posterior(x_start, x_t, t)
        if prediction_type == "mean":
            mean = prediction if self._is_whole else torch.where(self._is_single(t, x_t), prediction, mean)
        return mean, x_start

    def ddim_posterior(self, x_start: Tensor, x_t: Tensor, t: int, eta: float) -> tuple[Tensor, float]:
        r"""Return the mean and the standard deviation of the DDIM posterior (Song et al. 2021, Eqs. 7 and 16).

        $$
        \mathcal{N}\Big(\sqrt{\bar\alpha_{t-1}} \, x_0 + \sqrt{1 - \bar\alpha_{t-1} - \sigma_t^2} \;
        \frac{x_t - \sqrt{\bar\alpha_t} \, x_0}{\sqrt{1 - \bar\alpha_t}}, \; \sigma_t^2 I\Big), \quad
        \sigma_t = \eta \sqrt{\tilde\beta_t}
        $$

        It has the marginals of Eq. 4 for every $\eta$. At $\eta = 1$ it equals the posterior of Eqs. 6 and 7;
        at $\eta = 0$ it is deterministic.

        Args:
            x_start: $x_0$, or an estimate of it, shape `(B, C, H, W)`.
            x_t: The diffused images, same shape.
            t: Timestep in [0, T), the same for all images.
            eta: $\eta$ in [0, 1].

        Returns:
            The mean, same shape.
            The standard deviation $\sigma_t$, which is 0 at `t = 0`.
        """
        before = self._alpha_bar(t - 1)
        std = eta * math.sqrt(self.betas[t].item() * (1 - before) / (1 - self.alphas_cumprod[t].item()))
        eps = self.predict_eps(x_start, x_t, t)
        return math.sqrt(before) * x_start + math.sqrt(max(1 - before - std**2, 0.0)) * eps, std

    def ddim_inverse(self, eps: Tensor, x_s: Tensor, s: int, t: int) -> Tensor:
        r"""Return the $x_t$ from which a deterministic DDIM step with the noise `eps` leads to $x_s$.

        $$
        x_t = \sqrt{\bar\alpha_t} \;
        \frac{x_s - \sqrt{1 - \bar\alpha_s} \, \hat\epsilon}{\sqrt{\bar\alpha_s}}
        + \sqrt{1 - \bar\alpha_t} \, \hat\epsilon
        $$

        This solves the mean of `ddim_posterior` at $\eta = 0$ for $x_t$ (Song et al. 2021, Eq. 13 in reverse).

        Args:
            eps: $\hat\epsilon$, the noise predicted at $x_t$, shape `(B, C, H, W)`.
            x_s: Images at timestep `s`, same shape.
            s: Timestep in [-1, t); -1 for images without noise.
            t: Timestep in [0, T), the same for all images.

        Returns:
            $x_t$, same shape.

        Raises:
            ValueError: If a timestep is out of range.
        """
        before, after = self._alpha_bar(s), self._alpha_bar(t, s)
        x_start = (x_s - math.sqrt(1 - before) * eps) / math.sqrt(before)
        return math.sqrt(after) * x_start + math.sqrt(1 - after) * eps

    def ddim_step(self, x_start: Tensor, x_t: Tensor, t: int | Tensor) -> Tensor:
        r"""Take a deterministic DDIM step (Song et al. 2021, Eq. 12; Salimans & Ho 2022, Eq. 8).

        $$
        x_{t-1} = \sqrt{\bar\alpha_{t-1}} \, x_0 + \frac{\sqrt{1 - \bar\alpha_{t-1}}}{\sqrt{1 - \bar\alpha_t}}
        \big( x_t - \sqrt{\bar\alpha_t} \, x_0 \big)
        $$

        The result is the mean of `ddim_posterior` at $\eta = 0$, but each image may have its own timestep.

        Args:
            x_start: $x_0$, or an estimate of it, shape `(B, C, H, W)`.
            x_t: The diffused images, same shape.
            t: Timestep in [0, T).

        Returns:
            $x_{t-1}$, same shape; `x_start` itself at `t = 0`.
        """
        return self._at("ddim_start", t, x_t) * x_start + self._at("ddim_x_t", t, x_t) * x_t

    def ddim_start(self, x_prev: Tensor, x_t: Tensor, t: int | Tensor) -> Tensor:
        r"""Return the estimate with which `ddim_step` leads from `x_t` to `x_prev` (Salimans & Ho 2022, Algorithm 2).

        $$
        \tilde x_0 = \frac{x_{t-1} - (\sigma_{t-1} / \sigma_t) \, x_t}
        {\alpha_{t-1} - (\sigma_{t-1} / \sigma_t) \, \alpha_t}, \quad
        \alpha_t = \sqrt{\bar\alpha_t}, \; \sigma_t = \sqrt{1 - \bar\alpha_t}
        $$

        Args:
            x_prev: $x_{t-1}$, shape `(B, C, H, W)`.
            x_t: The diffused images, same shape.
            t: Timestep in [0, T).

        Returns:
            $\tilde x_0$, same shape; `x_prev` itself at `t = 0`.
        """
        return (x_prev - self._at("ddim_x_t", t, x_t) * x_t) / self._at("ddim_start", t, x_t)

    def predict_eps(self, x_start: Tensor, x_t: Tensor, t: int | Tensor) -> Tensor:
        r"""Return the noise that diffuses `x_start` to `x_t`: Eq. 4 solved for $\epsilon$.

        $$
        \hat\epsilon = \frac{x_t - \sqrt{\bar\alpha_t} \, \hat x_0}{\sqrt{1 - \bar\alpha_t}}
        $$

        Args:
            x_start: $x_0$, or an estimate of it, shape `(B, C, H, W)`.
            x_t: The diffused images, same shape.
            t: Timestep in [0, T).

        Returns:
            $\hat\epsilon$, same shape.
        """
        return (x_t - self._at("signal", t, x_t) * x_start) / self._at("noise", t, x_t)

    def score(self, eps: Tensor, t: int | Tensor) -> Tensor:
        r"""Return the score (gradient of the log-density) of the diffused data that follows from a noise prediction.

        $$
        \nabla_{x_t} \log q(x_t) \approx -\frac{\epsilon_\theta(x_t, t)}{\sqrt{1 - \bar\alpha_t}}
        $$

        This holds because $\nabla_{x_t} \log q(x_t \mid x_0) = -\epsilon / \sqrt{1 - \bar\alpha_t}$. Section 3.2 of the
        paper makes the connection: Eq. 14 is denoising score matching (Vincent 2011) over all noise levels, and
        Algorithm 2 resembles annealed Langevin dynamics with this score (Song & Ermon 2019).

        Args:
            eps: The predicted noise, shape `(B, C, H, W)`.
            t: Timestep in [0, T).

        Returns:
            The score, same shape.
        """
        return -eps / self._at("noise", t, eps)

    def snr(self, t: int | Tensor, like: Tensor) -> float | Tensor:
        r"""Return the signal-to-noise ratio $\bar\alpha_t / (1 - \bar\alpha_t)$.

        Args:
            t: Timestep in [0, T).
            like: A tensor with the shape, dtype and device that the result is combined with.

        Returns:
            The ratio, broadcastable to `like`.
        """
        return self._at("snr", t, like)

    def _rescaled(self, log_var: Tensor, t: int | Tensor) -> Tensor:
        """Convert the log-variance of a single step to the log-variance of the corresponding step here."""
        excess = torch.exp(log_var) - self._at("step_var", t, log_var)
        pixel_var = (excess / self._at("mean_start", t, log_var) ** 2).clamp(0, 1)
        posterior_var = torch.exp(torch.as_tensor(self._at("fixed_small", t, log_var)))
        longer = torch.log(posterior_var + self._at("posterior_start", t, log_var) ** 2 * pixel_var)
        return torch.where(self._is_single(t, log_var), log_var, longer)

    @property
    def _is_whole(self) -> bool:
        return bool(self._tables["is_single"].all())

    def _is_single(self, t: int | Tensor, like: Tensor) -> Tensor:
        """Return which steps are single steps of the full process, broadcastable to `like`."""
        return torch.as_tensor(self._at("is_single", t, like), device=like.device) > 0

    def _alpha_bar(self, t: int, above: int = -2) -> float:
        r"""Return $\bar\alpha_t$ as a number, 1 at `t = -1`; raise a `ValueError` unless `above < t < T`."""
        if not above < t < len(self):
            raise ValueError(f"t={t} is not in [{above + 1}, {len(self)})")
        return self.alphas_cumprod[t].item() if t >= 0 else 1.0

    def _at(self, name: str, t: int | Tensor, like: Tensor) -> float | Tensor:
        """Return a coefficient at `t`: a number, or a tensor with one entry per image, shaped to multiply `like`."""
        table = self._tables[name]
        if not isinstance(t, Tensor):
            if not 0 <= t < len(table):
                raise ValueError(f"t={t} is not in [0, {len(table)})")
            return table[t].item()
        # float32 at least, also for images in bfloat16, where the coefficients of the first timesteps would round to
        # "no noise". Multiplying promotes the images to float32.
        key = (name, t.device, torch.promote_types(like.dtype, torch.float32))
        if key not in self._on_device:
            self._on_device[key] = table.to(device=key[1], dtype=key[2])
        return self._on_device[key][t].view(-1, *[1] * (like.ndim - 1))


def start_signal(pixels: int) -> float:
    r"""Return the largest $\bar\alpha_t$ at which sampling may start from pure noise.

    The more pixels an image has, the smaller the limit: averaged over many pixels, even a weak signal shows the
    brightness of the image.

    Args:
        pixels: Number of pixels of an image, per channel.

    Returns:
        The limit, in (0, 1): `NOISE_SIGNAL`, or less for large images.
    """
    return min(NOISE_SIGNAL, 1 / pixels)


def is_noise(alphas_cumprod: Tensor, t: int, limit: float) -> bool:
    r"""Return whether the reverse process may start at `t` from $\mathcal{N}(0, I)$.

    It may if the signal in $x_t$ is weak ($\bar\alpha_t$ at most `limit`) or hardly stronger than in $x_T$
    ($\bar\alpha_t \le 1.5 \bar\alpha_T$).

    Args:
        alphas_cumprod: $\bar\alpha_t$, shape `(T,)`.
        t: Timestep in [0, T).
        limit: Largest $\bar\alpha_t$ that counts as weak, see `start_signal`.

    Returns:
        True if it may.
    """
    return bool(alphas_cumprod[t] <= max(limit, 1.5 * float(alphas_cumprod[-1])))
