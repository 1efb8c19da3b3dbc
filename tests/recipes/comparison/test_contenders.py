"""The methods of a comparison, and the parts that measure them."""

import re
from collections import Counter

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import pytest
import torch
from torch import nn

from condiquant_basicsr import Pair, write_image
from condiquant_openvino import save
from condiquant_plugin import fake_quantizers
from condiquant_plugin.errors import InputError
from condiquant_recipes.comparison.contenders import all_contenders, choose
from condiquant_recipes.comparison.crops import output_file, worst_places
from condiquant_recipes.comparison.job import Job
from condiquant_recipes.comparison.measuring import measured
from condiquant_recipes.comparison.scoring import measure_latency, pareto, size
from condiquant_recipes.float_export import float_ir
from condiquant_recipes.progress import Progress
from condiquant_recipes.recipe import load_recipe
from condiquant_recipes.source import load_source


@pytest.fixture
def calibrate(make_job, monkeypatch):
    """``calibrate(network, id, *overrides)``: the job and what the method makes of it."""
    monkeypatch.setenv("CI", "true")
    jobs = {}

    def go(name, method_id, *overrides):
        if name not in jobs:
            job = make_job(name)
            iterations = "condiquant.distillation.iterations=24"
            recipe = load_recipe(job.write(), [iterations, *overrides])
            source = load_source(recipe, job.data, ["Tiny"])
            jobs[name] = Job(
                recipe, source, float_ir(source.network, recipe, source.multiple), Progress()
            )
        (method,) = (m for m in all_contenders(jobs[name].recipe) if m.id == method_id)
        return jobs[name], method.calibrate(jobs[name])

    return go


def levels(model: ov.Model) -> set[int]:
    return {
        node.get_attributes()["levels"]
        for node in model.get_ops()
        if node.get_type_name() == "FakeQuantize"
    }


def element_types(model: ov.Model) -> Counter:
    return Counter(
        node.get_element_type().get_type_name()
        for node in model.get_ops()
        if node.get_type_name() == "Constant"
    )


def test_ids_are_distinct_and_the_recipes_own_bits_are_among_them(make_job):
    recipe = load_recipe(make_job("compact").write(), ["condiquant.activation_bits=8"])
    ids = [method.id for method in all_contenders(recipe)]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name) for name in ids)
    assert {"condiquant-w4a8", "condiquant-w4a4", "condiquant-w2a2"} <= set(ids)
    assert [m.id for m in choose(all_contenders(recipe), ["condiquant-w4a8"])] == [
        "float",
        "condiquant-w4a8",
    ]
    with pytest.raises(InputError, match="no method 'magic'"):
        choose(all_contenders(recipe), ["magic"])


@pytest.mark.parametrize("bits", [4, 2])
def test_minmax_is_forced_to_low_bits(calibrate, bits):
    _, calibrated = calibrate("compact", f"nncf-minmax-w{bits}a{bits}")
    assert levels(calibrated.model) == {2**bits, 256}  # of activations in scope and others
    types = element_types(calibrated.model)
    assert types["i4"] == 3  # weights, as OpenVINO packs them
    assert types["i8"] == 2  # of the first and the last layer


@pytest.mark.parametrize("method", ["nncf-minmax-w4a4", "nncf-weights-int8-asym"])
def test_ignored_layers_stay_float_in_nncfs_methods(calibrate, method):
    ignoring = "condiquant.ignored_scope.names=[/conv2d/1]"  # as torch has it
    _, calibrated = calibrate("compact", method, ignoring)
    types = element_types(calibrated.model)
    if method == "nncf-minmax-w4a4":
        assert (types["i4"], types["i8"]) == (2, 2)
    else:
        assert types["u8"] == 8  # weights and zero points of five layers but one


def test_a_quantizer_shared_with_a_residual_is_noted(calibrate):
    _, calibrated = calibrate("edsr", "nncf-minmax-w4a4")
    assert "one quantizer for a layer in scope and other operators" in calibrated.notes[1]


