import copy

import numpy as np
import pytest
import torch
from torch import nn

from hf_ddpm.models.dropout import Dropout, hashed_mask, seed_dropout
from hf_ddpm.utils.seeds import scramble


def masks(keys, shape=(6, 8, 8), keep=0.8):
    return hashed_mask(torch.as_tensor(keys, dtype=torch.int32), torch.empty(len(keys), *shape), keep)


def test_a_hash_is_one_to_one():
    numbers = torch.cat([torch.arange(-(2**31), -(2**31) + 2**18), torch.arange(2**18)]).int()
    assert len(scramble(numbers.clone()).unique()) == len(numbers)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 1 - 1e-12])
def test_masks_are_independent_bernoulli_variables(keep):
    kept = masks(scramble(torch.arange(512, dtype=torch.int32)).tolist(), (8, 32, 32), keep).flatten(1).double()
    assert abs(kept.mean() - keep) < 5 * np.sqrt(keep * (1 - keep) / kept.numel())
    if keep < 0.99:
        standard = (kept - keep) / np.sqrt(keep * (1 - keep))
        images, places = standard.shape
        # Of images with each other, over 130,000 pairs; of neighbors in a row, a column and a channel.
        between = (standard @ standard.T / places).fill_diagonal_(0)
        assert between.abs().max() * np.sqrt(places) < 6.5
        for lag in (1, 2, 8, 16, 256, 512):
            assert abs((standard[:, lag:] * standard[:, :-lag]).mean()) * np.sqrt(images * places) < 5


def test_a_mask_depends_on_key_and_place_alone():
    whole = masks([5, 6, 7])
    assert torch.equal(masks([6]), whole[1:2]) and not torch.equal(whole[0], whole[1])
    assert whole.is_contiguous(memory_format=torch.channels_last)


def test_layers_have_masks_of_their_own_and_gradients_are_masked_alike():
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
