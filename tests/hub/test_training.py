"""A run that pushes its model as it goes, and what becomes of the run when the Hub does not play along."""

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


def train(hub, folder, *words, token="hf_write"):
    push = ["--push_to_hub", "--hub_model_id", "org/ddpm-digits", "--max_train_steps", "6", "--output_dir", folder]
    return hub.run(ROOT / "scripts" / "train.py", *TINY_RUN, *push, *words, token=token)


def test_a_trained_model_is_loaded_from_the_hub_by_anyone(hub, tmp_path):
    words = "--checkpointing_steps 2 --eval_metrics fd --eval_num_images 10 --eval_inference_steps 2".split()
    code, output, errors = train(hub, tmp_path / "run", *words)
    assert code == 0 and "pushed the model to org/ddpm-digits" in errors + output, errors
    files = hub.files("org/ddpm-digits")
    here = tmp_path / "run"
    assert files["README.md"] == (here / "README.md").read_bytes() and b'"org/ddpm-digits"' in files["README.md"]
    pushed, kept = json.loads(files["results.json"]), json.loads((here / "results.json").read_text())
    assert pushed["model"]["checksum"] == kept["model"]["checksum"] and pushed["fd"]["value"] == kept["fd"]["value"]
    assert not [name for name, content in files.items() if str(tmp_path).encode() in content]  # no path of this machine
    assert not [name for name in files if name.startswith(("checkpoints", "results_samples", "best", ".ex"))]
    digests = [
        hub.run("-c", SAMPLE.replace("LIBRARY", library), model)[1].strip()
        for library, model in [("hf_ddpm", here), ("hf_ddpm", "org/ddpm-digits"), ("diffusers", "org/ddpm-digits")]
    ]
    assert len(digests[0]) == 64 and len(set(digests)) == 1


def test_what_the_hub_would_refuse_is_told_before_the_training(hub, tmp_path):
    for token, message in [(None, "there is no token"), ("hf_read", "the token may only read")]:
        code, _, errors = train(hub, tmp_path / "run", token=token)
        assert code == 2 and message in errors.splitlines()[-1]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_hub_that_fails_costs_the_run_nothing(hub, tmp_path):
    hub.fault({"match": "POST /api/models/org/ddpm-digits/commit", "status": 500})
    code, output, errors = train(hub, tmp_path / "run")
    assert code == 0 and "failed; to retry: hf-ddpm push --model" in errors + output
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "finished"
    assert (tmp_path / "run" / "README.md").exists()


def test_a_private_model_stays_private(hub, tmp_path):
    assert train(hub, tmp_path / "run", "--hub_private_repo", "true")[0] == 0
    assert hub.repo("org/ddpm-digits")["private"] is True
    code, _, errors = hub.run("-c", SAMPLE.replace("LIBRARY", "hf_ddpm"), "org/ddpm-digits", token=None)
    assert code != 0
