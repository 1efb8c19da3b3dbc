"""Items of a dataset: whose steps take them apart, and whose take them as they are."""

import nncf
import openvino as ov
import torch
from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters
from nncf.quantization.algorithms.post_training.pipeline import create_ptq_pipeline

import condiquant_nncf as host
from algorithm_networks import converted, fake_quantizes, network
from condiquant_nncf.backends.openvino import prepare

CONFIG = host.QuantizationConfig(scope="all", recondition=None)
FAST = AdvancedQuantizationParameters(disable_bias_correction=True)


def images(count=5):
    """So large that the last layer has more values than there is room for in a sample."""
    return torch.rand(count, 3, 48, 48, generator=torch.Generator().manual_seed(0))


def dataset(sizes, count=5):
    """Arrays of these numbers of images."""
    return nncf.Dataset([batch.numpy() for batch in images(count).split(sizes)])


def bounds_of(model):
    """Lower and upper bounds of the activations by name."""
    nodes = {n: node for n, node in fake_quantizes(model).items() if n.endswith(".input")}
    return {
        name: [float(node.input_value(i).get_node().data.item()) for i in (1, 2)]
        for name, node in nodes.items()
    }


def test_an_ir_of_a_fixed_batch_size_gets_its_items_as_they_are():
    model = ov.convert_model(network("edsr"), example_input=images(2), input=[2, 3, 48, 48])
    quantized = host.quantize(model, dataset(2, count=4), subset_size=2)
    assert len(bounds_of(quantized)) == 6


def test_nncfs_own_steps_get_the_items_as_they_are():
    def quantized(pipeline, data):
        nodes = fake_quantizes(pipeline.run(prepare(converted(network("edsr"))), data))
        return {
            n: node.input_value(2).get_node().data.ravel().tolist() for n, node in nodes.items()
        }

    steps = {"subset_size": 5, "advanced_parameters": FAST}
    ours = host.create_condiquant_pipeline(CONFIG, then="minmax", **steps)
    alone = quantized(create_ptq_pipeline(**steps), dataset([3, 2]))
    assert quantized(ours, dataset([3, 2])) == alone
    assert quantized(create_ptq_pipeline(**steps), dataset(1)) != alone
