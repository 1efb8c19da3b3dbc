"""Forks a process for each line of JSON that it reads; torch alone has been imported in them.

``{"present": [hosts], "hidden": [modules], "late": [modules], "folder": PATH}``: modules that cannot be
imported, and those of them that the command line brings. Its answer is an exit status.
"""

import contextlib
import importlib
import importlib.util
import io
import json
import os
import pkgutil
import sys
import traceback
import warnings
from pathlib import Path

import torch
from torch import nn

torch.set_num_threads(1)

HOSTS = {"nncf": "NNCF", "openvino": "OpenVINO", "brevitas": "Brevitas", "basicsr": "BasicSR"}
NEEDED_TOO = {
    "condiquant_nncf.backends.openvino": "openvino",
    "condiquant_nncf.backends.openvino_attention": "openvino",
    "condiquant_nncf.backends.openvino_weights": "openvino",
    "condiquant_nncf.compress_openvino": "openvino",
    "condiquant_plugin.pictures": "cv2",
}
"""What modules need that the extra of their package does not bring."""
COMMANDS = {
    "run dat_light/x4.yml --data .": ("nncf", "openvino", "basicsr"),
    "compare dat_light/x4.yml --data .": ("nncf", "openvino", "basicsr"),
    "train -opt train.yml": ("nncf", "openvino", "basicsr"),
    "test -opt train.yml": ("nncf", "openvino", "basicsr"),
    "export nothing --out out": ("nncf", "openvino", "basicsr"),
    "evaluate nothing.xml --data .": ("nncf", "openvino", "basicsr"),
    "inspect model.pth": ("nncf", "openvino", "basicsr"),
    "inspect model.xml": ("openvino",),
    "benchmark nothing.xml": ("openvino",),
    "upscale nothing.xml low.png high.png": ("openvino",),
}
"""With the hosts that each needs; none has the input that it needs."""


class Hiding:
    """A finder that does not find some modules, as if they were not installed."""

    def __init__(self, finder, hidden):
        self.finder, self.hidden = finder, hidden

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.hidden:
            return None
        return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)


