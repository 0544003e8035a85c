r"""Terms of the variational bound, in nats per dimension.

$$
-\log p_\theta(x_0) \le L_T + \sum_{t > 1} L_{t-1} + L_0 \tag{5}
$$

Nothing here sums over the dimensions of an image; the caller does.
"""

import math

import torch
from torch import Tensor

from hf_ddpm.diffusion.gaussian import GaussianDiffusion

# Probabilities are clamped to at least this, as in the paper's code.
SMALLEST_PROBABILITY = 1e-12


def gaussian_kl(mean_q: Tensor, log_var_q: float | Tensor, mean_p: Tensor | float, log_var_p: float | Tensor) -> Tensor:
    r"""Return the KL divergence between two Gaussians with diagonal covariances.

    $$
    D_{KL}(q \| p) = \frac{1}{2} \left( \log\frac{\sigma_p^2}{\sigma_q^2} - 1
    + \frac{\sigma_q^2 + (\mu_q - \mu_p)^2}{\sigma_p^2} \right)
    $$

    Args:
        mean_q: Mean of `q`, any shape.
        log_var_q: Log-variance of `q`, broadcastable.
        mean_p: Mean of `p`, broadcastable.
        log_var_p: Log-variance of `p`, broadcastable.

    Returns:
        The divergence per dimension, in nats, shape of `mean_q`.
    """
    log_ratio = torch.as_tensor(log_var_q - log_var_p, dtype=mean_q.dtype, device=mean_q.device)
    precision = torch.exp(-torch.as_tensor(log_var_p, dtype=mean_q.dtype, device=mean_q.device))
    return 0.5 * (torch.expm1(log_ratio) - log_ratio + (mean_q - mean_p) ** 2 * precision)


def decoder_log_likelihood(x_start: Tensor, mean: Tensor, log_var: float | Tensor, levels: int = 256) -> Tensor:
    r"""Return the log-probability of discrete pixel values under the decoder.

    $$
    p_\theta(x_0 \mid x_1) = \prod_i \int_{\delta_-(x_0^i)}^{\delta_+(x_0^i)}
    \mathcal{N}(x; \mu_\theta^i(x_1, 1), \sigma_1^2) \, dx \tag{13}
    $$

    Each bin extends half a level to both sides of its pixel value; the first and the last bin extend to infinity. The
    normal cumulative distribution function is approximated as in the paper's code:
    $\Phi(z) \approx (1 + \tanh(\sqrt{2 / \pi} \, (z + 0.044715 z^3))) / 2$.

    Args:
        x_start: Images $x_0$ in [-1, 1], each value one of the `levels`, shape `(B, C, H, W)`.
        mean: $\mu_\theta$, same shape.
        log_var: $\log \sigma_1^2$, broadcastable.
        levels: Number of distinct pixel values of the data, evenly spaced over [-1, 1]: a bin is `2 / (levels - 1)`
            wide.

    Returns:
        The log-probability per dimension, in nats, at least $\log 10^{-12}$, same shape.
    """
    half_bin = 1 / (levels - 1)
    precision = torch.exp(-0.5 * torch.as_tensor(log_var, dtype=mean.dtype, device=mean.device))
    centered = x_start - mean
    below_upper = _normal_cdf(precision * (centered + half_bin))
    below_lower = _normal_cdf(precision * (centered - half_bin))
    is_lowest, is_highest = x_start < -1 + half_bin / 2, x_start > 1 - half_bin / 2
    probability = torch.where(
        is_lowest, below_upper, torch.where(is_highest, 1 - below_lower, below_upper - below_lower)
    )
    return probability.clamp(min=SMALLEST_PROBABILITY).log()


def prior_nats(diffusion: GaussianDiffusion, x_start: Tensor) -> Tensor:
    r"""Return the prior term $L_T = D_{KL}(q(x_T \mid x_0) \| \mathcal{N}(0, I))$.

    Args:
        diffusion: The diffusion process.
        x_start: Images $x_0$ in [-1, 1], shape `(B, C, H, W)`.

    Returns:
        The divergence per dimension, in nats, same shape.
    """
    last = len(diffusion) - 1
    mean = diffusion.q_sample(x_start, last, torch.zeros_like(x_start))
    log_var = math.log(1 - diffusion.alphas_cumprod[last].item())
    return gaussian_kl(mean, log_var, 0.0, 0.0)


def bound_nats(
    diffusion: GaussianDiffusion,
    x_start: Tensor,
    mean: Tensor,
    x_t: Tensor,
    t: Tensor,
    log_var: float | Tensor,
    levels: int = 256,
) -> Tensor:
    r"""Return the term of the variational bound for the reverse step from `t`.

    $$
    L_{t-1} = D_{KL}(q(x_{t-1} \mid x_t, x_0) \| p_\theta(x_{t-1} \mid x_t)), \quad
    L_0 = -\log p_\theta(x_0 \mid x_1)
    $$

    Args:
        diffusion: The diffusion process.
        x_start: Images $x_0$ in [-1, 1], shape `(B, C, H, W)`.
        mean: Mean of the reverse step, same shape, see `GaussianDiffusion.p_mean`. In evaluation (not in training) it
            is computed from clipped estimates of the images.
        x_t: The diffused images, same shape.
        t: Timesteps in [0, T), int64, shape `(B,)`; at `t = 0` the term is $L_0$.
        log_var: Log-variance of the reverse step, broadcastable.
        levels: Number of distinct pixel values of the data.

    Returns:
        The term per image, averaged over its dimensions, in nats, shape `(B,)`.
    """
    true_mean, true_log_var = diffusion.q_posterior(x_start, x_t, t)
    kl = gaussian_kl(true_mean, true_log_var, mean, log_var).flatten(1).mean(dim=1)
    decoder = -decoder_log_likelihood(x_start, mean, log_var, levels).flatten(1).mean(dim=1)
    return torch.where(t == 0, decoder, kl)


def _normal_cdf(z: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
