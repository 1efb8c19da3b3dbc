"""Pipelines that choose, and steps composed by hand, on both backends."""

import nncf
import pytest
import torch
from nncf.common.factory import build_graph
from nncf.quantization.algorithms.pipeline import Pipeline

import condiquant_nncf as host
from algorithm_networks import converted, infer, network
from condiquant_nncf.backends.openvino import prepare
from condiquant_plugin import InputError
from condiquant_plugin.calibration import fidelity_in_db
from condiquant_plugin.methods.condiquant.reconditioning import ReconditioningConfig

BACKENDS = ["torch", "openvino"]
IMAGES = torch.rand(9, 3, 16, 16, generator=torch.Generator().manual_seed(0))
NAMES = {"least squares": ReconditioningConfig(), "as trained": None}


def subject(backend):
    model = network()
    return prepare(converted(model)) if backend == "openvino" else host.wrap(model, IMAGES[:1])


def dataset(backend, images):
    return nncf.Dataset([x.numpy() if backend == "openvino" else x for x in images.split(2)])


def output(backend, model, images):
    if backend == "openvino":
        return torch.cat([torch.from_numpy(infer(model, x)) for x in images.split(1)])
    with torch.no_grad():
        return torch.cat([model.model(x) for x in images.split(1)])


def test_what_is_closest_on_every_eighth_image_stays():
    seen, unseen = IMAGES[[0, 1, 2, 3, 4, 5, 6, 8]], IMAGES[7:8]
    pipeline = host.create_condiquant_pipeline(host.QuantizationConfig(scope="all"))
    chosen = pipeline.run(subject("openvino"), dataset("openvino", IMAGES))
    assert list(pipeline.fidelity) == list(NAMES)
    assert pipeline.chosen == max(pipeline.fidelity, key=pipeline.fidelity.__getitem__)
    target = output("openvino", subject("openvino"), unseen)
    for name, settings in NAMES.items():
        config = host.QuantizationConfig(scope="all", recondition=settings)
        alone = host.create_condiquant_pipeline(config)
        model = alone.run(subject("openvino"), dataset("openvino", seen))
        assert alone.chosen == name
        assert not alone.fidelity
        found = output("openvino", model, unseen)
        assert fidelity_in_db(found, target) == pytest.approx(pipeline.fidelity[name], abs=0.2)
        if name == pipeline.chosen:
            error = (found - output("openvino", chosen, unseen)).norm() / (found - target).norm()
            assert error < 0.1
        steps = [type(algorithm).__name__ for step in alone.steps_taken() for algorithm in step]
        assert steps == [
            "InputBounds",
            "InputMoments",
            *(["CondiQuant"] if settings else []),
            "LearnedBoundsQuantization",
        ]
        assert len(alone.reports) == (6 if settings else 0)


def test_of_a_torch_model_the_pipeline_makes_what_quantize_network_does():
    config = host.QuantizationConfig(scope="all")
    expected = host.quantize_network(network(), IMAGES, config)
    pipeline = host.create_condiquant_pipeline(config)
    given = subject("torch")
    before = {name: value.clone() for name, value in given.model.state_dict().items()}
    found = pipeline.run(given, dataset("torch", IMAGES)).model
    assert torch.equal(found(IMAGES), expected.model(IMAGES))
    assert (pipeline.chosen, pipeline.fidelity, pipeline.reports) == (
        expected.calibration.chosen,
        expected.calibration.fidelity,
        expected.reports,
    )
    assert "least squares, in sequence" in pipeline.fidelity
    after = given.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_pipeline_forgets_its_last_run():
    pipeline = host.create_condiquant_pipeline(host.QuantizationConfig(scope="all"))
    pipeline.run(subject("torch"), dataset("torch", IMAGES))
    assert pipeline.steps_taken() == []
    of_torch = {report.name for report in pipeline.reports}
    pipeline.run(subject("openvino"), dataset("openvino", IMAGES))
    assert list(pipeline.fidelity) == list(NAMES)
    assert pipeline.chosen in NAMES
    assert len(pipeline.steps_taken()) == (4 if NAMES[pipeline.chosen] else 3)
    assert {report.name for report in pipeline.reports} in (of_torch, set())