class Upscaler(nn.Module):
    """A network like EDSR, with attention over pixels, for where BasicSR is absent."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.tail, self.shuffle = nn.Conv2d(8, 12, 3, padding=1), nn.PixelShuffle(2)

    def forward(self, x):
        x = self.head(x)
        x = x + self.body(x).relu()
        q, k, v = self.qkv(x.flatten(2).transpose(1, 2)).chunk(3, -1)
        tokens = self.proj((q @ k.transpose(1, 2)).softmax(-1) @ v)
        return self.shuffle(self.tail(x + tokens.transpose(1, 2).unflatten(2, x.shape[2:])))


def network():
    if "basicsr" in sys.modules:
        from networks import build

        return build("edsr").eval()
    return Upscaler().eval()


CROPS = torch.rand(3, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def import_all(package):
    """Import every module of a package that can be; the others say what is missing."""
    module = importlib.import_module(package)
    for found in pkgutil.walk_packages(module.__path__, f"{package}."):
        if found.name == "condiquant_basicsr.data_server":  # changes signals of its process
            continue
        error = missing(importlib.import_module, found.name)
        assert error is None or error.name == NEEDED_TOO.get(found.name), (found.name, error)


def missing(function, *arguments):
    """What a call misses."""
    try:
        function(*arguments)
    except ImportError as error:
        return error
    return None


def check_absent(host):
    package = f"condiquant_{host}"
    folder = importlib.util.find_spec(package).submodule_search_locations[0]
    inner = next(name for _, name, _ in pkgutil.iter_modules([folder]))
    for name in (package, f"{package}.{inner}"):
        assert str(missing(importlib.import_module, name)) == (
            f'{package} needs {HOSTS[host]}: pip install "condiquant-plugin[{host}]"'
        )


def check_close(model, expected):
    with torch.no_grad():
        assert not torch.equal(model(CROPS), expected)
        assert (model(CROPS) - expected).norm() < 0.3 * (expected - expected.mean()).norm()


@torch.no_grad()
def use_nncf(present):
    import nncf

    import condiquant_nncf
    from condiquant_plugin.configuration import QuantizationConfig

    config = condiquant_nncf.QuantizationConfig(weight_bits=6, activation_bits=6, scope="all")
    assert isinstance(config, QuantizationConfig)
    model = condiquant_nncf.quantize_network(network(), CROPS, config).model
    check_close(model, network()(CROPS))
    items = nncf.Dataset(list(CROPS.split(1)))
    same = condiquant_nncf.quantize(network(), items, weight_bits=6, activation_bits=6)
    assert torch.equal(same(CROPS), model(CROPS))
    if "openvino" in present:
        import openvino as ov

        ir = ov.convert_model(network(), example_input=CROPS[:1])
        items = nncf.Dataset([crop[None].numpy() for crop in CROPS])
        ir = condiquant_nncf.quantize(ir, items, weight_bits=6, activation_bits=6)
        output = ov.compile_model(ir, "CPU")([CROPS.numpy()])[0]
        assert (torch.from_numpy(output) - model(CROPS)).norm() < 0.05 * model(CROPS).norm()
    return model


@torch.no_grad()
def use_brevitas(present):
    import condiquant_brevitas

    model = condiquant_brevitas.quantize_sr(
        network(), CROPS, weight_bits=6, activation_bits=6, scope="all"
    )
    check_close(model, network()(CROPS))
    assert str(missing(condiquant_brevitas.export_qonnx, model, CROPS, "model.onnx")) == (
        'the export needs onnx: pip install "condiquant-plugin[brevitas-export]"'
    )
    return model


@torch.no_grad()
def use_basicsr(present):
    import condiquant_basicsr
    from condiquant_basicsr.models.condiquant import CondiQuantModel
    from networks import SECTIONS

    torch.save({"params": network().state_dict()}, "net.pth")
    loaded, scale = condiquant_basicsr.load_network(SECTIONS["edsr"], "net.pth")
    assert scale == 2
    assert torch.equal(condiquant_basicsr.upscale(loaded, CROPS, scale, 1), network()(CROPS))
    condiquant_basicsr.write_image(Path("image.png"), CROPS[0])
    read = condiquant_basicsr.read_image(Path("image.png"))
    assert (read - CROPS[0]).abs().max() < 0.003
    from basicsr.utils.registry import MODEL_REGISTRY

    assert MODEL_REGISTRY.get("CondiQuantModel") is CondiQuantModel


def by_hand():
    """Quantized with the core alone."""
    from torch.nn.utils import parametrize

    from condiquant_plugin import FakeQuantizer
    from condiquant_plugin.uniform.bounds_search import search_bounds

    model = network()
    layer = model.body if isinstance(model, Upscaler) else model.body[0].conv1
    parametrize.register_parametrization(layer, "weight", FakeQuantizer(6, "weight"))
    quantizer = FakeQuantizer(6, "activation")
    layer.add_module("input_quantizer", quantizer)
    layer.register_forward_pre_hook(lambda _, x: (quantizer(x[0]),))
    search_bounds(model, CROPS)
    return model


def use_openvino(present, quantized):
    import condiquant_openvino

    for model in quantized or [by_hand()]:
        ir = condiquant_openvino.convert(model, CROPS[:1])
        condiquant_openvino.check_parity(model, ir, [CROPS[:1]]).raise_if_broken()
    condiquant_openvino.save(ir, "model.xml")
    output = condiquant_openvino.Upscaler("model.xml")(CROPS[0].numpy())
    with torch.no_grad():
        expected = model(CROPS[:1])[0].clamp(0, 1)
    assert abs(torch.as_tensor(output).clamp(0, 1) - expected).mean() < 0.01


def check_hosts(present):
    import_all("condiquant_plugin")
    for host in HOSTS.keys() - present:
        check_absent(host)
    for host in [host for host in HOSTS if host in present]:
        import_all(f"condiquant_{host}")
    if "basicsr" in present:
        use_basicsr(present)
    quantized = []
    if "nncf" in present:
        quantized.append(use_nncf(present))
    if "brevitas" in present:
        quantized.append(use_brevitas(present))
    if "openvino" in present:
        use_openvino(present, quantized)


def called(*arguments):
    from condiquant_recipes import cli

    sys.argv = ["condiquant", *arguments]
    with (
        contextlib.redirect_stdout(io.StringIO()) as output,
        contextlib.redirect_stderr(io.StringIO()) as errors,
    ):
        try:
            cli.main()
        except SystemExit as exit:
            code = exit.code
    return code, output.getvalue(), errors.getvalue()


def check_commands(present):
    code, output, errors = called("--help")
    assert (code, errors) == (0, ""), errors
    assert "benchmark" in output
    for name in ("model.xml", "model.pth", "train.yml"):
        if not Path(name).exists():
            Path(name).write_text("{}")
    if "brevitas" in present:  # no command needs it
        return
    for command, needed in COMMANDS.items():
        absent = set(needed) - present
        if not absent and len(needed) > 1:  # takes seconds
            continue
        code, output, errors = called(*command.split())
        extras = {f'pip install "condiquant-plugin[{host}]"' for host in absent}
        told = errors.startswith("condiquant: error: ") and errors.count("\n") == 1
        if absent:
            assert code == 2, (command, errors)
            assert told, (command, errors)
            assert any(extra in errors for extra in extras), (command, errors)
        else:
            assert "pip install" not in errors, (command, errors)
        assert not Path("out").exists(), command


def check(task):
    hidden, present = set(task["hidden"]), set(task["present"])
    sys.meta_path[:] = [Hiding(finder, hidden) for finder in sys.meta_path]
    warnings.simplefilter("ignore")
    os.chdir(task["folder"])
    check_hosts(present)
    hidden -= set(task["late"])
    check_commands(present)


def main():
    for line in sys.stdin:
        task = json.loads(line)
        child = os.fork()
        if child == 0:
            log = os.open(f"{task['folder']}/log", os.O_CREAT | os.O_WRONLY)
            os.dup2(log, 1)
            os.dup2(log, 2)
            try:
                check(task)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
