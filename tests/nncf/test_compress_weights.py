import inspect
import re
from functools import cache

import nncf
import numpy as np
import openvino as ov
import pytest
import torch
from torch import nn

import condiquant_nncf as host
from condiquant_plugin import InputError
from condiquant_plugin.compression import MODES, CompressionConfig, compressed_weights
from condiquant_plugin.layerwise.moments import LayerGeometry, moments_of
from condiquant_plugin.layerwise.problem import LayerProblem
from condiquant_plugin.methods.arb.form import BinaryWeight
from language_networks import Logits, llama, tokens

F32 = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def dataset(count=3):
    return nncf.Dataset([{"input_ids": ids} for ids in tokens(count)])


def ov_dataset(count=3):
    return nncf.Dataset([{"input_ids": ids.numpy()} for ids in tokens(count)])


@cache
def converted():
    return ov.convert_model(Logits(llama()), example_input=tokens(1)[0])


def logits(model):
    with torch.no_grad():
        return torch.cat([model(ids).logits for ids in tokens(2, seed=5)])


def infer(model):
    compiled = ov.compile_model(model, "CPU", F32)
    return np.concatenate([compiled(ids.numpy())[0] for ids in tokens(2, seed=5)])


def types_of_constants(model):
    nodes = [n for n in model.get_ordered_ops() if n.get_type_name() == "Constant"]
    return {n.get_element_type().get_type_name() for n in nodes if len(n.get_output_shape(0)) > 1}


def test_the_signature_begins_as_nncfs():
    theirs = inspect.signature(nncf.compress_weights).parameters
    ours = inspect.signature(host.compress_weights).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    for name, parameter in theirs.items():
        assert ours[name].default == parameter.default, name


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_compresses_the_blocks_of_a_torch_model(mode):
    model, before = llama(), llama().state_dict()
    finished = []
    found = host.compress_weights(
        model, mode=mode, dataset=dataset(), group_size=16, progress=finished.append
    )
    assert found is model
    assert finished == [f"model.layers.{n}" for n in range(3)]
    forms = compressed_weights(model)
    assert len(forms) == 3 * len(LINEARS)
    for name, weight in model.state_dict().items():
        if name.rpartition(".weight")[0].rpartition(".")[2] in LINEARS:
            form = forms[name.removesuffix(".weight")]
            assert torch.equal(weight, form.dense())
            assert not torch.equal(weight, before[name])
        else:
            assert torch.equal(weight, before[name])
    assert torch.isfinite(logits(model)).all()


def test_modes_have_an_order_of_their_output_errors():
    exact = logits(llama())
    common = {"dataset": dataset(8), "group_size": 16, "inputs": "compressed"}

    def error(**arguments):
        model = host.compress_weights(llama(), **common, **arguments)
        return float((logits(model) - exact).square().mean())

    rounding = error(mode="rounding")
    assert error(mode="arb_rc", bitmaps=True) < 0.6 * rounding
    assert error(mode="pbs2p") < rounding
    assert error(mode="arb_rc", residual_rank=8) < error(mode="arb_rc")
    assert error(mode="adasvd", ratio=0.9) < error(mode="adasvd", ratio=0.4)
    assert error(mode="gptq", bits=4) < error(mode="gptq", bits=3) < error(mode="gptq", bits=2)
    assert error(mode="magnitude", pattern=(6, 8)) < error(mode="magnitude", pattern=(4, 8))


def test_the_budget_of_ranks_is_met():
    model = host.compress_weights(llama(), mode="ADASVD", ratio=0.6, dataset=dataset())
    forms = compressed_weights(model)
    kept = sum(sum(t.numel() for t in form.tensors().values()) for form in forms.values())
    total = sum(form.parameters for form in forms.values())
    assert 0.6 * total - max(sum(f.layout.shape) for f in forms.values()) < kept <= 0.6 * total
    ranks = {form.rank for form in forms.values() if hasattr(form, "rank")}
    assert len(ranks) > 2  # adaptive