def test_the_float_graph_simplified_as_our_exporter_does(calibrate):
    job, calibrated = calibrate("edsr", "float-simplified")  # which compares the values itself
    kinds = {node.get_type_name() for node in calibrated.model.get_ops()}
    assert "DepthToSpace" in kinds
    assert "DepthToSpace" not in {node.get_type_name() for node in job.float_ir.get_ops()}
    assert not levels(calibrated.model)
    image = torch.rand(1, 3, 24, 40)
    with torch.no_grad():
        expected = job.source.network(image)
    result = ov.compile_model(calibrated.model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(image)
    assert torch.allclose(torch.from_numpy(result[0]), expected, atol=1e-3)


def test_an_ir_that_cannot_be_measured_leaves_the_others_alone(tmp_path):
    image = torch.rand(1, 3, 8, 8)
    for name in ("float", "broken", "fine"):
        port = ops.parameter([1, 3, -1, -1], np.float32)
        save(ov.Model([ops.relu(port)], [port]), tmp_path / name / "model.xml")
    (tmp_path / "broken/model.bin").unlink()
    rows = [{"id": name, "reason": None} for name in ("float", "broken", "fine")]
    folders = {row["id"]: tmp_path / row["id"] for row in rows}
    measure_latency(rows, folders, image)
    assert [bool(row["reason"]) for row in rows] == [False, True, False]
    assert "model.bin does not exist" in rows[1]["reason"]
    assert [row["latency_ratio"] is None for row in rows] == [False, True, False]
    (tmp_path / "float/model.bin").unlink()
    with pytest.raises(InputError, match=r"the float network: .*model\.bin does not exist"):
        measure_latency([rows[0], rows[2]], folders, image)


@pytest.mark.parametrize(
    "method",
    [
        "nncf-int8-mixed-full-bias",
        "nncf-int8-accuracy-control",
        "nncf-int8-our-graph",
        "neural-compressor-int8",
    ],
)
def test_int8_on_a_convolutional_network(calibrate, method):
    job, calibrated = calibrate("compact", method)
    assert levels(calibrated.model) <= {255, 256}
    assert element_types(calibrated.model)["i8"]
    assert not levels(job.float_ir)


def test_condiquant_changes_the_weights_before_int8(calibrate):
    _, plain = calibrate("compact", "nncf-int8-performance")
    _, ours = calibrate("compact", "condiquant-int8")
    assert len(ours.layers) == 3
    assert levels(ours.model) <= {255, 256}
    image = np.random.default_rng(0).random((1, 3, 16, 16), dtype=np.float32)
    results = [ov.compile_model(c.model, "CPU")(image)[0] for c in (plain, ours)]
    assert np.abs(results[0] - results[1]).max() > 0


def test_weights_of_matrix_products_are_compressed(calibrate):
    _, calibrated = calibrate("swinir", "nncf-weights-int4-asym-awq")
    assert element_types(calibrated.model)["u4"]
    assert calibrated.notes == []


def test_four_bits_that_no_convolution_gets_are_noted(calibrate):
    _, calibrated = calibrate("compact", "nncf-weights-int4-sym")
    assert element_types(calibrated.model).keys().isdisjoint({"i4", "u4", "nf4"})
    assert "8 bits" in calibrated.notes[0]
    assert calibrated.weight_bits == 8
    with pytest.raises(InputError, match="does not apply: gptq"):
        calibrate("compact", "nncf-weights-int4-sym-gptq")


@pytest.mark.parametrize(
    ("method", "reconditions", "trains"),
    [
        ("2dquant-dobi-w3a3", False, ""),
        ("2dquant-w3a3", False, "bounds"),
        ("condiquant-no-dqc-w3a3", True, ""),
        ("condiquant-w3a3", True, "bounds and weights"),
    ],
)
def test_low_bit_methods_differ_in_their_stages(calibrate, method, reconditions, trains):
    job, calibrated = calibrate("compact", method)
    model = calibrated.model
    assert [note.partition(" ")[0] for note in calibrated.notes] == ["2DQuant"] * (not reconditions)
    assert isinstance(model, nn.Module)
    assert {q.bits for q in fake_quantizers(model).values()} == {3}
    own = dict(job.source.network.named_parameters())
    names = [f"{report.name}.weight" for report in calibrated.layers]
    changed = [not torch.equal(model.get_parameter(name), own[name]) for name in names]
    assert changed == [reconditions or "weights" in trains] * len(names)
    undistilled = "condiquant-no-dqc-w3a3" if reconditions else "2dquant-dobi-w3a3"
    _, before = calibrate("compact", undistilled)
    quantizers = [fake_quantizers(c.model).values() for c in (before, calibrated)]
    same = all(
        torch.equal(first.lower, second.lower) and torch.equal(first.upper, second.upper)
        for first, second in zip(*quantizers, strict=True)
    )
    assert same == (not trains)


def test_a_network_that_is_right_at_one_size_only_is_converted_static(make_job, monkeypatch):
    monkeypatch.setenv("CI", "true")
    job = make_job("compact")
    recipe = load_recipe(job.write(), ["export.static=null"])
    source = load_source(recipe, job.data, ["Tiny"])
    assert float_ir(source.network, recipe, source.multiple).is_dynamic()

    class OneSize(nn.Module):
        def forward(self, x):
            return nn.functional.interpolate(x, size=(2 * int(x.shape[2]), 2 * int(x.shape[3])))

    model = float_ir(OneSize(), recipe, source.multiple)
    assert list(model.input().get_shape()) == [1, 3, 32, 32]
    with pytest.raises(InputError, match=r"set export\.static=true"):
        float_ir(OneSize(), load_recipe(job.write(), ["export.static=false"]), source.multiple)


def test_memory_and_time_are_of_the_function_alone():
    ballast = torch.ones(50_000_000)
    found = measured(lambda: float(torch.ones(25_000_000).sum()))
    assert found.result == 25_000_000
    assert 80e6 < found.peak_memory_bytes < 160e6
    assert 0 < found.seconds < 10
    assert measured(lambda: None).peak_memory_bytes < 20e6
    assert ballast.sum()


def test_worst_places_come_first_and_do_not_overlap(tmp_path):
    first, second = torch.zeros(3, 250, 400), torch.zeros(3, 250, 400)
    first[:, 20:60, 30:70] = 0.5
    first[:, 200:240, 330:390] = 1
    first[:, 210:220, 100:110] = 0.3
    for folder, image in (("subject", first), ("float", second)):
        file = output_file(tmp_path / folder, "Set", "a")
        file.parent.mkdir(parents=True)
        write_image(file, image)
    pairs = {"Set": [Pair("a", None, tmp_path / "a.png")]}
    places = worst_places(tmp_path / "subject", tmp_path / "float", pairs)
    assert len(places) == 2  # of one image
    for place, (x, y) in zip(places, ((330, 200), (30, 20)), strict=True):
        assert place.x <= x < place.x + place.width
        assert place.y <= y < place.y + place.height
        assert place.cut(first).shape == (3, 96, 96)


def test_pareto_front():
    rows = [
        {"id": name, "psnr": {"a": psnr}, "bin_bytes": count, "xml_bytes": 1}
        for name, psnr, count in (
            ("identical", None, 100),
            ("good", 40.0, 50),
            ("larger", 39.0, 60),
            ("worse", 38.0, 50),
            ("small", 30.0, 10),
            ("as good", 40.0, 50),
        )
    ]
    front = [row["id"] for row in pareto(rows, size)]
    assert front == ["identical", "good", "small", "as good"]
