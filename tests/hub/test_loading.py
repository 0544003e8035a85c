"""Loading from the Hub: a pushed model gives equal images, and no remote code runs."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch

pytestmark = [pytest.mark.hub, pytest.mark.slow]

WEIGHTS = "unet/diffusion_pytorch_model"
SAMPLE = """
import json, sys
import numpy, torch
from {package} import DDPMPipeline
pipe = DDPMPipeline.from_pretrained("org/x")
pipe.set_progress_bar_config(disable=True)
numpy.save(sys.argv[1], pipe(2, torch.Generator().manual_seed(0), num_inference_steps=10, output_type="np").images)
results = [type(pipe.unet).__module__.split(".")[0]]
for token in (False, "hf_stranger"):
    try:
        results.append(str(DDPMPipeline.from_pretrained("org/x", token=token, cache_dir=sys.argv[2])))
    except OSError as error:
        results.append("Repository Not Found" in str(error.__cause__))
print(json.dumps(results))
"""


@pytest.mark.parametrize("package", ["hf_ddpm", "diffusers"])
def test_pushed_model_gives_equal_images_and_private_one_is_not_accessible(
    hub, folder, tiny_pipeline, tmp_path, package
):
    tiny_pipeline.unet.conv_out.bias.data -= 1  # the `folder` fixture added 1 for its second average
    expected = tiny_pipeline(2, torch.Generator().manual_seed(0), num_inference_steps=10, output_type="np").images
    hub.push(folder, private=True)
    arguments = [tmp_path / "images.npy", tmp_path / "empty"]
    code, output, errors = hub.run("-c", SAMPLE.format(package=package), *arguments)
    assert code == 0, errors
    assert json.loads(output.splitlines()[-1]) == [package, True, True]
    np.testing.assert_allclose(np.load(arguments[0]), expected, rtol=0, atol=1e-5)


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (open, (self.mark, "w"))


def with_index(folder, **entries):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | entries))


def pickled(folder, mark, code):
    (folder / f"{WEIGHTS}.safetensors").unlink()
    torch.save({"conv_in.weight": Evil(mark)}, folder / f"{WEIGHTS}.bin")


def pickled_in_the_old_format(folder, mark, code):
    (folder / f"{WEIGHTS}.safetensors").unlink()
    (folder / f"{WEIGHTS}.bin").write_bytes(pickle.dumps({"conv_in.weight": Evil(mark)}))


def pickled_shard(folder, mark, code):
    (folder / f"{WEIGHTS}.safetensors").unlink()
    torch.save({"conv_in.weight": Evil(mark)}, folder / "unet" / "shard.bin")
    weight_map = json.dumps({"metadata": {}, "weight_map": {"conv_in.weight": "shard.bin"}})
    (folder / f"{WEIGHTS}.safetensors.index.json").write_text(weight_map)


def pickled_next_to_safetensors(folder, mark, code):
    torch.save({"conv_in.weight": Evil(mark)}, folder / f"{WEIGHTS}.bin")
    (folder / "pipeline.py").write_text(code)
    (folder / "unet" / "diffusers.py").write_text("")


def own_pipeline(folder, mark, code):
    (folder / "pipeline.py").write_text(code)
    with_index(folder, _class_name=["pipeline", "Mine"])


def own_network(folder, mark, code):
    (folder / "unet" / "mine.py").write_text(code)
    with_index(folder, unet=["mine", "Mine"])


def program_as_component(folder, mark, code):
    with_index(folder, scheduler=["subprocess", "Popen"])


EVIL = [
    pickled,
    pickled_in_the_old_format,
    pickled_shard,
    pickled_next_to_safetensors,
    own_pipeline,
    own_network,
    program_as_component,
]
LOADS = """
import json, os, sys
from hf_ddpm.pipelines.loading import load_pipeline
mark, results = sys.argv[1], {}
for name in sys.argv[2:]:
    try:
        results[name] = ["loaded", type(load_pipeline(name, "cpu").unet).__module__]
    except ValueError as error:
        results[name] = ["refused", str(error)]
    results[name].append(os.path.exists(mark))
    if os.path.exists(mark):
        os.remove(mark)
print(json.dumps(results))
"""
UPLOAD = """
import sys
from huggingface_hub import create_repo, upload_folder
for folder in sys.argv[1:]:
    name = "org/" + folder.rsplit("/", 1)[1]
    create_repo(name)
    upload_folder(repo_id=name, folder_path=folder)
"""


def test_code_in_repository_is_not_executed(hub, tiny_pipeline, tmp_path):
    mark, folders = str(tmp_path / "mark"), []
    code = f"import diffusers\nopen({mark!r}, 'w')\nclass Mine(diffusers.DDPMPipeline, diffusers.UNet2DModel): pass\n"
    for spoil in EVIL:
        folders.append(tmp_path / spoil.__name__)
        tiny_pipeline.save_pretrained(folders[-1])
        spoil(folders[-1], mark, code)
    status, _, errors = hub.run("-c", UPLOAD, *folders)
    assert status == 0, errors
    names = [*map(str, folders), *(f"org/{folder.name}" for folder in folders)]
    status, output, errors = hub.run("-c", LOADS, mark, *names, "org/none")
    assert status == 0, errors
    results = json.loads(output.splitlines()[-1])
    missing = results.pop("org/none")[1]
    refusal = "model 'org/none' cannot be loaded: there is no such folder, and as a Hub id: 404 Client Error."
    assert missing.startswith(f"{refusal} Repository Not Found for url")
    assert set(results) == set(names)
    for name, (outcome, detail, ran) in results.items():
        assert not ran, name
        if name.endswith("pickled_next_to_safetensors"):
            assert (outcome, detail) == ("loaded", "hf_ddpm.models.unet_2d")
        else:
            assert outcome == "refused" and detail.startswith(f"model {name!r} cannot be loaded: ")
            assert "\n" not in detail


@pytest.mark.parametrize("spoil", [pickled, pickled_in_the_old_format, pickled_shard])
def test_unsafe_loading_of_these_pickles_runs_their_code(tiny_pipeline, tmp_path, spoil):
    tiny_pipeline.save_pretrained(tmp_path / "model")
    spoil(tmp_path / "model", str(tmp_path / "mark"), "")
    (file,) = (tmp_path / "model" / "unet").glob("*.bin")
    torch.load(file, weights_only=False) if spoil is not pickled_in_the_old_format else pickle.loads(file.read_bytes())
    assert (tmp_path / "mark").exists()
    shutil.rmtree(tmp_path / "model")