def test_ignored_scope_is_matched_against_nncfs_names_and_leaves_no_trace():
    model = llama()
    # NNCF's names leave out the place in a ModuleList and count uses instead.
    scope = nncf.IgnoredScope(patterns=[r".*_proj/linear/1", r".*/down_proj/.*"])
    host.compress_weights(
        model, mode="arb_rc", group_size=16, dataset=dataset(), ignored_scope=scope
    )
    names = set(compressed_weights(model))
    assert names == {
        f"model.layers.{block}.{'self_attn' if name in LINEARS[:4] else 'mlp'}.{name}"
        for block in (0, 2)
        for name in LINEARS
        if name != "down_proj"
    }
    assert not any("nncf" in name for name, _ in model.named_modules())
    assert "forward" not in vars(model)


def test_nncfs_own_modes_are_nncfs():
    model = converted().clone()
    ours = host.compress_weights(
        model.clone(), mode=nncf.CompressWeightsMode.INT4_SYM, group_size=16, ratio=1.0
    )
    theirs = nncf.compress_weights(
        model.clone(), mode=nncf.CompressWeightsMode.INT4_SYM, group_size=16, ratio=1.0
    )
    assert types_of_constants(ours) == types_of_constants(theirs) >= {"i4"}
    assert np.array_equal(infer(ours), infer(theirs))
    assert "u8" in types_of_constants(host.compress_weights(model.clone()))


@pytest.mark.parametrize(
    ("mode", "kind", "arguments"),
    [
        ("arb_rc", "u2", {}),
        ("pbs2p", "u2", {}),
        ("pbs2p", "u2", {"group_size": -1}),
        ("pbs2p", "u2", {"residual_rank": 4}),
        ("adasvd", "f16", {"ratio": 0.6}),
        ("arb", "f16", {"bitmaps": True}),
        ("gptq", "u2", {"bits": 2}),
        ("gptq", "u4", {"bits": 3, "residual_rank": 4}),
        ("gptq", "u4", {"bits": 4, "group_size": -1}),
        ("magnitude", "f16", {"pattern": (5, 8)}),
    ],
)
def test_an_ov_model_computes_what_the_torch_model_does(mode, kind, arguments):
    arguments = {"group_size": 16, "inputs": "original", "adaptive": False} | arguments
    torch_model = host.compress_weights(llama(), mode=mode, dataset=dataset(), **arguments)
    ir = host.compress_weights(converted(), mode=mode, dataset=ov_dataset(), **arguments)
    assert kind in types_of_constants(ir)
    expected = logits(torch_model).numpy()
    error = np.abs(infer(ir) - expected).mean() / np.abs(expected).mean()
    change = np.abs(infer(converted()) - expected).mean() / np.abs(expected).mean()
    assert error < 0.03 < change  # moments of two frameworks break ties in two ways


