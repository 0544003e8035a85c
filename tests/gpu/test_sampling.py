import diffusers
import pytest
import torch

from hf_ddpm import DDPMPipeline, DDPMScheduler, UNet2DModel
from hf_ddpm.config import DataConfig
from hf_ddpm.data.store import load_images
from hf_ddpm.evaluation.nll import variational_bound
from hf_ddpm.sampling.generate import compile_for_sampling, generate_images
from hf_ddpm.sampling.options import Sampling
from tests.conftest import TINY_UNET

pytestmark = pytest.mark.gpu


@pytest.fixture
def pipe(device):
    torch.manual_seed(0)
    pipe = DDPMPipeline(UNet2DModel(**TINY_UNET).eval(), DDPMScheduler()).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images_of(pipe, device, ids, batch_size=8, **options):
    sampling = Sampling(0, 10, **options)
    return torch.stack(
        [image for _, image in generate_images(pipe, ids, sampling, batch_size=batch_size, device=device)]
    )


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_image_does_not_depend_on_its_batch(pipe, device, without_tf32, precision):
    together = images_of(pipe, device, range(8), mixed_precision=precision).int()
    alone = torch.cat([images_of(pipe, device, [i], mixed_precision=precision) for i in range(8)]).int()
    assert (together - alone).abs().max() <= (1 if precision == "no" else 16)


def test_compiled_sampling_matches_eager_sampling(cuda, pipe, without_tf32):
    eager = images_of(pipe, cuda, range(20)).int()
    compile_for_sampling(pipe.unet)
    compiled = images_of(pipe, cuda, range(20)).int()  # two batches and a remainder
    assert (compiled - eager).abs().max() <= 1
    assert torch.equal(images_of(pipe, cuda, range(20)).int(), compiled)  # outputs of a CUDA graph are not overwritten


def test_images_match_diffusers(pipe, device, without_tf32):
    # With fewer than all steps, diffusers would space them differently.
    pipe.scheduler = DDPMScheduler(num_train_timesteps=20, beta_end=0.5)
    stock = diffusers.DDPMPipeline(
        diffusers.UNet2DModel.from_config(pipe.unet.config), diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    ).to(device)
    stock.unet.eval().load_state_dict(pipe.unet.state_dict())
    stock.set_progress_bar_config(disable=True)
    mine, theirs = (
        one(
            batch_size=3,
            generator=[torch.Generator(device).manual_seed(i) for i in range(3)],
            num_inference_steps=20,
            output_type="np",
        ).images
        for one in (pipe, stock)
    )
    assert abs(mine - theirs).max() < 1e-3


def test_pipeline_works_in_half_precision_and_offloaded(cuda, pipe):
    full = images_of(pipe, cuda, range(4)).int()
    pipe.to(torch.bfloat16)
    assert (images_of(pipe, cuda, range(4)).int() - full).abs().float().mean() < 8
    pipe.to("cpu", torch.float32)
    pipe.enable_model_cpu_offload()
    assert (images_of(pipe, cuda, range(4)).int() - full).abs().max() <= 2


def test_likelihood_bound_matches_cpu(pipe, device, without_tf32):
    reports = []
    for place in ("cpu", device):
        images = load_images(DataConfig("digits", resolution=[8], channels=1, levels=17), device=place)
        pipe.to(place)
        bound = variational_bound(pipe, images, range(4), seed=0, batch_size=32, levels=17, steps_per_image=20)
        reports.append(bound.report()["total_bpd"])
    assert reports[1] == pytest.approx(reports[0], rel=1e-3)
