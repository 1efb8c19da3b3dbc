"""BasicSR's training YAMLs: what is read, refused, and what recipe they amount to."""

import os
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from condiquant_plugin.errors import InputError
from condiquant_recipes.recipe_files import find_recipe
from condiquant_recipes.training.options import (
    check_training,
    load_options,
    recipe_from_options,
    training_section,
)

TEXT = """
name: tiny_x2
model_type: CondiQuantModel
scale: 2
num_gpu: auto
manual_seed: 3
datasets:
  train:
    name: Photographs
    type: PairedImageDataset
    dataroot_gt: hr
    dataroot_lq: lr
    filename_tmpl: '{}'
    io_backend:
      type: disk
    gt_size: 32
    use_hflip: true
    use_rot: true
    batch_size_per_gpu: 4
    prefetch_mode: ~
  val:
    name: Set5
    type: PairedImageDataset
    dataroot_gt: hr
    dataroot_lq: lr
    io_backend:
      type: disk
  val_2:
    name: Set14
    type: PairedImageDataset
    dataroot_gt: hr
    dataroot_lq: lr
    io_backend:
      type: disk
network_g:
  type: SRVGGNetCompact
  num_feat: 16
  upscale: 2
path:
  pretrain_network_g: net.pth
  param_key_g: params_ema
  resume_state: ~
train:
  optim_g:
    type: Adam
    lr: !!float 2e-4
  total_iter: !!float 5e3
val:
  val_freq: !!float 1e3
condiquant:
  weight_bits: 3
  scope: all
  calibration_images: 64
  autocast: true
  recondition:
    objective: least_squares
  distillation:
    bounds_rate: 0.001
"""


@pytest.fixture
def option_file(tmp_path, monkeypatch):
    """The YAML above beside the files that it names."""
    monkeypatch.chdir(tmp_path)
    for folder in ("hr", "lr"):
        (tmp_path / folder).mkdir()
    (tmp_path / "net.pth").touch()
    path = tmp_path / "train.yml"
    path.write_text(TEXT)
    return path


@pytest.fixture
def refused(option_file):
    """``refused(ENTRIES...)``: the error line of the options with ``--force_yml`` entries."""

    def check(*entries, drop=None):
        content = yaml.safe_load(TEXT)
        if drop is not None:
            *parents, last = drop.split(":")
            section = content
            for parent in parents:
                section = section[parent]
            del section[last]
        option_file.write_text(yaml.safe_dump(content, sort_keys=False))
        with pytest.raises(InputError) as info:
            check_training(load_options(option_file, entries))
        assert "\n" not in str(info.value)
        return str(info.value)

    return check


def test_options_amount_to_a_recipe(option_file):
    options = load_options(option_file)
    assert list(options)[:3] == ["name", "model_type", "scale"]
    assert check_training(options) == []
    section = training_section(options)
    assert (section.calibration_images, section.autocast) == (64, True)
    recipe = recipe_from_options(options)
    assert (recipe.name, recipe.scale, recipe.seed) == ("tiny_x2", 2, 3)
    assert recipe.network_g == options["network_g"]
    assert recipe.path.model_dump(exclude_none=True) == {
        "pretrain_network_g": "net.pth",
        "param_key_g": "params_ema",
    }
    assert (recipe.condiquant.weight_bits, recipe.condiquant.scope) == (3, "all")
    assert recipe.condiquant.recondition.objective == "least_squares"
    assert asdict(recipe.condiquant.distillation) == {
        "iterations": 5000,
        "batch_size": 4,
        "augment": True,
        "rate": 0.01,
        "bounds_rate": 0.001,
        "weights": True,
        "weights_rate": 2e-4,
        "feature_weight": 0.0,
        "validate_every": 1000,
        "autocast": True,
    }
    assert (recipe.datasets.calibration.count, recipe.datasets.calibration.crop) == (64, 16)
    assert recipe.datasets.calibration_names == ["Photographs"]
    assert recipe.datasets.test == list(recipe.datasets.val) == ["Set5", "Set14"]
    assert recipe.datasets.train == options["datasets"]["train"]

    assert find_recipe(option_file) == recipe
    overrides = ["condiquant.distillation.iterations=8", "datasets.test=[Set14]"]
    changed = find_recipe(option_file, overrides)
    assert changed.condiquant.distillation.iterations == 8
    assert changed.datasets.test == ["Set14"]
    written = option_file.parent / "recipe.yml"
    written.write_text(recipe.to_yaml())
    assert find_recipe(written) == recipe
    assert changed.digest() != find_recipe(written).digest()


