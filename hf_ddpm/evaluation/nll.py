r"""The variational bound on the negative log-likelihood of images, in bits per dimension.

.. math:: L = L_T + \sum_{t > 1} L_{t-1} + L_0 \tag{5}

Each image and step has its own noise, which depends only on the seed, the image and the step. So the results are the
same for any batch size and any number of processes.

The bound can be estimated from fewer steps: the steps above 0 are divided into intervals, and one random step per
interval represents all its steps,

.. math:: \hat L = L_T + L_0 + \sum_k w_k L_{t_k}, \quad t_k \sim U\{e_k, \dots, e_k + w_k - 1\}.

The expectation of the estimate is the bound. Since the terms decrease with `t`, the interval lengths grow with `t`,
about geometrically.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from hf_ddpm.data.store import ImageStore
from hf_ddpm.diffusion.likelihood import bound_nats, prior_nats
from hf_ddpm.diffusion.outputs import split_output
from hf_ddpm.images import to_signed
from hf_ddpm.models.precision import autocast
from hf_ddpm.pipelines.pipeline_ddpm import DDPMPipeline
from hf_ddpm.schedulers.scheduling_ddpm import DDPMScheduler
from hf_ddpm.utils.seeds import BOUND_NOISE, BOUND_STEPS, derived_seed, generator, hashed_keys, normal_noise

# Position of the image in `ids`, image, step, and the number of steps it represents.
Evaluation = tuple[int, int, int, float]


@dataclass(frozen=True)
class Bound:
    r"""Sums over images, float64, by `t` with shape `(T,)` unless stated otherwise.

    Attributes:
        terms: :math:`L_0` at index 0 and :math:`L_t` at index `t`, in nats per dimension.
        squared_errors: Mean squared errors of the clipped :math:`\hat x_0` on the scale [-1, 1].
        evaluations: Number of images evaluated at step `t`.
        prior: :math:`L_T`, shape `()`.
        squared_totals: Squares of the total bound of each image, shape `()`.
        images: Number of images, shape `()`.
    """

    terms: Tensor
    squared_errors: Tensor
    evaluations: Tensor
    prior: Tensor
    squared_totals: Tensor
    images: Tensor

    def summed(self, add_up: Callable[[Tensor], Tensor]) -> "Bound":
        """Return the sums over all processes; `add_up` sums one tensor over the processes."""
        return Bound(*(add_up(value) for value in vars(self).values()))

    def report(self) -> dict[str, object]:
        r"""Return the results: means over the images, in bits per dimension.

        `total_bpd` is `prior_bpd` (:math:`L_T`) + `vlb_bpd` (:math:`\sum_{t > 1} L_{t-1}`) + `decoder_bpd`
        (:math:`L_0`). `standard_error` is the standard error of the total over images; missing for one image. If
        `is_estimate`, only some of the steps were evaluated, and the values are unbiased estimates. Otherwise the
        results include `terms_bpd` and the points of Fig. 5, by `t`: `rate_bpd` is :math:`L_T + \sum_{s > t} L_s`, the
        bits received when the reverse process is at `t`, and `distortion` the root mean squared error of
        :math:`\hat x_0` at `t` on the scale [0, 255].
        """
        terms = self.terms / self.images / math.log(2)
        prior = (self.prior / self.images).item() / math.log(2)
        error, count = {}, self.images.item()
        if count > 1:
            mean = (self.prior + self.terms.sum()) / count
            variance = (self.squared_totals / count - mean.square()).clamp(min=0) / (count - 1)
            error["standard_error"] = variance.sqrt().item() / math.log(2)
        is_estimate = bool((self.evaluations < self.images).any())
        report: dict[str, object] = {
            "total_bpd": prior + terms.sum().item(),
            **error,
            "prior_bpd": prior,
            "vlb_bpd": terms[1:].sum().item(),
            "decoder_bpd": terms[0].item(),
            "is_estimate": is_estimate,
            "num_images": int(self.images),
            "evaluations_per_image": round((self.evaluations.sum() / self.images).item()),
        }
        if not is_estimate:
            report["terms_bpd"] = terms.tolist()
            report["rate_bpd"] = (prior + terms.sum() - terms.cumsum(0)).tolist()
            report["distortion"] = (127.5 * (self.squared_errors / self.images).sqrt()).tolist()
        return report


@torch.no_grad()
def variational_bound(
    pipe: DDPMPipeline,
    images: ImageStore,
    ids: Sequence[int],
    *,
    seed: int,
    batch_size: int,
    levels: int = 256,
    steps_per_image: int | None = None,
    precision: str = "no",
    progress: Callable[[int], object] = lambda count: None,
) -> Bound:
    """Evaluate the bound on images, with :math:`T` network evaluations per image.

    Args:
        pipe: The model, with a `DDPMScheduler`, on the device of the images.
        images: The images, with their classes if the model is class-conditional.
        ids: Indices of the images to evaluate.
        seed: Seed of the noise.
        batch_size: Number of network evaluations per batch, over images and steps.
        levels: Number of evenly spaced pixel values.
        steps_per_image: Number of steps evaluated per image, from 2 to `T`; by default `T`. Fewer steps give an
            unbiased estimate.
        precision: Precision of the network: `no`, `bf16` or `fp16`. Other computations use float32 or float64.
        progress: Called after each batch with its number of evaluations.

    Returns:
        Sums over these images.

    Raises:
        ValueError: If `steps_per_image` is out of range, or the classes do not match the model's classes.
    """
    diffusion, unet = pipe.scheduler.diffusion, pipe.unet.eval()
    classes = classes_for(pipe, images)
    total = len(diffusion)
    per_image = total if steps_per_image is None else steps_per_image
    if not 2 <= per_image <= total:
        raise ValueError(f"steps_per_image={steps_per_image}: expected 2 to {total}")
    sums = torch.zeros(3, total, dtype=torch.float64, device=images.device)
    priors = torch.zeros(len(ids), dtype=torch.float64, device=images.device)
    for start in range(0, len(ids), batch_size):
        chunk = torch.tensor(ids[start : start + batch_size])
        nats = prior_nats(diffusion, to_signed(images[chunk], levels))
        priors[start : start + batch_size] = nats.flatten(1).mean(dim=1).double()

    totals = priors.clone()
    evaluations = _evaluations(ids, seed, total, per_image)
    while batch := list(islice(evaluations, batch_size)):
        indices = torch.tensor([i for _, i, _, _ in batch])
        x_start = to_signed(images[indices], levels)
        packed = torch.tensor(batch, dtype=torch.float64).to(x_start.device, non_blocking=True)  # one transfer for all
        positions, image_ids, t = packed[:, :3].long().unbind(1)
        noise = normal_noise(hashed_keys(derived_seed(seed, BOUND_NOISE), image_ids.int(), t.int()), images.shape)
        labels = None if classes is None else classes[indices.to(classes.device)].to(x_start.device)
        terms, squared_errors = _evaluate(unet, pipe.scheduler, x_start, t, noise, labels, levels, precision)
        weighted = packed[:, 3] * terms.double()
        sums.index_add_(1, t, torch.stack([weighted, squared_errors.double(), torch.ones_like(weighted)]))
        totals.index_add_(0, positions, weighted)
        progress(len(batch))
    count = torch.tensor(float(len(ids)), dtype=torch.float64, device=images.device)
    return Bound(sums[0], sums[1], sums[2], priors.sum(), totals.square().sum(), count)


def _evaluate(
    unet: nn.Module,
    scheduler: DDPMScheduler,
    x_start: Tensor,
    t: Tensor,
    noise: Tensor,
    classes: Tensor | None,
    levels: int,
    precision: str,
) -> tuple[Tensor, Tensor]:
    diffusion = scheduler.diffusion
    x_t = diffusion.q_sample(x_start, t, noise)
    dtype = next(unet.parameters()).dtype
    with autocast(x_t.device, precision):
        output = unet(x_t.to(dtype), t, classes).sample.float()
    prediction, variance_output = split_output(output, x_start.shape[1])
    kind = scheduler.config["prediction_type"]
    mean, x_start_hat = diffusion.p_mean(prediction, x_t, t, kind, bound=lambda x: x.clamp(-1, 1))
    log_var = diffusion.log_var(t, x_t, scheduler.variance_type, variance_output)
    terms = bound_nats(diffusion, x_start, mean, x_t, t, log_var, levels)
    return terms, (x_start - x_start_hat).square().flatten(1).mean(dim=1)


def _evaluations(ids: Sequence[int], seed: int, total: int, per_image: int) -> Iterator[Evaluation]:
    """Yield the evaluations of all images."""
    edges = _edges(total, per_image - 1)
    for position, i in enumerate(ids):
        yield position, i, 0, 1.0
        offsets = torch.rand(per_image - 1, generator=generator(seed, BOUND_STEPS, i), dtype=torch.float64)
        for first, end, offset in zip(edges, edges[1:], offsets.tolist(), strict=False):
            yield position, i, first + int(offset * (end - first)), float(end - first)


def _edges(total: int, intervals: int) -> list[int]:
    """Return the first step of each interval of the steps from 1 to `total - 1`, followed by `total`."""
    edges = [1]
    for k in range(1, intervals + 1):
        geometric = round(total ** (k / intervals))
        edges.append(min(max(geometric, edges[-1] + 1), total - intervals + k))
    return edges


def classes_for(pipe: DDPMPipeline, images: ImageStore) -> Tensor | None:
    """Return the classes of images as indices of the model, int64, shape `(N,)`; None for a model without classes."""
    if pipe.unet.config.num_class_embeds is None:
        return None
    if images.labels is None:
        if pipe.null_class is None:
            raise ValueError("--class_column is missing: the model is class-conditional; expected a column of classes")
        return torch.full((len(images),), pipe.null_class)
    names = pipe.class_names or list(images.class_names)
    for name in images.class_names:
        if name not in names:
            raise ValueError(f"class {name!r} of the data: expected a class of the model: {', '.join(names)}")
    return torch.tensor([names.index(name) for name in images.class_names], device=images.labels.device)[images.labels]
