"""What tells models apart: checksums of weights, and of all that a pipeline computes with."""

import hashlib
import json
from typing import Any

import torch
from torch import nn


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
