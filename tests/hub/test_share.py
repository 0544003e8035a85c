"""Pushes of a pipeline in memory, with the unmodified Hub client."""

import json
import shutil

import pytest
import yaml
from huggingface_hub import ModelCard

from hf_ddpm.hub.card import MARK, is_generated
from tests.hub.conftest import contents

pytestmark = [pytest.mark.hub, pytest.mark.slow]

LOAD = "import sys; from hf_ddpm import *; pipe = DDPMPipeline.from_pretrained(sys.argv[1]); "
PUSH = LOAD + "pipe.push_to_hub('org/x')"
SAVE = LOAD + "pipe.save_pretrained(sys.argv[2], push_to_hub=True, repo_id='org/x')"


@pytest.fixture
def run(trained, tmp_path):
    """A run's folder inside a private folder, with private files."""
    folder = shutil.copytree(trained, tmp_path / "acme-secret" / "run")
    (folder / "notes.txt").write_text("private")
    options = yaml.safe_load((folder / "config.yaml").read_text()) | {"init_from": "/home/acme/secret-base"}
    (folder / "config.yaml").write_text(yaml.safe_dump(options))
    return folder


def execute(hub, code, *arguments):
    status, _, errors = hub.run("-c", code, *arguments)
    assert status == 0, errors


def published(hub, repo_id="org/x"):
    """Return the files of a repository, and assert that they contain no private names."""
    files = hub.files(repo_id)
    for name, content in files.items():
        assert not any(word in content for word in (b"acme", b"/home", b"/tmp")), name
    return files


def test_push_to_hub_uploads_card_of_run(hub, run):
    before = contents(run)
    execute(hub, PUSH, run)
    files = published(hub)
    card = files["README.md"].decode()
    assert 'from_pretrained("org/x")' in card and "| data | digits" in card and "](samples.png)" in card
    assert set(files) == {
        ".gitattributes", "README.md", "model_index.json", "scheduler/scheduler_config.json", "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors", "samples.png", "loss.png", "config.yaml", "metrics.jsonl",
    }  # fmt: skip
    assert len(hub.repo()["commits"]) == 2 and contents(run) == before


def test_save_pretrained_pushes_run_without_its_private_files(hub, run):
    execute(hub, SAVE, run, run)
    files = published(hub)
    assert "| data | digits" in files["README.md"].decode() and "samples.png" in files
    assert "notes.txt" not in files and not any(name.startswith("checkpoints") for name in files)
    assert (run / "README.md").read_bytes() == files["README.md"]


def test_card_of_other_weights_has_no_training_section(hub, run):
    execute(hub, LOAD + "pipe.unet.conv_out.bias.data += 1; pipe.push_to_hub('x')", run)
    files = published(hub, "tester/x")
    card = files["README.md"].decode()
    assert 'from_pretrained("tester/x")' in card and MARK in card
    assert "## Training" not in card and ".png" not in card
    assert not {"samples.png", "config.yaml", "metrics.jsonl"} & set(files)


def test_card_on_hub_written_by_person_is_kept(hub, run, tmp_path):
    mine = b"---\ntags: [mine]\n---\n# Mine\n"
    upload = "import sys; from huggingface_hub import HfApi; api = HfApi(); api.create_repo('org/x'); "
    execute(hub, upload + f"api.upload_file(path_or_fileobj={mine!r}, path_in_repo='README.md', repo_id='org/x')")
    execute(hub, PUSH, run)
    assert hub.files()["README.md"] == mine and "unet/config.json" in hub.files()
    execute(hub, SAVE, run, tmp_path / "saved")
    assert hub.files()["README.md"] == mine
    assert MARK in (tmp_path / "saved" / "README.md").read_text()


def test_card_in_folder_written_by_person_is_kept_and_pushed(hub, run, tmp_path):
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "README.md").write_text("# Mine\n")
    execute(hub, SAVE, run, saved)
    assert (saved / "README.md").read_text() == "# Mine\n" == hub.files()["README.md"].decode()
    (run / "README.md").write_text("# Of the run\n")
    execute(hub, LOAD + "pipe.push_to_hub('org/y')", run)
    assert hub.files("org/y")["README.md"] == b"# Of the run\n"


def test_card_generated_by_diffusers_is_replaced(hub, run):
    stock = "import sys; from diffusers import DDPMPipeline; DDPMPipeline.from_pretrained(sys.argv[1])"
    execute(hub, stock + ".push_to_hub('org/x')", run)
    card = hub.files()["README.md"]
    assert is_generated(card) and MARK.encode() not in card
    assert not is_generated(card + b"\nMore of mine.\n")
    execute(hub, PUSH, run)
    assert MARK.encode() in hub.files()["README.md"]


def test_push_of_variant_to_subfolder_keeps_card(hub, run):
    execute(hub, PUSH, run)
    card = hub.files()["README.md"]
    execute(hub, LOAD + "pipe.push_to_hub('org/x', subfolder='half', variant='fp16', commit_message='Half')", run)
    files = hub.files()
    assert files["README.md"] == card and "half/unet/diffusion_pytorch_model.fp16.safetensors" in files
    assert "half/README.md" not in files and hub.repo()["commits"][-1]["title"] == "Half"


def test_code_of_card_on_hub_runs(hub, run):
    execute(hub, PUSH, run)
    blocks = hub.files()["README.md"].decode().split("```python\n")[1:]
    assert len(blocks) == 2
    for block in blocks:  # each in a separate process, with an empty cache
        code = block.split("```")[0].replace("batch_size=4", "batch_size=1")
        execute(hub, code + "assert images[0].size == (8, 8)")


@pytest.mark.parametrize(("part", "file"), [("unet", "config.json"), ("scheduler", "scheduler_config.json")])
def test_push_of_single_component(hub, run, part, file):
    execute(hub, LOAD + f"pipe.{part}.push_to_hub('org/part')", run)
    files = published(hub, "org/part")
    assert file in files and "_class_name" in json.loads(files[file])
    load = f"from hf_ddpm import *; {'UNet2DModel' if part == 'unet' else 'DDPMScheduler'}.from_pretrained('org/part')"
    execute(hub, load)
    ModelCard(files["README.md"].decode())
