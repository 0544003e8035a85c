"""The origin of a figure: checksums of the model, versions, revision, hardware, date."""

import hashlib
import json
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

import hf_ddpm


def provenance(device: torch.device) -> dict[str, Any]:
    """Returns what computed a figure, and when."""
    return {
        "versions": {
            "hf_ddpm": hf_ddpm.__version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "python": platform.python_version(),
        },
        "revision": revision(Path(hf_ddpm.__file__)),
        "device": hardware(device),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def revision(file: Path) -> str | None:
    """Returns the git revision of a file's checkout, with `-dirty` if it was changed; None if it is in none."""
    # A file that is merely below a checkout, such as one in its virtual environment, is not of it.
    for words in (["ls-files", "--error-unmatch", file.name], ["describe", "--always", "--dirty", "--abbrev=40"]):
        try:
            said = subprocess.run(["git", *words], cwd=file.parent, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        if said.returncode:
            return None
    return said.stdout.strip() or None


def hardware(device: torch.device) -> str:
    """Returns what a device is called."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, threads: {torch.get_num_threads()})"


def weights_checksum(network: nn.Module) -> str:
    """Returns the SHA-256 of the names and values of all weights of a network, in hex."""
    digest = hashlib.sha256()
    for key, value in sorted(network.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def model_checksum(pipe: Any) -> str:
    """Returns the SHA-256 of a pipeline's weights, and of how its network and its scheduler are configured, in hex."""
    parts = [weights_checksum(pipe.unet)]
    for component in (pipe.unet, pipe.scheduler):
        config = {key: value for key, value in component.config.items() if not key.startswith("_")}
        parts.append(json.dumps([type(component).__name__, config], sort_keys=True, default=str))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
