"""Provenance of results: model checksums, versions, revision, hardware, date."""

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
    """Return the versions, revision, device and date of a result that is computed now."""
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
    """Return the git revision of a file, with `-dirty` if its checkout has changes; None if git does not track it."""
    # `ls-files` excludes untracked files inside a checkout, such as the files of a virtual environment.
    for words in (["ls-files", "--error-unmatch", file.name], ["describe", "--always", "--dirty", "--abbrev=40"]):
        try:
            result = subprocess.run(["git", *words], cwd=file.parent, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        if result.returncode:
            return None
    return result.stdout.strip() or None


def hardware(device: torch.device) -> str:
    """Return the name of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, threads: {torch.get_num_threads()})"


def weights_checksum(network: nn.Module) -> str:
    """Return the SHA-256 of the names and values of all weights of a network, in hex."""
    digest = hashlib.sha256()
    for key, value in sorted(network.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def model_checksum(pipe: Any) -> str:
    """Return the SHA-256 of a pipeline's weights, network config and scheduler config, in hex."""
    parts = [weights_checksum(pipe.unet)]
    for component in (pipe.unet, pipe.scheduler):
        config = {key: value for key, value in component.config.items() if not key.startswith("_")}
        parts.append(json.dumps([type(component).__name__, config], sort_keys=True, default=str))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
