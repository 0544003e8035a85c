import pytest
import torch
from accelerate import Accelerator
from diffusers.models.unets.unet_2d import UNet2DOutput

from hf_ddpm import DDPMPipeline, DDPMScheduler, UNet2DModel
from hf_ddpm.evaluation.evaluate import evaluate
from hf_ddpm.images import to_signed
from hf_ddpm.paper.context import FigureContext
from hf_ddpm.paper.options import FigureOptions
from tests.conftest import TINY_UNET

T = 20


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The folder of an untrained model with 20 diffusion steps."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    scheduler = DDPMScheduler(num_train_timesteps=T, beta_start=5e-3, beta_end=0.5, variance_type="fixed_large")
    DDPMPipeline(UNet2DModel(**TINY_UNET), scheduler).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def context(model, tmp_path):
    options = FigureOptions(model=model, output=str(tmp_path / "figures"), dataset="digits")
    context = FigureContext(options, Accelerator(cpu=True))
    context.pipe.set_progress_bar_config(disable=True)
    return context


@pytest.fixture
def distance(context, tmp_path):
    """A function that returns the Frechet distance of the model as computed by `evaluate`."""

    def measure(count, sampling):
        reference, output = context.reference("fd", count), tmp_path / "evaluated" / "results.json"
        return evaluate(reference.config, sampling, pipe=context.pipe, reference=reference, output=output)["fd"]

    return measure


@pytest.fixture
def gaussian_context(context):
    """A context with the exact network for data N(m, s^2 I), with the mean and the standard deviation of the digits."""
    images = to_signed(context.reference("nll").held_out[torch.arange(899)], 17)
    mean, deviation = images.mean(), images.std()

    class GaussianUNet(UNet2DModel):
        def forward(self, sample, timestep, class_labels=None, return_dict=True):
            bars = context.pipe.scheduler.diffusion.alphas_cumprod[torch.as_tensor(timestep)].float().view(-1, 1, 1, 1)
            spread = bars * deviation**2 + 1 - bars
            return UNet2DOutput((1 - bars).sqrt() * (sample - bars.sqrt() * mean) / spread)

    context.pipe.unet = GaussianUNet(**TINY_UNET)
    return context