def test_what_a_pipeline_cannot_quantize():
    pipeline = host.create_condiquant_pipeline(host.QuantizationConfig(scope="all"))
    quantized = pipeline.run(subject("torch"), dataset("torch", IMAGES[:2]))
    with pytest.raises(InputError, match="is quantized already"):
        pipeline.run(quantized, dataset("torch", IMAGES[:2]))
    with pytest.raises(InputError, match="calibration_dataset yields nothing"):
        pipeline.run(subject("torch"), nncf.Dataset([]))
    with pytest.raises(InputError, match="transform='rotation' is for torch networks"):
        host.create_condiquant_pipeline(host.QuantizationConfig(transform="rotation"))
    with pytest.raises(InputError, match="softmax_scale='row' is for torch networks"):
        host.create_condiquant_pipeline(host.QuantizationConfig(softmax_scale="row"))


def test_images_in_double_precision_are_taken_as_float():
    config = host.QuantizationConfig(scope="all", recondition=None)
    found = [
        host.create_condiquant_pipeline(config).run(subject("torch"), nncf.Dataset(images)).model
        for images in (IMAGES[:2].split(1), IMAGES[:2].double().split(1))
    ]
    assert torch.equal(*(model(IMAGES[:1]) for model in found))


def test_steps_composed_by_hand_quantize_a_torch_model():
    settings = ReconditioningConfig()
    config = host.QuantizationConfig(scope="all", recondition=settings)
    bounds = host.InputBounds(config, subset_size=9)
    moments = host.InputMoments(config, subset_size=9, input_bounds=bounds)
    solved = host.CondiQuant(config, subset_size=9, input_bounds=bounds, moments=moments)
    placed = host.LearnedBoundsQuantization(config, input_bounds=bounds, moments=moments)
    images = nncf.Dataset(IMAGES.split(1))
    found = Pipeline([[bounds], [moments], [solved], [placed]]).run(subject("torch"), images).model
    expected = host.quantize_network(network(), IMAGES, config).model
    target = network()(IMAGES).detach()
    error = (found(IMAGES) - expected(IMAGES)).norm() / (expected(IMAGES) - target).norm()
    assert error < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_pipeline_computes_what_quantize_network_does(backend):
    settings = host.QuantizationConfig(scope="all", recondition=ReconditioningConfig())
    expected = host.quantize_network(network(), IMAGES, settings).model
    pipeline = host.create_condiquant_pipeline(settings)
    found = pipeline.run(subject(backend), dataset(backend, IMAGES))
    target, theirs = network()(IMAGES).detach(), expected(IMAGES).detach()
    error = (output(backend, found, IMAGES) - theirs).norm() / (theirs - target).norm()
    assert error < (1e-5 if backend == "torch" else 0.2)


def test_nearest_rounding_as_trained_needs_no_moments():
    config = host.QuantizationConfig(scope="all", recondition=None, rounding="nearest")
    pipeline = host.create_condiquant_pipeline(config)
    steps = [type(algorithm).__name__ for step in pipeline.steps_taken() for algorithm in step]
    assert steps == ["InputBounds", "LearnedBoundsQuantization"]


def test_steps_that_come_too_early_say_so():
    config = host.QuantizationConfig(scope="all")
    model = subject("torch")
    moments = host.InputMoments(config)
    with pytest.raises(InputError, match="put InputMoments into an earlier step"):
        _ = moments.moments
    graph = build_graph(model)
    early = host.LearnedBoundsQuantization(config, input_bounds=host.InputBounds(config))
    with pytest.raises(InputError, match="put InputBounds into an earlier step"):
        early.apply(model, graph)
    compressed = ReconditioningConfig(inputs="compressed")
    config = host.QuantizationConfig(scope="all", recondition=compressed)
    with pytest.raises(InputError, match='inputs="compressed" needs a torch model'):
        host.create_condiquant_pipeline(config)