def test_force_yml_sets_and_makes_keys(option_file):
    def forced(*entries):
        return load_options(option_file, entries)

    options = forced("train:ema_decay=0.999", "name = other", "datasets:val:color=y")
    assert options["train"]["ema_decay"] == 0.999
    assert options["name"] == "other"
    assert options["datasets"]["val"]["color"] == "y"
    for text, value in (
        ("none", None), ("~", None), ("True", True), ("false", False), ("12", 12), ("1.5", 1.5),
        ("!!float 1e-4", 1e-4), ("!!float1e-4", 1e-4), ("[0.9, 0.99]", [0.9, 0.99]),
        ("{}", "{}"), ("{}x4", "{}x4"), ("a=b", "a=b"), ("no", "no"), ("'4'", "4"),
        ("2020-01-01", "2020-01-01"),
        ("__import__('os')", "__import__('os')"),
    ):  # fmt: skip
        found = forced(f"path:key={text}")["path"]["key"]
        assert (found, type(found)) == (value, type(value))


def test_force_yml_adds_the_section_to_an_untouched_file(option_file):
    untouched = yaml.safe_load(TEXT) | {"model_type": "SRModel"}
    del untouched["condiquant"]
    option_file.write_text(yaml.safe_dump(untouched))
    assert check_training(load_options(option_file)) == []  # BasicSR's own training
    entries = ["model_type=CondiQuantModel", "condiquant:weight_bits=2"]
    options = load_options(option_file, [*entries, "condiquant:recondition:enabled=false"])
    section = training_section(options)
    assert (section.weight_bits, section.recondition.enabled) == (2, False)
    assert check_training(options) == []
    (notice,) = check_training(load_options(option_file, entries[:1]))
    assert notice.startswith("no condiquant section: 4 bits for weights, 4 for activations")


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        (["train:ema_decay"], "is not of the form section:key=value"),
        (["=3"], "is not of the form section:key=value"),
        (["trian:ema_decay=0"], "there is no section trian; there are: datasets, network_g, path"),
        (["train:optim_d:lr=0"], "there is no section optim_d; there are: optim_g"),
        (["name:sub=1"], "there is no section name"),
        (["model_type=SwinIRModel"],
         "model_type: SwinIRModel ignores the condiquant section: set model_type: CondiQuantModel"),
        (["condiquant:wieght_bits=4"],
         "unknown key condiquant.wieght_bits: did you mean condiquant.weight_bits?"),
        (["condiquant:calibration_image=4"], "did you mean condiquant.calibration_images?"),
        (["condiquant:recondition:enable=1"], "did you mean condiquant.recondition.enabled?"),
        (["condiquant:weight_bits=40"], "condiquant.weight_bits=40 is not supported: use an integer"),
        (["condiquant=4"], "condiquant=4: Input should be a valid dictionary"),
        (["condiquant:autocast=maybe"], "condiquant.autocast='maybe': Input should be a valid boolean"),
        (["condiquant:distillation:autocast=false"],
         "condiquant.autocast=True, but condiquant.distillation.autocast=False: set one of them"),
        (["condiquant:distillation=4"], "condiquant.distillation=4: Input should be a dictionary"),
        (["condiquant:distillation:iterations=4"], "no effect in a training YAML: set train.total_iter"),
        (["condiquant:distillation:weights_rate=1"], "set train.optim_g.lr"),
        (["condiquant:distillation:augment=false"], "set datasets.train.use_hflip"),
        (["condiquant:distillation:batch_size=1"], "set datasets.train.batch_size_per_gpu"),
        (["condiquant:distillation:validate_every=1"], "set val.val_freq"),
        (["train:optim_g:lr=2e-4"], "train.optim_g.lr=2e-4 is text in YAML: write !!float 2e-4"),
        (["train:total_iter=none"], "train.total_iter=None: Input should be a valid integer"),
        (["path:pretrain_network_g=none"], "path.pretrain_network_g is missing: name the checkpoint"),
        (["path:pretrain_network_g=no.pth"], "path.pretrain_network_g=no.pth does not exist"),
        (["datasets:train:dataroot_gt=no"], "dataset Photographs: dataroot_gt=no is no folder"),
        (["datasets:val_2:dataroot_lq=no"], "dataset Set14: dataroot_lq=no is no folder"),
        (["datasets:val=none"], "datasets.val=None is no section: give its keys, or remove it"),
        (["datasets:val_2:name=Set5"], "two validation sets have the name Set5: rename one"),
        (["datasets:train:type=RealESRGANDataset"], "RealESRGANDataset has no LR images, its model"),
        (["datasets:train:gt_size=33"], "datasets.train.gt_size=33 must be a multiple of scale=2"),
        (["datasets:train:gt_size=8"], "datasets.train.gt_size=8 must be a multiple of scale=2, at least"),
        (["name=a b"], "name='a b': String should match"),
    ],
)  # fmt: skip
def test_bad_options_end_in_one_line(refused, entries, expected):
    assert expected in refused(*entries)


