"""What docs/quantize.md says of networks of one's own, done as it says."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import skimage.data
import torch
import yaml

from condiquant_basicsr import build_network, load_network
from condiquant_basicsr.value_range import in_range
from condiquant_openvino import Upscaler, read_metadata
from condiquant_plugin.errors import InputError
from condiquant_recipes import cli, expected_time, plausibility
from condiquant_recipes.checkpoint import recipe_for
from condiquant_recipes.expected_time import within
from condiquant_recipes.float_export import export_float_of
from condiquant_recipes.progress import Progress
from condiquant_recipes.recipe import load_recipe, with_overrides
from condiquant_recipes.recipe_files import find_recipe
from condiquant_recipes.source import load_network as load_network_of
from condiquant_recipes.source import load_source
from networks import build

PAGE = (Path(__file__).parents[2] / "docs" / "quantize.md").read_text()
QUICK = ["datasets.calibration.count=4", "datasets.calibration.held_out=2", "export.tile=24"]
QUICK = [part for key in QUICK for part in ("--set", key)]


def block(language: str, start: str) -> str:
    (found,) = (b for b in re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL) if start in b)
    return found


@pytest.fixture
def own(make_job):
    """The folder of the page: its files, photographs and a checkpoint."""
    job = make_job("compact")
    (job.data / "calibration").rename(job.folder / "photographs")
    (job.folder / "small_net.py").write_text(block("python", "class SmallNet"))
    (job.folder / "small_net.yml").write_text(block("yaml", "small_net.py:SmallNet"))
    section = yaml.safe_load((job.folder / "small_net.yml").read_text())["network_g"]
    torch.save(build_network(section).state_dict(), job.folder / "small_net.pth")
    return job.folder


def test_the_commands_of_the_page(own, condiquant, monkeypatch, capsys):
    _, *quantize = shlex.split(block("sh", "--network small_net.py").replace("\\\n", ""))
    monkeypatch.setattr(sys, "argv", ["condiquant", *quantize, *QUICK, "--float"])
    with pytest.raises(SystemExit):
        cli.main()
    shown = capsys.readouterr()
    assert f"note: running the code of {own / 'small_net.py'}" in shown.err
    assert len(re.findall("running the code", shown.err)) == 1
    assert re.search(r"note: this is expected to take \d+ to \d+ (s|min)\n", shown.err)
    assert "times as fast as the float network" in shown.out.splitlines()[-1]
    metadata = read_metadata(own / "out" / "small_net" / "model.xml")
    assert (metadata["scale"], metadata["scope"], metadata["weight_bits"]) == (2, "all", 8)
    image = torch.rand(3, 20, 24)
    irs = [Upscaler(own / "out" / "small_net" / f"{name}.xml") for name in ("float", "model")]
    as_float, quantized = (torch.as_tensor(ir(image.numpy())) for ir in irs)
    net, _ = load_network(
        {"type": f"{own}/small_net.py:SmallNet", "scale": 2, "features": 16}, "small_net.pth"
    )
    with torch.no_grad():
        torch.testing.assert_close(as_float, net(image[None])[0], atol=1e-4, rtol=0)
    assert 0 < (quantized - as_float).abs().mean() < 0.02

    _, *run = shlex.split(block("sh", "condiquant run small_net.yml"))
    printed = condiquant(*run, *QUICK, "-q")
    assert "against the float output" not in printed
    folder = own / "out" / "small_net_w8a8"
    assert read_metadata(folder / "model.xml")["network"] == "small_net"
    before = json.loads((folder / "stages" / "identity.json").read_text())
    (own / "small_net.py").write_text(block("python", "class SmallNet") + "# changed\n")
    assert "other code" in condiquant(*run, *QUICK, "-q", code=2)
    assert json.loads((folder / "stages" / "identity.json").read_text()) == before


def test_a_recipe_finds_the_file_beside_it(own, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    recipe = load_recipe(own / "small_net.yml", [f"path.pretrain_network_g={own}/small_net.pth"])
    assert recipe.network_g["type"] == f"{own}/small_net.py:SmallNet"
    assert type(load_network_of(recipe)).__name__ == "SmallNet"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--network", "small_net.py:SmallNet"], "it takes blocks, features, scale"),
        (
            ["--network", "small_net.py:SmallNet", "--set", "network_g.scal=2"],
            "has no argument 'scal'",
        ),
        (["--network", "small_net.py"], "write FILE.py:Class"),
        (["--network", "none.py:SmallNet"], "no such file: none.py"),
        ([], "FILE.py:Class (condiquant quantize: --network FILE.py:Class)"),
        (["--minutes", "3", "--iterations", "4"], "leave out --iterations, or --minutes"),
        (["--minutes", "3", "--target", "size=0.3"], "--minutes knows nothing of the search"),
    ],
)
def test_what_cannot_be(own, condiquant, arguments, named):
    given = ["quantize", "small_net.pth", "--images", "photographs", *arguments, "-q"]
    assert named in condiquant(*given, code=2)
    assert not (own / "out").exists()


def test_a_range_is_in_the_ir_and_crops_stay_in_0_to_1(own):
    section = {"type": "small_net.py:SmallNet", "scale": 2, "features": 16}
    keys = [
        "network_g.scale=2",
        "network_g.features=16",
        "img_range=255",
        "mean=[0.4]",
        "export.tile=24",
    ]
    recipe = recipe_for(
        own / "small_net.pth", own / "photographs", "all", keys, "small_net.py:SmallNet"
    )
    bare, _ = load_network(section, "small_net.pth")
    image = torch.rand(1, 3, 20, 24)
    with torch.no_grad():
        expected = bare((image - 0.4) * 255) / 255 + 0.4
        torch.testing.assert_close(load_network_of(recipe)(image), expected)
    export_float_of(recipe, own, Progress())
    found = torch.as_tensor(Upscaler(own / "float.xml")(image[0].numpy()))
    torch.testing.assert_close(found[None], expected, atol=1e-4, rtol=0)
    crops = load_source(with_overrides(recipe, ["datasets.calibration.count=4"]), Path(), []).crops
    assert 0.5 < crops.max() <= 1
    with pytest.raises(InputError, match=r"mean=\[1\.0, 2\.0\]: give three values"):
        with_overrides(recipe, ["mean=[1.0, 2.0]"])


@pytest.fixture(scope="module")
def realesrgan():
    recipe = find_recipe("realesrgan/x4.yml")
    return recipe, load_network_of(recipe)


def test_weights_of_nothing_are_seen(photographs, own):
    recipe = load_recipe(own / "small_net.yml")
    found = plausibility.range_warning(build("edsr"), recipe, photographs)
    assert "enlargement: check that the weights are this network's, and the range" in found


class ForOtherValues(torch.nn.Module):
    """A network as if it had been trained on 0 to ``white``."""

    def __init__(self, network, white):
        super().__init__()
        self.body, self.white = network, white

    def forward(self, image):
        return self.body(image / self.white) * self.white


@pytest.mark.parametrize(
    ("white", "img_range", "advice"),
    [
        (1, 1.0, None),
        (255, 255.0, None),
        (255, 1.0, r"is 9\.\d dB from .*, and 33\.\d dB .*--set img_range=255$"),
        (1, 255.0, r"is 16\.\d dB from .*, and 33\.\d dB .*--set img_range=1$"),
    ],
)
def test_a_wrong_range_is_seen_on_photographs(realesrgan, photographs, white, img_range, advice):
    recipe, network = realesrgan
    recipe = with_overrides(recipe, [f"img_range={img_range}"])
    around = in_range(ForOtherValues(network, white), img_range, None)
    found = plausibility.range_warning(around, recipe, photographs)
    assert (found is None) if advice is None else re.search(advice, str(found)), found


@pytest.fixture(scope="module")
def photographs():
    image = torch.from_numpy(skimage.data.chelsea().copy()).permute(2, 0, 1)[None] / 255
    small = torch.nn.functional.interpolate(
        image, scale_factor=0.25, mode="bicubic", antialias=True
    )
    return torch.cat([small[..., 8:40, 8:40], small[..., 30:62, 60:92]]).clamp(0, 1)


def test_minutes_become_iterations_that_a_resumed_run_keeps(make_job, condiquant, monkeypatch):
    timed, job = [], make_job("compact")

    def passes(network, crop):  # once: what else the machine does is in the time
        timed.extend([] if timed else real(network, crop))
        return timed

    real = expected_time._passes
    monkeypatch.setattr(expected_time, "_passes", passes)
    given = ["quantize", "net.pth", "--images", job.data / "calibration", *QUICK, "-q"]
    assert re.search(
        "without training it is expected to take", condiquant(*given, "--minutes", 0.01, code=2)
    )
    assert not (job.folder / "out").exists()
    recipe = recipe_for(job.folder / "net.pth", job.data / "calibration", overrides=[])
    counts = [
        within(recipe, minutes, None, Progress()).condiquant.distillation.iterations
        for minutes in (10, 40)
    ]
    assert 3 * counts[0] < counts[1] < 8 * counts[0]
    begun = job.folder / "begun"
    begun.mkdir()
    (begun / "recipe.yml").write_text(
        with_overrides(recipe, ["condiquant.distillation.iterations=7"]).to_yaml()
    )
    assert within(recipe, 10, begun, Progress()).condiquant.distillation.iterations == 7
