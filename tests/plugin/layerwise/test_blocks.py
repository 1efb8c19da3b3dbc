import copy
import re
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import networks
import processes
from condiquant_plugin import FakeQuantizer, InputError
from condiquant_plugin.layerwise import shelf
from condiquant_plugin.layerwise.blocks import (
    LAYERS,
    find_blocks,
    module_geometry,
    solve_block_by_block,
)
from condiquant_plugin.layerwise.moments import moments_of
from condiquant_plugin.layerwise.problem import Dense, LayerProblem, LayerReport, Solution
from condiquant_plugin.methods.condiquant.reconditioning import ReconditioningConfig, recondition
from live_memory import LiveMemory

CONDITION = ReconditioningConfig("condition", strength=0.1, steps=20)
LEAST_SQUARES = ReconditioningConfig("least_squares")


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width, bias=False)

    def forward(self, hidden, gain, *, mask=None):
        change = self.fc2(input=nn.functional.gelu(self.fc1(hidden * gain)))
        return hidden + (change if mask is None else change * mask), gain


class Decoder(nn.Module):
    """As language models are made: tuples between blocks, arguments common to all, a head."""

    def __init__(self, depth=3, width=12):
        super().__init__()
        self.embed = nn.Linear(5, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 7)

    def forward(self, x, mask=None):
        hidden, gain = self.embed(x), torch.tensor(1.5)
        for block in self.blocks:
            hidden, _ = block(hidden, gain, mask=mask)
        return self.head(hidden)


def batches(count=3, batch=4):
    return list(torch.randn(count, batch, 6, 5).unbind())


def inputs_of(model, name, data):
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0] if args else kwargs["input"]).detach()),
        with_kwargs=True,
    )
    with torch.no_grad():
        for batch in data:
            model(batch)
    handle.remove()
    return seen


def solved(model, names, method, float_inputs, quantized_inputs=None):
    """Layers solved on inputs collected by whole forward passes."""
    problems = []
    for name in names:
        layer, moments = model.get_submodule(name), None
        codes = quantized_inputs[name] if quantized_inputs else [None] * len(float_inputs[name])
        for x, q in zip(float_inputs[name], codes, strict=True):
            new = moments_of(x, module_geometry(layer), q)
            moments = new if moments is None else moments + new
        bias = None if layer.bias is None else layer.bias.detach()
        geometry = module_geometry(layer)
        problems.append(LayerProblem(name, layer.weight.detach(), bias, moments, geometry))
    return recondition(problems, method)


def write(model, solutions):
    with torch.no_grad():
        for solution in solutions:
            layer = model.get_submodule(solution.report.name)
            layer.weight.copy_(solution.weight)
            if solution.bias is not None:
                layer.bias.copy_(solution.bias)


def layers_of(block):
    return [f"{block}.fc1", f"{block}.fc2"]


def assert_equal_weights(one, other):
    for (name, mine), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6, msg=name)


def test_each_block_is_solved_on_what_the_compressed_ones_before_it_give():
    model, data = Decoder(), batches()
    expected = copy.deepcopy(model)
    for block in ("blocks.0", "blocks.1", "blocks.2"):
        names = layers_of(block)
        inputs = {name: inputs_of(expected, name, data) for name in names}
        write(expected, solved(expected, names, CONDITION, inputs))
    done = []
    reports = solve_block_by_block(model, data, CONDITION, progress=done.append)
    assert_equal_weights(model, expected)
    assert done == ["blocks.0", "blocks.1", "blocks.2"]
    assert list(reports) == [name for block in done for name in layers_of(block)]


def test_on_original_inputs_it_is_all_layers_at_once():
    model, data = Decoder(), batches()
    expected = copy.deepcopy(model)
    names = [name for block in find_blocks(model) for name in layers_of(block)]
    inputs, found = {name: inputs_of(expected, name, data) for name in names}, quantizers(names)
    codes = {name: [found[name](x) for x in inputs[name]] for name in names}
    write(expected, solved(expected, names, LEAST_SQUARES, inputs, codes))
    solve_block_by_block(model, data, LEAST_SQUARES, inputs="original", input_quantizers=found)
    assert_equal_weights(model, expected)


def quantizers(names):
    made = {}
    for name in names:
        made[name] = FakeQuantizer(3, "activation", name=name).requires_grad_(False)
        made[name].set_bounds(-2.0, 2.0)
    return made


