import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from condiquant_plugin import FakeQuantizer, InputError
from condiquant_plugin.uniform.bounds_search import search_bounds
from condiquant_plugin.uniform.fake_quantizer import snapped_together
from condiquant_plugin.uniform.sampling import Sample


def reference(x, quantizer):
    """2DQuant's formula with straight-through rounding and snapping, differentiated by autograd."""
    last = 2**quantizer.bits - 1
    lower = quantizer.lower + (quantizer.snapped().lower - quantizer.lower).detach()
    step = (quantizer.upper - quantizer.lower) / last
    if quantizer.row_blocks > 1:
        repeat = x.shape[0] // quantizer.row_blocks
        lower = lower.repeat_interleave(repeat)[:, None]
        step = step.repeat_interleave(repeat)[:, None]
    position = (x - lower) / step
    clipped = torch.minimum(torch.maximum(position, torch.zeros(())), torch.full((), float(last)))
    return (clipped + (clipped.round() - clipped).detach()) * step + lower


@given(
    st.integers(2, 8),
    st.sampled_from(["weight", "activation"]),
    st.sampled_from([1, 3, 12]),
    st.integers(0, 10**6),
)
def test_values_and_gradients_are_2dquants(bits, kind, row_blocks, seed):
    generator = torch.Generator().manual_seed(seed)
    quantizer = FakeQuantizer(bits, kind, row_blocks=row_blocks).double()
    x = torch.randn(12, 9, generator=generator, dtype=torch.float64)
    quantizer.search_bounds(x)
    quantizer.set_bounds(quantizer.lower * 0.8 - 0.01, quantizer.upper * 0.7 + 0.02)
    upstream = torch.randn(12, 9, generator=generator, dtype=torch.float64)
    gradients = []
    values = []
    for function in (quantizer, lambda t: reference(t, quantizer)):
        inputs = x.clone().requires_grad_()
        output = function(inputs)
        values.append(output)
        gradients.append(
            torch.autograd.grad(
                (output * upstream).sum(), [inputs, quantizer.lower, quantizer.upper]
            )
        )
    torch.testing.assert_close(*values, atol=1e-12, rtol=0)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)


def test_row_blocks_have_bounds_of_their_own():
    x = torch.cat([torch.linspace(-1, 1, 8), torch.linspace(-100, 100, 8)]).view(2, 8)
    quantizer = FakeQuantizer(4, "weight", row_blocks=2)
    quantizer.search_bounds(x)
    assert (quantizer(x) - x).abs().amax(1)[0] < 0.2
    per_tensor = FakeQuantizer(4, "weight")
    per_tensor.search_bounds(x)
    assert (per_tensor(x) - x).abs().amax(1)[0] > 0.9


def test_output_channels_of_a_transposed_convolution_are_its_second_axis():
    weight = torch.randn(4, 6, 3, 3) * torch.logspace(0, 3, 6).view(1, 6, 1, 1)
    quantizer = FakeQuantizer(4, "weight", row_blocks=6, axis=1)
    quantizer.search_bounds(weight)
    by_channel = weight.transpose(0, 1).flatten(1)
    error = (quantizer(weight) - weight).transpose(0, 1).flatten(1)
    assert (error.norm(dim=1) / by_channel.norm(dim=1)).max() < 0.2


def test_disabled_quantizer_is_the_identity_and_copies_keep_bounds():
    quantizer = FakeQuantizer(3, "activation")
    x = torch.randn(100)
    quantizer.search_bounds(x)
    twin = copy.deepcopy(quantizer)
    other = FakeQuantizer(3, "activation")
    other.load_state_dict(quantizer.state_dict())
    assert torch.equal(twin(x), quantizer(x))
    assert torch.equal(other(x), quantizer(x))
    quantizer.enabled = False
    assert quantizer(x) is x


def test_search_on_next_input_happens_once():
    quantizer = FakeQuantizer(4, "activation")
    quantizer.search_on_next_input = True
    quantizer(torch.linspace(-1, 1, 50))
    first = quantizer.upper.item()
    quantizer(torch.linspace(-9, 9, 50))
    assert quantizer.upper.item() == first


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_values_name_the_quantizer(value):
    quantizer = FakeQuantizer(4, "activation", name="body.0.attn.input")
    with pytest.raises(InputError, match=r"body\.0\.attn\.input"):
        quantizer.search_bounds(torch.tensor([0.0, value]))


