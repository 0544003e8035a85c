import itertools

import torch

from hf_ddpm.utils.seeds import derived_seed, generator, hashed_keys, normal_noise


def test_derived_seeds_are_distinct():
    # numpy's SeedSequence pads with zeros: without a spawn key, (0, 1) and (0, 1, 0) would give the same seed.
    small = range(4)
    places = [p for length in (2, 3, 4) for p in itertools.product(small, repeat=length)]
    places += [(2**32, 1), (0, 2**31)]
    assert len({derived_seed(*place) for place in places}) == len(places)


def test_generators_are_reproducible():
    draws = [torch.rand(3, generator=generator(1, 2, 3)) for _ in range(2)]
    assert torch.equal(*draws)


def test_hashed_keys_are_distinct_and_match_hash_by_hand():
    images, steps = torch.arange(300, dtype=torch.int32).repeat(40), torch.arange(40, dtype=torch.int32)
    keys = hashed_keys(derived_seed(0, 1), images, steps.repeat_interleave(300))
    assert len(keys.unique()) == 12_000 and keys.dtype == torch.int32
    assert not torch.equal(keys, hashed_keys(derived_seed(1, 1), images, steps.repeat_interleave(300)))

    def scrambled(bits):  # with signed shifts, as in C
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            bits = (bits ^ ((bits - (bits >> 31 << 32)) >> shift)) * factor % 2**32
        return bits

    key = ((derived_seed(0, 1) >> 31) - 2**31) % 2**32
    for place in (7, 3):
        key = scrambled(place * 0x9E3779B9 % 2**32 ^ key)
    assert keys[3 * 300 + 7].item() % 2**32 == key


def test_noise_is_standard_normal_and_independent():
    noise = normal_noise(torch.arange(4000, dtype=torch.int32), (3, 5, 5)).double()
    assert noise.shape == (4000, 3, 5, 5) and len(noise.unique()) > 0.99 * noise.numel()
    # Moments within five standard deviations: variances of z, z^2, z^3, z^4 are 1, 2, 15, 96.
    for power, (mean, variance) in enumerate([(0, 1), (1, 2), (0, 15), (3, 96)], start=1):
        assert abs(noise.pow(power).mean() - mean) < 5 * (variance / noise.numel()) ** 0.5
    flat = noise.flatten(1)
    between = (flat @ flat.T / 75).fill_diagonal_(0)
    assert abs(between.std() - 75**-0.5) < 0.01 * 75**-0.5
    covariance = (flat.T @ flat / 4000).fill_diagonal_(1) - torch.eye(75)
    assert covariance.abs().max() < 6 * 4000**-0.5
    quantiles = flat.flatten().sort().values[[9_000, 150_000, 291_000]]  # 3%, 50%, 97%
    torch.testing.assert_close(quantiles, torch.tensor([-1.8808, 0, 1.8808]).double(), rtol=0, atol=0.02)


def test_noise_of_key_does_not_depend_on_batch():
    keys = torch.tensor([5, -6, 7], dtype=torch.int32)
    assert torch.equal(normal_noise(keys, (1, 8, 8))[1:2], normal_noise(keys[1:2], (1, 8, 8)))