def test_float_outputs_are_fitted_on_quantized_inputs_of_the_compressed_network():
    model, data = Decoder(), batches()
    original, expected = copy.deepcopy(model), copy.deepcopy(model)
    names = [name for block in find_blocks(model) for name in layers_of(block)]
    found = quantizers(names)
    for name in names:
        expected.get_submodule(name).register_forward_pre_hook(
            lambda _, args, kwargs, q=found[name]: (
                (q(args[0] if args else kwargs["input"]),),
                {},
            ),
            with_kwargs=True,
        )
    for block in find_blocks(model):
        inside = layers_of(block)
        codes = {name: inputs_of(expected, name, data) for name in inside}
        floats = {name: inputs_of(original, name, data) for name in inside}
        write(expected, solved(original, inside, LEAST_SQUARES, floats, codes))
    solve_block_by_block(model, data, LEAST_SQUARES, input_quantizers=found)
    assert_equal_weights(model, expected)
    for name in names:
        assert not model.get_submodule(name)._forward_pre_hooks


@pytest.mark.parametrize(
    ("network", "blocks"),
    [("swinir", ["layers.0", "layers.1"]), ("compact", [f"body.{i}" for i in range(9)])],
)
def test_real_networks(network, blocks):
    model = networks.build(network)
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert find_blocks(model) == blocks
    crops = torch.rand(4, 3, 16, 16)
    reports = solve_block_by_block(model, crops.split(2), CONDITION)
    layers = [n for n, m in model.named_modules() if isinstance(m, LAYERS)]
    assert list(reports) == [
        n for n in layers if n.startswith(tuple(f"{b}." for b in blocks)) or n in blocks
    ]
    for name, report in reports.items():
        assert report.condition_after < report.condition_before
        assert not torch.equal(model.get_parameter(f"{name}.weight"), before[f"{name}.weight"])


def test_arguments_common_to_all_blocks_belong_to_their_batch():
    model = Decoder()
    expected = copy.deepcopy(model)
    data = [{"x": x, "mask": torch.rand(4, 6, 1)} for x in batches()]
    solve_block_by_block(model, data, CONDITION)
    # The same, in a network whose mask is part of its input.
    joined = [torch.cat([d["x"], d["mask"]], -1) for d in data]

    class Joined(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x[..., :5], x[..., 5:])

    solve_block_by_block(Joined(expected), joined, CONDITION)
    assert_equal_weights(model, expected)


def test_every_block_is_run_as_often_as_it_is_needed():
    model, data = networks.build("compact"), [torch.rand(1, 3, 8, 8)]
    calls = []
    for name in find_blocks(model):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    solve_block_by_block(model, data, CONDITION)
    # The check of the chain, the moments of layers, and what the compressed block gives to the next.
    counts = {name: calls.count(name) for name in find_blocks(model)}
    assert counts == {"body.8": 2, **{f"body.{i}": 3 if i % 2 == 0 else 2 for i in range(8)}}


@pytest.mark.parametrize(("inputs", "calls"), [("compressed", 1 + 1 + 3), ("original", 1 + 3)])
def test_moments_are_collected_no_further_than_to_the_last_layer(inputs, calls):
    model, data = Decoder(), batches(3)
    counts = dict.fromkeys(find_blocks(model), 0)
    for name in counts:

        def count(*_, name=name):
            counts[name] += 1

        model.get_submodule(name).fc2.register_forward_hook(count)
    solve_block_by_block(model, data, CONDITION, inputs=inputs)
    # The check of the chain, the first batch, and what the compressed block gives to the next.
    last = calls if inputs == "original" else calls - 3
    assert counts == {"blocks.0": calls, "blocks.1": calls, "blocks.2": last}


def test_layers_can_be_left_out():
    model = Decoder()
    before = copy.deepcopy(model.state_dict())
    reports = solve_block_by_block(
        model, batches(), CONDITION, is_excluded=lambda name: name.endswith("fc1")
    )
    assert list(reports) == [f"blocks.{i}.fc2" for i in range(3)]
    changed = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    assert changed == {f"{name}.weight" for name in reports}


@dataclass(frozen=True)
class Halving:
    """A method that needs no room of its own."""

    moments_dtype: torch.dtype = torch.float64
    needs_quantized_inputs = False
    is_batch_dependent = False

    def solve(self, problems):
        assert all(p.moments.gram.dtype == self.moments_dtype for p in problems)
        return [Solution(Dense(p.weight.mul_(0.5)), p.bias, LayerReport(p.name)) for p in problems]


def peak(depth, dtype=torch.float64, width=64, count=2):
    model = Decoder(depth, width)
    data = batches(count)
    with LiveMemory() as memory:
        solve_block_by_block(model, data, Halving(dtype))
    return memory.peak


def test_peak_memory_does_not_depend_on_depth():
    assert peak(24) == peak(4)