@pytest.mark.parametrize(
    "key", ["scale", "network_g", "path", "train:total_iter", "datasets:train", "datasets:train:gt_size"]
)  # fmt: skip
def test_missing_keys_are_named(refused, key):
    assert refused(drop=key) == f"key {key.replace(':', '.')} is missing: add it"


def test_unreadable_files(option_file):
    option_file.write_text("name: !!python/object/apply:os.getcwd []")
    with pytest.raises(InputError, match=r"train\.yml is not valid YAML"):
        load_options(option_file)
    option_file.write_text("- name")
    with pytest.raises(InputError, match=r"train\.yml holds no sections"):
        load_options(option_file)
    with pytest.raises(InputError, match=r"cannot read absent\.yml"):
        load_options(Path("absent.yml"))


def real_option_files():
    folder = os.environ.get("CONDIQUANT_DATA")
    return sorted(Path(folder, "basicsr_options", "train").rglob("*.yml")) if folder else []


@pytest.mark.skipif(not real_option_files(), reason="set CONDIQUANT_DATA to a folder with them")
def test_basicsrs_own_option_files(tmp_path, monkeypatch):
    """Untouched but for three keys, beside folders and files of the names that they use."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.pth").touch()
    supported = set()
    for file in real_option_files():
        entries = ["model_type=CondiQuantModel", "condiquant:scope=all"]
        options = load_options(file, [*entries, "path:pretrain_network_g=net.pth"])
        for section in options["datasets"].values():
            for root in (section["dataroot_gt"], section.get("dataroot_lq")):
                make_folder(tmp_path, root)
            if "meta_info_file" in section:
                make_file(tmp_path / section["meta_info_file"])
        if "realesr" in file.name:
            with pytest.raises(InputError, match=r"RealESRGANDataset has no LR images.*Paired"):
                check_training(options)
            continue
        notices = check_training(options)
        if "GAN" in file.name:
            assert notices == [
                "the generator alone is distilled: network_d, train.gan_opt, train.optim_d,"
                " train.perceptual_opt are ignored"
            ]
        else:
            assert notices == []
        recipe = recipe_from_options(options)
        train = options["datasets"]["train"]
        assert recipe.datasets.calibration.crop * recipe.scale == train["gt_size"]
        assert recipe.condiquant.distillation.iterations == options["train"]["total_iter"]
        assert len(recipe.datasets.test) == len(options["datasets"]) - 1
        assert yaml.safe_load(recipe.to_yaml())["datasets"]["train"] == train
        supported.add(recipe.network_g["type"])
    assert supported == {"SwinIR", "EDSR", "RCAN", "MSRResNet", "RRDBNet", "ECBSR"}


def make_folder(folder, root):
    if root is not None:
        (folder / root).mkdir(parents=True, exist_ok=True)
        if root.endswith(".lmdb"):
            (folder / root / "meta_info.txt").touch()


def make_file(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
