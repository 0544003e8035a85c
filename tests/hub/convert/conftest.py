import diffusers
import numpy as np
import pytest
import torch

from tests.conftest import TINY_UNET, load_script
from tests.hub.convert.ho2020_network import HoNetwork


@pytest.fixture(scope="package")
def convert():
    main = load_script("convert").main
    return lambda layout, source, output, *arguments: main(
        ["--from", layout, "--input", str(source), "--output", str(output), *arguments]
    )


@pytest.fixture(scope="package")
def ho():
    """A network for the raw weights, and another one for the averaged weights."""
    return HoNetwork(seed=0), HoNetwork(seed=1)


@pytest.fixture(scope="package")
def tensorflow_file(ho, tmp_path_factory):
    raw, averaged = ho
    arrays = dict(raw.variables) | {"global_step": np.int64(7), "beta1_power": np.float32(0.9)}
    arrays |= {f"{name}/ExponentialMovingAverage": value for name, value in averaged.variables.items()}
    arrays |= {f"{name}/{slot}": value for name, value in raw.variables.items() for slot in ("Adam", "Adam_1")}
    path = tmp_path_factory.mktemp("tensorflow") / "model.npz"
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="package")
def ported_file(ho, tmp_path_factory):
    path = tmp_path_factory.mktemp("port") / "model-790000.ckpt"
    torch.save({name: torch.from_numpy(value) for name, value in ho[0].ported().items()}, path)
    return path


@pytest.fixture
def stock_folder(tmp_path):
    torch.manual_seed(0)
    scheduler = diffusers.DDPMScheduler(variance_type="fixed_large")
    pipe = diffusers.DDPMPipeline(diffusers.UNet2DModel(**TINY_UNET), scheduler)
    pipe.register_to_config(id2label={"0": "zero"})
    pipe.save_pretrained(tmp_path / "stock")
    return tmp_path / "stock"