@pytest.mark.parametrize("inputs", ["original", "compressed"])
def test_peak_memory_does_not_depend_on_the_number_of_batches(monkeypatch, inputs):
    def peak_of(count):
        model, data = Decoder(3, 32), batches(count)
        with LiveMemory() as memory:
            solve_block_by_block(model, data, Halving(), inputs=inputs)
        return memory.peak

    assert peak_of(60) > peak_of(6)  # which fit in memory
    monkeypatch.setattr(shelf, "BUDGET", 5000)
    assert peak_of(60) == peak_of(6)


@pytest.mark.parametrize("inputs", ["original", "compressed"])
def test_inputs_on_disk_change_nothing(monkeypatch, inputs):
    def solved():
        torch.manual_seed(0)
        model, data = Decoder(), batches(7)
        solve_block_by_block(model, data, LEAST_SQUARES, inputs=inputs)
        return model.state_dict()

    expected = solved()
    monkeypatch.setattr(shelf, "BUDGET", 3000)
    found = solved()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_shelf_gives_back_what_was_put_there_last(monkeypatch):
    monkeypatch.setattr(shelf, "BUDGET", 100)
    kept = shelf.Shelf()
    for turn in range(3):
        tensors = [
            torch.full((5, n), turn + n, dtype=dtype)
            for n in range(1, 5)
            for dtype in (torch.float32, torch.bfloat16)
        ]
        for key, tensor in enumerate(tensors):
            kept.put(key, tensor)
        assert all(torch.equal(kept.get(key), tensor) for key, tensor in enumerate(tensors))
        assert kept.get(7).dtype == torch.bfloat16


def test_peak_memory_follows_the_dtype_that_the_method_asks_for():
    width = 64
    grams = width**2 + (2 * width) ** 2
    saved = peak(4) - peak(4, torch.float32)
    assert saved >= 4 * grams


def _solve_a_share(rank, folder):
    torch.manual_seed(0)
    model = Decoder()
    # The last of three processes gets no batch.
    solve_block_by_block(model, batches(2), LEAST_SQUARES, input_quantizers=_halves())
    torch.save(model.state_dict(), folder / f"{rank}.pth")


def _halves():
    return {f"blocks.{i}.fc1": lambda x: x.mul(2).round().div(2) for i in range(3)}


def test_processes_share_batches_and_layers(tmp_path):
    assert processes.run(_solve_a_share, tmp_path, 3) == [0, 0, 0]
    torch.manual_seed(0)
    alone = Decoder()
    solve_block_by_block(alone, batches(2), LEAST_SQUARES, input_quantizers=_halves())
    states = [torch.load(tmp_path / f"{rank}.pth") for rank in range(3)]
    for name, value in alone.state_dict().items():
        assert torch.equal(states[0][name], states[1][name])
        assert torch.equal(states[0][name], states[2][name])
        torch.testing.assert_close(states[0][name], value, rtol=1e-4, atol=1e-5)


ERRORS = {
    "no batches": (Decoder(), {"batches": []}, "there are no batches to calibrate with"),
    "order": (Decoder(), {"blocks": ["blocks.1", "blocks.0"]}, "name blocks in their order"),
    "unknown": (Decoder(), {"blocks": ["blocks.0", "layers.1"]}, "no module 'layers.1' in Decoder"),
    "inputs": (Decoder(), {"inputs": "compresed"}, "inputs='compresed'"),
    "gap": (Decoder(), {"blocks": ["blocks.0", "blocks.2"]}, "blocks.2 does not take what blocks.0 ret"),
    "nothing left": (Decoder(), {"is_excluded": lambda name: True}, "no layer of blocks.0, .* is left"),
    "no list": (nn.Linear(5, 5), {}, "Linear has no list of blocks"),
    "NaN": (Decoder(), {"batches": [torch.full((1, 6, 5), torch.nan)]}, "the input of blocks.0.fc1"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_bad_input_is_named_and_nothing_changes(case):
    model, arguments, message = ERRORS[case]
    before = copy.deepcopy(model.state_dict())
    arguments = {"batches": batches(), **arguments}
    with pytest.raises(InputError, match=re.compile(message)):
        solve_block_by_block(model, method=CONDITION, **arguments)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_layer_that_its_block_does_not_call_is_named():
    encoder = nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, 16, 0.0) for _ in range(2)))
    with pytest.raises(InputError, match=r"0\.self_attn\.out_proj is not called .*: exclude it"):
        solve_block_by_block(encoder, [torch.randn(3, 2, 8)], CONDITION)
    reports = solve_block_by_block(
        encoder, [torch.randn(3, 2, 8)], CONDITION, is_excluded=lambda n: n.endswith("out_proj")
    )
    assert list(reports) == ["0.linear1", "0.linear2", "1.linear1", "1.linear2"]