def test_forms_of_a_torch_model_go_into_its_ir_layer_by_layer():
    model = host.compress_weights(llama(), mode="pbs2p", group_size=16, dataset=dataset())
    ir = converted().clone()
    stored = host.write_compressed(ir, compressed_weights(model))
    assert set(stored.values()) == {"u2"}
    assert len(stored) == 21
    nodes = {n.get_friendly_name(): n for n in ir.get_ordered_ops()}
    products = [
        n
        for name, n in nodes.items()
        if name.startswith("__module.model.layers") and n.get_type_name() == "MatMul"
    ]
    checked = 0
    for node in products:
        name = node.get_friendly_name().removeprefix("__module.").partition("/")[0]
        form = compressed_weights(model).get(name)
        if form is None:
            continue
        parameter = ov.opset13.parameter([-1, form.layout.shape[1]], ov.Type.f32)
        weight = ov.opset13.matmul(parameter, node.input_value(1), False, True)
        compiled = ov.compile_model(ov.Model([weight], [parameter]), "CPU", F32)
        x = torch.randn(5, form.layout.shape[1])
        y = x @ form.dense().mT
        assert np.abs(compiled(x.numpy())[0] - y.numpy()).max() < 2e-3 * float(y.abs().max())
        checked += 1
    assert checked == 21
    expected = logits(model).numpy()
    assert np.abs(infer(ir) - expected).max() < 5e-3 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("mode", "bits"),
    [("arb_rc", None), ("pbs2p", None), *(("gptq", bits) for bits in (2, 3, 4, 8))],
)
@pytest.mark.parametrize("dims", [[-1, 64], [-1, -1, 64]], ids=["matrices", "batches"])
def test_kernels_keep_the_codes_packed(mode, bits, dims):
    method = CompressionConfig(mode, group_size=16, bits=bits).method()
    layer = LayerProblem(
        "", torch.randn(64, 64), None, moments_of(torch.randn(99, 64), LayerGeometry())
    )
    (solution,) = method.solve([layer])
    x = ov.opset13.parameter(dims, ov.Type.f32)
    product = ov.opset13.matmul(x, ov.opset13.constant(layer.weight.numpy()), False, True)
    product.set_friendly_name("__module.layer/MatMul")
    model = ov.Model([product], [x])
    assert host.packed_products(model) == 0
    host.write_compressed(model, {"layer": solution.form})
    assert host.packed_products(model) == 1
    values = torch.randn(1, 5, 64) if len(dims) == 3 else torch.randn(5, 64)
    found = ov.compile_model(model, "CPU", F32)(values.numpy())[0]
    expected = (values @ solution.weight.mT).numpy()
    assert np.abs(found - expected).max() < 2e-3 * np.abs(expected).max()


@pytest.mark.parametrize("group_size", [16, -1])
@pytest.mark.parametrize("residual_rank", [0, 4])
def test_signs_of_one_bit_on_disk_are_two_in_the_kernel(tmp_path, group_size, residual_rank):
    settings = {"group_size": group_size, "residual_rank": residual_rank}
    model = host.compress_weights(llama(), mode="arb_rc", dataset=dataset(), **settings)
    forms = compressed_weights(model)
    sizes, results = {}, {}
    for signs in ("u2", "u1"):
        ir, file = converted().clone(), tmp_path / f"{signs}.xml"
        stored = host.write_compressed(ir, forms, signs=signs)
        assert {kind.partition("+")[0] for kind in stored.values()} == {signs}
        ov.save_model(ir, file, compress_to_fp16=True)
        assert host.packed_products(file) == len(forms)
        sizes[signs] = file.with_suffix(".bin").stat().st_size
        results[signs] = infer(ov.Core().read_model(file))
    weights = sum(form.parameters for form in forms.values())
    assert sizes["u2"] - sizes["u1"] >= weights / 8
    assert np.abs(results["u1"] - results["u2"]).max() < 1e-5 * np.abs(results["u2"]).max()
    assert max(host.product_errors(forms, signs="u1").values()) < 2e-3


def test_pruned_signs_have_no_form_of_one_bit():
    model = host.compress_weights(llama(1), mode="pbs2p", group_size=16, dataset=dataset())
    ir = ov.convert_model(Logits(llama(1)), example_input=tokens(1)[0])
    assert set(host.write_compressed(ir, compressed_weights(model), signs="u1").values()) == {"u2"}
    with pytest.raises(InputError, match="signs='i1' is not known: use 'u2' or 'u1'"):
        host.write_compressed(ir, {}, signs="i1")


def test_codes_are_packed_four_to_a_byte(tmp_path):
    model = host.compress_weights(llama(), mode="arb_rc", group_size=16, dataset=dataset())
    forms = compressed_weights(model)
    ir = converted().clone()
    host.write_compressed(ir, forms)
    ov.save_model(ir, tmp_path / "model.xml", compress_to_fp16=True)
    weights = sum(form.parameters for form in forms.values())
    scales = sum(2 * f.row_scales.numel() + f.row_scales.numel() for f in forms.values())
    columns = sum(4 * f.column_scales.numel() for f in forms.values())
    embedding = 2 * model.lm_head.weight.numel()
    size = (tmp_path / "model.bin").stat().st_size
    assert size < weights / 4 + scales + columns + embedding + 4000
    again = ov.Core().read_model(tmp_path / "model.xml")
    assert np.allclose(infer(again), infer(ir), atol=2e-2)


class NoBlocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(96, 8)

    def forward(self, input_ids):
        return self.embedding(input_ids)


def with_nan():
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    return model


@pytest.mark.parametrize(
    ("model", "arguments", "words"),
    [
        (llama, {"mode": "int5"}, "mode='int5' is not known: use rounding, billm, arb"),
        (llama, {"mode": "arb_rc", "dataset": None}, "mode=arb_rc needs a dataset"),
        (llama, {"mode": "arb_rc", "dataset": nncf.Dataset([])}, "the dataset is empty"),
        (llama, {"mode": "adasvd", "ratio": 1.5}, "ratio=1.5: use more than 0 and at most 1"),
        (llama, {"mode": "arb_rc", "ratio": 0.5}, "ratio=0.5: arb_rc compresses all layers"),
        (llama, {"mode": "arb_rc", "awq": True}, "awq=True is for NNCF's modes"),
        (
            llama,
            {"mode": "arb_rc", "pattern": (2, 4)},
            "pattern=(2, 4): only pbs2p and magnitude prune",
        ),
        (llama, {"mode": "gptq", "bits": 9}, "bits=9 is not supported: use an integer from 2 to 8"),
        (llama, {"mode": "pbs2p", "bits": 2}, "bits=2: only gptq has a choice, leave it out"),
        (llama, {"mode": "gptq", "bitmaps": True}, "bitmaps=True: gptq has none, leave it out"),
        (llama, {"mode": "gptq", "rounds": 3}, "rounds=3: gptq has none, leave it out"),
        (
            llama,
            {"mode": "magnitude", "residual_rank": 3},
            "residual_rank=3: magnitude only prunes",
        ),
        (
            llama,
            {"mode": "magnitude", "pattern": (3, 7)},
            "pattern=3:7 does not divide the 32 inputs",
        ),
        (llama, {"mode": "pbs2p", "pattern": (8, 8)}, "pattern=8:8 keeps 8 of every 8"),
        (
            llama,
            {"mode": "arb_rc", "group_size": 24},
            "group_size=24 does not divide the 32 inputs",
        ),
        (llama, {"mode": "adasvd", "residual_rank": 2}, "residual_rank=2: adasvd is a low rank"),
        (llama, {"mode": "arb_rc", "subset_size": 0}, "subset_size=0: use at least 1"),
        (llama, {"mode": "int8_asym", "bitmaps": True}, "bitmaps=True is not for NNCF's mode"),
        (NoBlocks, {"mode": "arb_rc"}, "NoBlocks has no list of blocks with linear layers"),
        (with_nan, {"mode": "arb_rc", "group_size": 16}, "NaN or Inf in"),
        (
            llama,
            {"mode": "arb_rc", "ignored_scope": nncf.IgnoredScope(names=["nothing"])},
            "ignored_scope:",
        ),
        (
            converted,
            {"mode": "adasvd", "adaptive": True},
            "adaptive=True needs the blocks of a torch",
        ),
        (
            converted,
            {"mode": "arb_rc", "inputs": "compressed"},
            "inputs='compressed' needs the blocks of a torch model",
        ),
    ],
)
def test_bad_input_is_named_in_one_line(model, arguments, words):
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        host.compress_weights(model(), **{"dataset": dataset()} | arguments)
    assert "\n" not in str(caught.value)


def test_a_form_of_one_bit_keeps_its_place_in_a_copy():
    model = host.compress_weights(llama(1), mode="arb_rc", group_size=16, dataset=dataset())
    form = next(iter(compressed_weights(model).values()))
    assert isinstance(form, BinaryWeight)
    restored = llama(1)
    restored.load_state_dict(model.state_dict())
    assert torch.equal(logits(restored), logits(model))
