"""A local Hub, its clients, and a folder to push.

Clients run in separate processes: HF_ENDPOINT is read only at import, and the test process is offline.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import LIMIT

ROOT = Path(__file__).parents[2]

# Calls a function of hf_ddpm.hub.push and prints its result or its error.
CALL = """
import json, sys, time
time.sleep = lambda seconds: None  # the client would otherwise retry for 24 s
from hf_ddpm.hub import push
try:
    print(json.dumps(getattr(push, sys.argv[1])(**json.loads(sys.argv[2]))))
except (OSError, ValueError) as error:
    print(json.dumps(["ValueError" if isinstance(error, ValueError) else "OSError", str(error)]))
"""


class Hub:
    """A local Hub server and its contents."""

    def __init__(self, folder):
        self.folder = folder
        self.homes = 0

    def start(self):
        server = [sys.executable, str(ROOT / "tests" / "hub_server.py"), str(self.folder)]
        self.process = subprocess.Popen(server, stdout=subprocess.PIPE, text=True)
        self.url = self.process.stdout.readline().strip()
        return self

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def environment(self, token="hf_write"):
        """Return the environment of a client with an empty cache."""
        self.homes += 1
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        return kept | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(self.folder / f"home-{self.homes}"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "PYTHONPATH": str(ROOT),
            **({"HF_TOKEN": token} if token else {}),
        }

    def popen(self, *arguments, token="hf_write"):
        return subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=self.environment(token),
        )  # fmt: skip

    def run(self, *arguments, token="hf_write"):
        """Return exit code, output and errors of a Python process."""
        process = self.popen(*arguments, token=token)
        output, errors = process.communicate(timeout=LIMIT)
        return process.returncode, output, errors

    def call(self, name, token="hf_write", **options):
        """Call a function of hf_ddpm.hub.push; return its result, or the type and text of its error."""
        code, output, errors = self.run("-c", CALL, name, json.dumps(options, default=str), token=token)
        assert code == 0, errors
        return json.loads(output.splitlines()[-1])

    def push(self, folder, repo_id="org/x", **options):
        return self.call("push_model", folder=folder, repo_id=repo_id, **options)

    def repo(self, repo_id="org/x", kind="models"):
        return json.loads((self.folder / "repos.json").read_text())[f"{kind}/{repo_id}"]

    def files(self, repo_id="org/x", kind="models"):
        """Return the contents of a repository's files by their paths."""
        contents = {}
        for path, file in self.repo(repo_id, kind)["commits"][-1]["files"].items():
            parts = ("lfs", file["lfs"]["oid"]) if file["lfs"] else ("blobs", file["oid"])
            contents[path] = self.folder.joinpath(*parts).read_bytes()
        return contents

    def requests(self, start=""):
        return [line for line in (self.folder / "requests.log").read_text().splitlines() if line.startswith(start)]

    def wait_for(self, start):
        """Wait until a request that starts with `start` has arrived."""
        deadline = time.monotonic() + LIMIT
        while not ((self.folder / "requests.log").exists() and self.requests(start)):
            assert time.monotonic() < deadline, f"no {start}"
            time.sleep(0.01)

    def fault(self, *faults):
        (self.folder / "faults.json").write_text(json.dumps(faults))


@pytest.fixture
def hub(tmp_path_factory):
    hub = Hub(tmp_path_factory.mktemp("hub")).start()
    yield hub
    hub.kill()


PUSHED = {
    "model_index.json": None,
    "unet/config.json": None,
    "unet/diffusion_pytorch_model.safetensors": None,
    "scheduler/scheduler_config.json": None,
    "README.md": "---\nlicense: apache-2.0\ntags: [ddpm]\n---\n# A model\n",
    "samples.png": "picture",
    "loss.png": "curve",
    "results.json": "{}",
    "results_nearest.png": "nearest",
    "config.yaml": "seed: 0\n",
    "metrics.jsonl": '{"step": 1}\n',
    "ema-0.5/model_index.json": None,
    "ema-0.5/unet/config.json": None,
    "ema-0.5/unet/diffusion_pytorch_model.safetensors": None,
    "ema-0.5/scheduler/scheduler_config.json": None,
}
PRIVATE = [
    "status.json", ".lock", "bad_images.jsonl", "00000.png", ".samples.png.partial", "model.pt", "model.ckpt",
    "diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.bin", "unet/notes.txt", "pipeline.py",
    "checkpoints/step-000000004/unet.safetensors", "checkpoints/step-000000004/state.json",
    "results_samples/seed-0/shards/00000.npz", "shards/00000.npz", "ema-0.5/unet/model.pt", "other/model.safetensors",
]  # fmt: skip


@pytest.fixture
def folder(tiny_pipeline, tmp_path):
    """A run's folder, with private files."""
    folder = tmp_path / "run"
    tiny_pipeline.save_pretrained(folder)
    tiny_pipeline.unet.conv_out.bias.data += 1
    tiny_pipeline.save_pretrained(folder / "ema-0.5")
    for path, content in {**PUSHED, **dict.fromkeys(PRIVATE, "private")}.items():
        if content is not None:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(content)
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
