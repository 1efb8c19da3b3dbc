import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from condiquant_plugin.uniform.sampling import First, Sample

ROOM = 2**18


def sampled(tensors):
    sample = Sample()
    for x in tensors:
        sample.add(x)
    return sample.entries()


@settings(max_examples=10)
@example([ROOM])
@given(
    st.lists(st.sampled_from([1, 7, 1000, 2**16, 2**18, 2**18 + 1, 2**20]), min_size=1, max_size=5)
)
def test_the_sample_keeps_its_room_equal_shares_and_the_extremes(sizes):
    *taken, lowest, highest = sampled(
        torch.arange(size, dtype=torch.float64) + place * 2**20 for place, size in enumerate(sizes)
    ).tolist()
    assert (lowest, highest) == (0, (len(sizes) - 1) * 2**20 + sizes[-1] - 1)
    assert len(taken) <= ROOM
    counts = torch.tensor(taken).long().div(2**20, rounding_mode="floor").bincount()
    share = max(counts.tolist())
    assert counts.tolist() == [min(share, size) for size in sizes]
    if sum(sizes) <= ROOM:
        assert share == max(sizes)
    else:  # twice the share would not fit
        assert sum(min(2 * share, size) for size in sizes) > ROOM or share == ROOM


def test_small_tensors_are_taken_whole():
    one, other = torch.randn(3, 4, 5), torch.randn(100)
    found = sampled([one, other])[:-2]
    assert torch.equal(found.sort()[0], torch.cat([one.flatten(), other]).sort()[0])


def test_places_are_spread_over_the_whole_tensor_and_the_same_in_every_host():
    ramp = torch.linspace(0, 1, 2**20)
    found = sampled([ramp, ramp, ramp])[:-2]
    quarters = torch.histc(found, 4, 0, 1) / len(found)
    torch.testing.assert_close(quarters, torch.full((4,), 0.25), atol=0.01, rtol=0)
    assert torch.equal(found, sampled([ramp.view(1024, 1024)] * 3)[:-2])
    first, second = found[: len(found) // 3], found[len(found) // 3 : 2 * (len(found) // 3)]
    assert not torch.equal(first, second)


def test_what_outgrows_the_room_keeps_the_first_half_of_its_share():
    ramp = torch.linspace(0, 1, 2**18)
    alone = sampled([ramp])[:-2]
    together = sampled([ramp, ramp])[:-2]
    assert torch.equal(together[: len(together) // 2], alone[: 2**17])


def test_extremes_are_of_everything_that_was_added():
    big = torch.zeros(2**20)
    big[12345], big[54321] = -7.0, 9.0
    found = sampled([torch.ones(3), big, torch.full((2,), 2.0)])
    assert found[-2:].tolist() == [-7.0, 9.0]
    gradients = torch.ones(3, requires_grad=True)
    assert not sampled([gradients]).requires_grad


def test_a_tensor_that_just_fits_is_taken_whole():
    ramp = torch.arange(ROOM, dtype=torch.float64)
    assert torch.equal(sampled([ramp])[:-2].sort()[0], ramp)


def test_a_sample_counts_its_tensors():
    sample = Sample()
    for count in range(3):
        assert len(sample) == count
        sample.add(torch.randn(4))


def test_of_what_stays_the_same_the_first_is_kept_whole():
    first = First()
    assert not first
    given = torch.randn(2, 3, requires_grad=True)
    first.add(given)
    first.add(torch.zeros(2, 3))
    assert len(first) == 1
    assert torch.equal(first.entries(), given)
    assert not first.entries().requires_grad