def test_traced_graph_calls_the_operator():
    quantizer = FakeQuantizer(4, "activation", name="x")
    quantizer.search_bounds(torch.randn(50))
    traced = torch.jit.trace(quantizer, torch.randn(50), check_trace=False)
    assert "condiquant::fake_quantize" in str(traced.graph)
    x = torch.randn(50)
    torch.testing.assert_close(traced(x), quantizer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gets_the_levels_of_float32(dtype):
    quantizer = FakeQuantizer(8, "activation")
    quantizer.set_bounds(-0.3, 1.7)
    x = torch.linspace(-1, 2, 999).to(dtype).requires_grad_()
    result = quantizer(x)
    assert result.dtype == dtype
    torch.testing.assert_close(result, quantizer(x.detach().float()).to(dtype), rtol=0, atol=0)
    result.float().square().sum().backward()
    assert x.grad.dtype == dtype
    assert quantizer.lower.grad.dtype == torch.float32


@pytest.mark.parametrize("quantized_inputs", [False, True])
def test_bounds_of_all_quantizers_in_one_forward_pass(quantized_inputs):
    model = torch.nn.Sequential(FakeQuantizer(2, "activation"), FakeQuantizer(8, "activation"))
    x = torch.randn(1000)
    search_bounds(model, x, quantized_inputs=quantized_inputs)
    first, second = FakeQuantizer(2, "activation"), FakeQuantizer(8, "activation")
    first.search_bounds(x)
    second.search_bounds(first(x) if quantized_inputs else x)
    for found, expected in zip(model, (first, second), strict=True):
        assert (found.lower, found.upper) == (expected.lower, expected.upper)
    with pytest.raises(InputError):
        search_bounds(model, x / 0)
    assert all(quantizer.enabled for quantizer in model)


def test_bounds_are_searched_on_the_sample_of_single_images():
    model = torch.nn.Sequential(FakeQuantizer(4, "activation"))
    sizes = []
    model.register_forward_pre_hook(lambda _, x: sizes.append(len(x[0])))
    images = torch.randn(3, 2**17, generator=torch.Generator().manual_seed(0))
    search_bounds(model, images, batch_size=1)
    sample = Sample()
    for image in images:
        sample.add(image)
    expected = FakeQuantizer(4, "activation")
    expected.search_bounds(sample.entries())
    assert (model[0].lower, model[0].upper) == (expected.lower, expected.upper)
    assert (model[0].sample, model[0].search_on_next_input) == (None, False)
    search_bounds(model, images, batch_size=2)
    search_bounds(model, images, quantized_inputs=True, batch_size=1)
    assert sizes == [1, 1, 1, 2, 1, 3]


def test_a_quantizer_that_no_image_reaches_is_searched_later():
    model = torch.nn.Sequential(FakeQuantizer(4, "activation"), torch.nn.Linear(3, 3))
    model[1].unused = FakeQuantizer(4, "activation")
    search_bounds(model, torch.randn(2, 3), batch_size=1)
    assert model[1].unused.search_on_next_input
    assert not model[0].search_on_next_input


class Several(torch.nn.Module):
    """Quantizers of every kind of grid: alike, with blocks of rows, widened by their weight."""

    def __init__(self):
        super().__init__()
        self.quantizers = torch.nn.ModuleList(
            [
                FakeQuantizer(4, "activation"),
                FakeQuantizer(4, "activation"),
                FakeQuantizer(3, "weight", row_blocks=3),
                FakeQuantizer(3, "weight"),
                FakeQuantizer(8, "weight"),
                FakeQuantizer(2, "operand", zero_on_grid=True),
            ]
        )

    def forward(self, x):
        return torch.stack([(i + 1) * q(x) for i, q in enumerate(self.quantizers)]).square().sum()


def test_grids_snapped_together_give_the_same_values_and_gradients():
    model, x = Several(), torch.randn(6, 5)
    for factor, quantizer in enumerate(model.quantizers, 5):
        quantizer.search_bounds(x)
        quantizer.set_bounds(quantizer.lower * factor / 10, quantizer.upper * factor / 9)
    parameters = list(model.parameters())
    alone = model(x)
    expected = torch.autograd.grad(alone, parameters)
    with snapped_together(model):
        together = model(x)
        with torch.no_grad():
            model.quantizers[0].lower.fill_(-100)  # inside, bounds are those of its beginning
        assert torch.equal(model(x), together)
    assert torch.equal(alone, together)
    for mine, theirs in zip(torch.autograd.grad(together, parameters), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    assert not torch.equal(model(x), alone)


def test_grids_are_forgotten_after_an_error():
    model, x = Several(), torch.randn(6, 5)
    before = model(x)
    with pytest.raises(KeyError), snapped_together(model):
        raise KeyError
    with torch.no_grad():
        model.quantizers[0].upper.fill_(0.1)
    assert not torch.equal(model(x), before)


def test_little_is_kept_for_the_backward_pass():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        x = torch.randn(50, 40, requires_grad=True)
        y = FakeQuantizer(4, "activation")(x)
    large = [t.data_ptr() for t in kept if t.numel() == x.numel()]
    assert set(large) <= {x.data_ptr(), y.data_ptr()}


def test_what_is_not_contiguous_has_the_gradient_of_what_is():
    quantizer = FakeQuantizer(3, "activation")
    quantizer.set_bounds(-1.0, 1.5)
    x, upstream = torch.randn(7, 9), torch.randn(9, 7)
    gradients = []
    for same in (x.mT, x.mT.contiguous()):
        for weights in (upstream, upstream.mT.contiguous().mT):
            output = (quantizer(same) * weights).sum()
            gradients.append(torch.autograd.grad(output, [quantizer.lower, quantizer.upper]))
    for found in gradients[1:]:
        torch.testing.assert_close(found, gradients[0])
