"""The first steps of a user with their own images: each command is taken from the output of the previous one."""

import importlib.util
import json
import re
import resource
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tests.conftest import LIMIT
from tests.hub.conftest import Hub

pytestmark = [pytest.mark.slow, pytest.mark.hub]
ROOT = Path(__file__).parents[1]


def write_images(folder, count):
    """Write PNG files of many sizes: a colored disc, box or triangle on a transparent background."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(count):
        width, height = map(int, rng.integers(40, 160, 2))
        color = tuple(map(int, rng.integers(0, 256, 3)))
        picture = Image.new("RGBA", (width, height))
        pen, box = ImageDraw.Draw(picture), (width * 0.1, height * 0.1, width * 0.9, height * 0.9)
        if i % 3 == 0:
            pen.ellipse(box, color)
        elif i % 3 == 1:
            pen.rectangle(box, color)
        else:
            pen.polygon([(width / 2, box[1]), box[2:], (box[0], box[3])], color)
        picture.save(folder / f"{i:03}.png")


class Shell:
    """Run commands in a folder; `hf-ddpm` runs the module of this checkout."""

    def __init__(self, folder, environment):
        self.folder = folder
        self.environment = environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def start(self, line, **more):
        program, *words = shlex.split(line)
        assert program == "hf-ddpm"
        command, pipe = [sys.executable, "-m", "hf_ddpm", *words], subprocess.PIPE
        environment = self.environment | more
        return subprocess.Popen(command, cwd=self.folder, env=environment, stdout=pipe, stderr=pipe, text=True)

    def run(self, line):
        process = self.start(line)
        output, errors = process.communicate(timeout=LIMIT)
        assert process.returncode == 0, errors
        return output


def stop_in_training(process):
    """Send Ctrl-C after two steps; return the exit code and the output."""
    errors = ""
    while not re.search(r"\b2/10000", errors):
        character = process.stderr.read(1)
        assert character, errors
        errors += character
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=LIMIT)
    return process.returncode, output


def test_own_images_become_shared_model(tmp_path):
    write_images(tmp_path / "pictures", 300)
    hub = Hub(tmp_path / "hub-server")
    hub.folder.mkdir()
    hub.start()
    try:
        shell = Shell(tmp_path, hub.environment())
        code, output = stop_in_training(shell.start("hf-ddpm train --dataset pictures"))
        assert code == 128 + signal.SIGINT
        assert output.startswith("--preset small-32 (default") and "300 images in train; all files are used" in output
        commands = dict(re.findall(r"^  (resume|end it here|sample|export): +(.*)$", output, re.MULTILINE))

        # The stopped run can be sampled.
        assert "--num_images 16 --num_inference_steps 100" in commands["sample"]
        shell.run(f"{commands['sample']} --num_images 2 --num_inference_steps 2")
        run = tmp_path / "runs" / "ddpm"
        assert Image.open(run / "images" / "00001.png").size == (32, 32)
        assert "stopped by a signal; repeat the command to resume" in shell.run("hf-ddpm status runs/ddpm")

        # It resumes and ends early, with samples; the export has the final weights.
        step = json.loads((run / "status.json").read_text())["step"]
        words = f"--max_train_steps {step + 2} --num_samples 2 --num_inference_steps 2"
        output = shell.run(f"{commands['resume']} {words}")
        assert "cosine learning rate" in output
        status = json.loads((run / "status.json").read_text())
        assert (status["status"], status["step"]) == ("finished", step + 2)
        assert (run / "samples.png").exists() and json.loads((run / "export.json").read_text())["step"] == step + 2
        shell.run("hf-ddpm export runs/ddpm --output model")
        assert (tmp_path / "model" / "model_index.json").exists()

        words = "--metrics nll --split train --num_images 2 --steps_per_image 2"
        shell.run(f"hf-ddpm evaluate --model runs/ddpm --dataset pictures {words} --output runs/ddpm/results.json")
        assert json.loads((run / "results.json").read_text())["nll"]["total_bpd"] > 0
        shell.run("hf-ddpm push --model runs/ddpm --hub_model_id org/shapes --license mit")
        files = hub.files("org/shapes")
        card = files["README.md"].decode()
        assert "unet/diffusion_pytorch_model.safetensors" in files and "license: mit" in card
        assert "from diffusers import DDPMPipeline" in card and '"org/shapes"' in card and str(tmp_path) not in card
        if importlib.util.find_spec("gradio"):
            assert "gradio" in show(shell, "hf-ddpm demo --model runs/ddpm")
    finally:
        hub.kill()
    # The largest memory of all processes: a network of 5.6M parameters at batch size 32 needs little.
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < 4 * 2**30


def show(shell, line):
    """Return the page of a demo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = shell.start(line, GRADIO_SERVER_PORT=str(port))
    deadline = time.monotonic() + LIMIT
    try:
        while True:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            try:
                return urllib.request.urlopen(f"http://127.0.0.1:{port}").read().decode()
            except urllib.error.URLError:
                time.sleep(0.5)
    finally:
        process.terminate()
        process.communicate(timeout=LIMIT)
