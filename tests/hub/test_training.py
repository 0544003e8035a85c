"""Training runs that push their model, with a working and a failing Hub."""

import json

import pytest

from tests.conftest import TINY_RUN
from tests.hub.conftest import ROOT

pytestmark = [pytest.mark.hub, pytest.mark.slow]

SAMPLE = """
import sys, hashlib, torch
from LIBRARY import DDPMPipeline
pipe = DDPMPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
images = pipe(batch_size=2, generator=torch.Generator().manual_seed(0), num_inference_steps=3, output_type="np").images
print(hashlib.sha256(torch.tensor(images).mul(255).round().numpy().tobytes()).hexdigest())
"""


def train(hub, folder, *arguments, token="hf_write"):
    push = ["--push_to_hub", "--hub_model_id", "org/ddpm-digits", "--max_train_steps", "6", "--output_dir", folder]
    return hub.run(ROOT / "scripts" / "train.py", *TINY_RUN, *push, *arguments, token=token)


def test_trained_model_is_pushed_and_loads_from_hub(hub, tmp_path):
    arguments = "--checkpointing_steps 2 --eval_metrics fd --eval_num_images 10 --eval_inference_steps 2".split()
    code, output, errors = train(hub, tmp_path / "run", *arguments)
    assert code == 0 and "pushed the model to org/ddpm-digits" in errors + output, errors
    files = hub.files("org/ddpm-digits")
    folder = tmp_path / "run"
    assert files["README.md"] == (folder / "README.md").read_bytes() and b'"org/ddpm-digits"' in files["README.md"]
    pushed, local = json.loads(files["results.json"]), json.loads((folder / "results.json").read_text())
    assert pushed["model"]["checksum"] == local["model"]["checksum"] and pushed["fd"]["value"] == local["fd"]["value"]
    assert not [name for name, content in files.items() if str(tmp_path).encode() in content]  # no local paths
    assert not [name for name in files if name.startswith(("checkpoints", "results_samples", "best", ".ex"))]
    digests = [
        hub.run("-c", SAMPLE.replace("LIBRARY", library), model)[1].strip()
        for library, model in [("hf_ddpm", folder), ("hf_ddpm", "org/ddpm-digits"), ("diffusers", "org/ddpm-digits")]
    ]
    assert len(digests[0]) == 64 and len(set(digests)) == 1


def test_push_that_would_be_refused_is_reported_before_training(hub, tmp_path):
    for token, message in [(None, "no token found"), ("hf_read", "the token is read-only")]:
        code, _, errors = train(hub, tmp_path / "run", token=token)
        assert code == 2 and message in errors.splitlines()[-1]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_failing_hub_does_not_affect_run(hub, tmp_path):
    hub.fault({"match": "POST /api/models/org/ddpm-digits/commit", "status": 500})
    code, output, errors = train(hub, tmp_path / "run")
    assert code == 0 and "failed; to retry: hf-ddpm push --model" in errors + output
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "finished"
    assert (tmp_path / "run" / "README.md").exists()


def test_private_model_cannot_be_loaded_without_token(hub, tmp_path):
    assert train(hub, tmp_path / "run", "--hub_private_repo", "true")[0] == 0
    assert hub.repo("org/ddpm-digits")["private"] is True
    code, _, errors = hub.run("-c", SAMPLE.replace("LIBRARY", "hf_ddpm"), "org/ddpm-digits", token=None)
    assert code != 0
