import copy

import numpy as np
import pytest
import torch
from torch import nn

from hf_ddpm.models.dropout import Dropout, hashed_mask, seed_dropout
from hf_ddpm.utils.seeds import scramble


def masks(keys, shape=(6, 8, 8), keep=0.8):
    return hashed_mask(torch.as_tensor(keys, dtype=torch.int32), torch.empty(len(keys), *shape), keep)


def test_scramble_is_one_to_one():
    inputs = torch.cat([torch.arange(-(2**31), -(2**31) + 2**18), torch.arange(2**18)]).int()
    assert len(scramble(inputs.clone()).unique()) == len(inputs)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 1 - 1e-12])
def test_masks_are_independent_bernoulli_variables(keep):
    kept = masks(scramble(torch.arange(512, dtype=torch.int32)).tolist(), (8, 32, 32), keep).flatten(1).double()
    assert abs(kept.mean() - keep) < 5 * np.sqrt(keep * (1 - keep) / kept.numel())
    if keep < 0.99:
        standard = (kept - keep) / np.sqrt(keep * (1 - keep))
        images, positions = standard.shape
        # Correlations between images, over 130,000 pairs, and between neighbors along width, height and channels.
        between = (standard @ standard.T / positions).fill_diagonal_(0)
        assert between.abs().max() * np.sqrt(positions) < 6.5
        for lag in (1, 2, 8, 16, 256, 512):
            assert abs((standard[:, lag:] * standard[:, :-lag]).mean()) * np.sqrt(images * positions) < 5


def test_masks_depend_only_on_key_and_position():
    whole = masks([5, 6, 7])
    assert torch.equal(masks([6]), whole[1:2]) and not torch.equal(whole[0], whole[1])
    assert whole.is_contiguous(memory_format=torch.channels_last)


def test_layers_have_different_masks_and_gradients_have_same_masks():
    network = nn.Sequential(Dropout(0.5), Dropout(0.5)).train()
    seed_dropout(network, torch.tensor([1, 2], dtype=torch.int32))
    x = torch.ones(2, 4, 8, 8, requires_grad=True)
    first, second = (layer(x) for layer in network)
    assert not torch.equal(first, second) and set(first.unique().tolist()) == {0, 2}
    first.sum().backward()
    assert torch.equal(x.grad, first) and torch.equal(network[0](x), first)
    assert copy.deepcopy(network).eval()(x) is x
    seed_dropout(network, None)
    assert not torch.equal(network[0](x), network[0](x))
