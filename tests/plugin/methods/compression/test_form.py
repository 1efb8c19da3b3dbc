import torch
from hypothesis import given
from hypothesis import strategies as st

from condiquant_plugin.methods.compression.form import pack_bits, unpack_bits


@given(count=st.integers(1, 40), seed=st.integers(0, 2**16))
def test_packed_flags_take_an_eighth_and_come_back(count, seed):
    flags = torch.rand(2, 3, count, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack_bits(flags)
    assert packed.dtype == torch.uint8
    assert packed.shape == (2, 3, -(-count // 8))
    assert torch.equal(unpack_bits(packed, count), flags)
