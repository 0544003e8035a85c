"""File format: pipelines of diffusers load here, and pipelines saved here load in diffusers."""

import json
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_ddpm import DDPMPipeline, DDPMScheduler, UNet2DModel
from hf_ddpm.pipelines.loading import load_pipeline
from tests.conftest import TINY_UNET

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def stock_folder(tmp_path):
    """The folder of a pipeline saved by diffusers."""
    torch.manual_seed(0)
    pipe = diffusers.DDPMPipeline(diffusers.UNet2DModel(**TINY_UNET), diffusers.DDPMScheduler())
    pipe.save_pretrained(tmp_path / "stock")
    return tmp_path / "stock"


def is_ours(pipe):
    return type(pipe.unet) is UNet2DModel and type(pipe.scheduler) is DDPMScheduler


def sample(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe(2, torch.Generator().manual_seed(0), 20, output_type="np").images


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_pipelines_of_diffusers_load_and_save_to_same_files(stock_folder, tmp_path):
    pipe = DDPMPipeline.from_pretrained(stock_folder)
    assert is_ours(pipe)
    np.testing.assert_allclose(
        sample(pipe), sample(diffusers.DDPMPipeline.from_pretrained(stock_folder)), rtol=0, atol=1e-5
    )
    # Saving, loading and saving again gives identical files, without local paths.
    pipe.save_pretrained(tmp_path / "once")
    DDPMPipeline.from_pretrained(tmp_path / "once").save_pretrained(tmp_path / "twice")
    assert files(tmp_path / "once") == files(tmp_path / "twice") == files(stock_folder)


@pytest.mark.slow
def test_diffusers_loads_pipelines_without_hf_ddpm_installed(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path)
    code = f"""
import sys
sys.modules["hf_ddpm"] = None  # make `import hf_ddpm` raise
import diffusers, numpy, torch
pipe = diffusers.DDPMPipeline.from_pretrained({str(tmp_path)!r})
assert type(pipe.unet) is diffusers.UNet2DModel
pipe.set_progress_bar_config(disable=True)
images = pipe(2, torch.Generator().manual_seed(0), 20, output_type="np").images
numpy.save({str(tmp_path / "images.npy")!r}, images)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    np.testing.assert_allclose(np.load(tmp_path / "images.npy"), sample(tiny_pipeline), rtol=0, atol=1e-5)


def test_schedulers_of_diffusers_are_saved_and_loaded(tiny_pipeline, tmp_path):
    tiny_pipeline.scheduler = diffusers.DDIMScheduler.from_config(tiny_pipeline.scheduler.config)
    tiny_pipeline.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == ["diffusers", "DDIMScheduler"]
    assert type(DDPMPipeline.from_pretrained(tmp_path).scheduler) is diffusers.DDIMScheduler


def test_subclasses_are_saved_under_their_own_name(tmp_path):
    class Custom(UNet2DModel):
        pass

    DDPMPipeline(Custom(**TINY_UNET), DDPMScheduler()).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["unet"][1] == "Custom" and index["scheduler"] == ["diffusers", "DDPMScheduler"]


def test_compiled_networks_are_saved_like_others(tiny_pipeline, tmp_path):
    tiny_pipeline.unet = torch.compile(tiny_pipeline.unet)  # compiles only at its first call
    tiny_pipeline.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["unet"] == ["diffusers", "UNet2DModel"]
    assert not any(name.startswith("_orig_mod") for name in load_file(tmp_path / WEIGHTS))


def test_old_repositories_load(stock_folder):
    # Like google/ddpm-cifar10-32: no subfolders, pickled weights, old names of the attention layers.
    state = load_file(stock_folder / WEIGHTS)
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for key, value in state.items():
        for new, former in names.items():
            key = key.replace(f".{new}.", f".{former}.")
        old[key] = value
    assert any(".proj_attn." in key for key in old)
    expected = sample(diffusers.DDPMPipeline.from_pretrained(stock_folder))
    (stock_folder / WEIGHTS).unlink()
    torch.save(old, stock_folder / "diffusion_pytorch_model.bin")
    for name in ("unet/config.json", "scheduler/scheduler_config.json"):
        (stock_folder / name).rename(stock_folder / name.split("/")[1])
        (stock_folder / name).parent.rmdir()
    pipe = DDPMPipeline.from_pretrained(stock_folder)
    assert is_ours(pipe)
    np.testing.assert_allclose(sample(pipe), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_shards_and_variants_load(stock_folder, tmp_path, low_cpu_mem_usage):
    stock = diffusers.DDPMPipeline.from_pretrained(stock_folder)
    stock.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards" / "unet").glob("*-of-*.safetensors"))) > 1
    stock.to(torch.float16).save_pretrained(tmp_path / "variant", variant="fp16")
    for folder, options in [("shards", {}), ("variant", {"variant": "fp16", "torch_dtype": torch.float16})]:
        pipe = DDPMPipeline.from_pretrained(tmp_path / folder, low_cpu_mem_usage=low_cpu_mem_usage, **options)
        assert is_ours(pipe) and pipe.unet.dtype == options.get("torch_dtype", torch.float32)
        for name, value in pipe.unet.state_dict().items():
            torch.testing.assert_close(value, stock.unet.state_dict()[name].to(value.dtype), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_load_and_save(stock_folder, tmp_path, dtype):
    pipe = DDPMPipeline.from_pretrained(stock_folder, torch_dtype=dtype)
    pipe.save_pretrained(tmp_path / "half")
    assert (
        pipe.unet.dtype
        == diffusers.DDPMPipeline.from_pretrained(tmp_path / "half", torch_dtype=dtype).unet.dtype
        == dtype
    )


def test_damaged_safetensors_are_never_replaced_by_pickle(stock_folder):
    torch.save({"code": print}, stock_folder / "unet" / "diffusion_pytorch_model.bin")
    weights = stock_folder / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(Exception, match="(?i)safetensors|header|incomplete|deserializ"):
        DDPMPipeline.from_pretrained(stock_folder)


def test_pickles_are_not_loaded_if_any_safetensors_exist(stock_folder):
    state = load_file(stock_folder / WEIGHTS)
    torch.save(state, stock_folder / "unet" / "diffusion_pytorch_model.bin")
    (stock_folder / WEIGHTS).rename(stock_folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    with pytest.raises(OSError, match="diffusion_pytorch_model.safetensors"):
        DDPMPipeline.from_pretrained(stock_folder)
    assert is_ours(DDPMPipeline.from_pretrained(stock_folder, variant="fp16"))
    assert is_ours(DDPMPipeline.from_pretrained(stock_folder, use_safetensors=False))


def test_from_pipe_accepts_pipelines_of_diffusers(tiny_pipeline, stock_folder):
    ours = DDPMPipeline.from_pipe(diffusers.DDPMPipeline.from_pretrained(stock_folder))
    assert type(ours.unet) is diffusers.UNet2DModel
    assert sample(ours).shape == (2, 8, 8, 1)


def test_networks_of_diffusers_can_be_passed(stock_folder):
    unet = diffusers.UNet2DModel.from_pretrained(stock_folder, subfolder="unet")
    pipe = DDPMPipeline.from_pretrained(stock_folder, unet=unet)
    assert pipe.unet is unet and type(pipe.scheduler) is DDPMScheduler


def test_components_load_separately(stock_folder):
    assert type(UNet2DModel.from_pretrained(stock_folder, subfolder="unet")) is UNet2DModel
    assert type(DDPMScheduler.from_pretrained(stock_folder, subfolder="scheduler")) is DDPMScheduler


def test_diffusers_refuses_to_load_learned_variances(tmp_path):
    unet = UNet2DModel(**{**TINY_UNET, "out_channels": 2})
    DDPMPipeline(unet, DDPMScheduler(variance_type="learned")).save_pretrained(tmp_path)
    assert is_ours(DDPMPipeline.from_pretrained(tmp_path))
    with pytest.raises((ValueError, AttributeError), match="HFDDPMScheduler"):
        diffusers.DDPMPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DPMSolverMultistepScheduler", "DDPMScheduler"])
def test_learned_range_loads_in_diffusers_and_supports_its_schedulers(tmp_path, scheduler):
    torch.manual_seed(0)
    unet = UNet2DModel(**{**TINY_UNET, "out_channels": 2})
    pipe = DDPMPipeline(unet, DDPMScheduler(variance_type="learned_range"))
    pipe.save_pretrained(tmp_path)
    stock = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    np.testing.assert_allclose(sample(pipe), sample(stock), rtol=0, atol=2e-5)
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    assert np.isfinite(sample(pipe)).all()


def test_missing_weights_are_reported(stock_folder):
    state = load_file(stock_folder / WEIGHTS)
    del state["conv_in.bias"]
    save_file(state, stock_folder / WEIGHTS)
    with pytest.raises(ValueError, match="cannot be loaded: 1 weights are missing, such as conv_in.bias"):
        load_pipeline(str(stock_folder), "cpu")


@pytest.mark.parametrize("is_loaded", [False, True])
def test_from_pipe_of_diffusers_accepts_our_components(tiny_pipeline, tmp_path, is_loaded):
    pipe = tiny_pipeline
    if is_loaded:
        pipe.save_pretrained(tmp_path)
        pipe = DDPMPipeline.from_pretrained(tmp_path)
    stock = diffusers.DDPMPipeline.from_pipe(pipe)
    assert type(stock) is diffusers.DDPMPipeline and stock.unet is pipe.unet and stock.scheduler is pipe.scheduler
    np.testing.assert_allclose(sample(stock), sample(pipe), rtol=0, atol=1e-6)
    ddim = diffusers.DDIMPipeline.from_pipe(pipe)
    assert ddim.unet is pipe.unet and type(ddim.scheduler) is diffusers.DDIMScheduler
    converted = DDPMPipeline.from_pipe(stock)
    assert is_ours(converted) and np.array_equal(sample(converted), sample(pipe))


def test_from_pipe_of_diffusers_keeps_class_names():
    unet = UNet2DModel(**TINY_UNET, num_class_embeds=2)
    pipe = DDPMPipeline(unet, DDPMScheduler(), {"0": "cat", "1": "dog"})
    assert DDPMPipeline.from_pipe(diffusers.DDPMPipeline.from_pipe(pipe)).class_names == ["cat", "dog"]


def test_unet_class_equals_only_that_of_diffusers():
    assert UNet2DModel == diffusers.UNet2DModel and UNet2DModel == UNet2DModel
    subclass = type("Other", (UNet2DModel,), {})
    assert UNet2DModel != diffusers.UNet2DConditionModel and subclass not in (UNet2DModel, diffusers.UNet2DModel)
    assert not issubclass(UNet2DModel, diffusers.UNet2DModel) and len({UNet2DModel, diffusers.UNet2DModel}) == 2
