import itertools

import torch

from hf_ddpm.utils.seeds import derived_seed, generator


def test_no_two_places_share_a_stream():
    # numpy's SeedSequence pads with zeros: mixed naively, (0, 1) and (0, 1, 0) would be one place.
    small = range(4)
    places = [p for length in (2, 3, 4) for p in itertools.product(small, repeat=length)]
    places += [(2**32, 1), (0, 2**31)]
    assert len({derived_seed(*place) for place in places}) == len(places)


def test_a_place_is_always_the_same():
    draws = [torch.rand(3, generator=generator(1, 2, 3)) for _ in range(2)]
    assert torch.equal(*draws)
