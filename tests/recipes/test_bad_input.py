"""Every bad input ends in one line that says what to do, exit code 2, and leaves nothing half-written."""

import pytest
import torch

from command_line import fails
from condiquant_basicsr import build_network, write_image
from networks import build


@pytest.fixture
def failing_run(make_job, capsys, monkeypatch):
    def go(change=lambda job: None, *arguments, network="edsr"):
        job = make_job(network)
        change(job)
        message = fails(
            capsys, monkeypatch, "run", job.write(), "--data", job.data, "--out", job.out, "-q",
            *arguments,
        )  # fmt: skip
        assert not (job.out / "metrics.json").exists()
        assert not (job.out / "model.xml").exists()
        assert not list(job.folder.rglob(".*"))
        return message

    return go


def test_missing_weights(failing_run):
    def change(job):
        (job.folder / "net.pth").unlink()

    assert "net.pth" in failing_run(change)


def test_unreadable_weights(failing_run):
    def change(job):
        (job.folder / "net.pth").write_bytes(b"not a checkpoint")

    assert "net.pth" in failing_run(change)


def test_wrong_sha256(failing_run):
    def change(job):
        job.recipe["path"]["sha256"] = "0" * 64

    assert "sha256" in failing_run(change)


def test_checkpoint_of_another_architecture_names_keys(failing_run):
    def change(job):
        torch.save({"params": build("compact").state_dict()}, job.folder / "net.pth")

    assert "conv_first.weight" in failing_run(change)


def test_recipe_for_a_scale_that_the_checkpoint_does_not_have(failing_run):
    def change(job):
        job.recipe["scale"] = 4
        job.recipe["network_g"] = job.recipe["network_g"] | {"upscale": 4}

    message = failing_run(change)
    assert "4" in message
    assert "2" in message


def test_unknown_key_suggests_the_nearest(failing_run):
    message = failing_run(lambda job: job.recipe["condiquant"].update(weight_bit=4))
    assert "condiquant.weight_bit" in message
    assert "did you mean condiquant.weight_bits?" in message


def test_unknown_override_suggests_the_nearest(failing_run):
    message = failing_run(lambda job: None, "--set", "condiquant.distilation.iterations=3")
    assert "did you mean condiquant.distillation?" in message


@pytest.mark.parametrize("bits", [1, 9, 0, "four"])
def test_bits_outside_2_to_8(failing_run, bits):
    message = failing_run(lambda job: None, "--set", f"condiquant.activation_bits={bits}")
    assert "activation_bits" in message
    assert str(bits) in message


def test_no_calibration_images(failing_run):
    def change(job):
        for image in (job.data / "calibration").iterdir():
            image.unlink()

    assert "no calibration images" in failing_run(change)


def test_images_smaller_than_a_crop(failing_run):
    def change(job):
        write_image(job.data / "calibration" / "small.png", torch.rand(3, 20, 90))

    message = failing_run(change)
    assert "small.png" in message
    assert "90x20" in message


def test_nan_weight_names_the_layer(failing_run):
    def change(job):
        state = build("edsr").state_dict()
        state["body.1.conv2.weight"][0, 0, 0, 0] = float("nan")
        torch.save({"params": state}, job.folder / "net.pth")

    assert "body.1.conv2" in failing_run(change)


def test_infinite_activation_names_the_layer(failing_run):
    def change(job):
        state = build("edsr").state_dict()
        state["conv_first.weight"] *= 1e38
        torch.save({"params": state}, job.folder / "net.pth")

    message = failing_run(change)
    assert "NaN or Inf" in message
    assert "body.0.conv1" in message


def test_scope_without_layers(failing_run):
    message = failing_run(lambda job: None, "--set", "condiquant.scope=transformer")
    assert "scope" in message


def test_ignored_scope_that_matches_nothing(failing_run):
    message = failing_run(lambda job: None, "--set", "condiquant.ignored_scope.names=[no_such]")
    assert "no_such" in message


@pytest.mark.parametrize("setting", ["steps=7", "strength=0.1", "objective=condition"])
def test_settings_without_effect_are_refused(failing_run, setting):
    extra = ("--set", "condiquant.recondition.damping=0.5") if "objective" in setting else ()
    message = failing_run(lambda job: None, "--set", f"condiquant.recondition.{setting}", *extra)
    assert "has no effect" in message


def test_output_folder_not_writable(failing_run):
    def change(job):
        job.out.write_text("a file where the folder should be")

    assert "--out" in failing_run(change)


def test_missing_test_set_names_those_that_exist(failing_run):
    message = failing_run(lambda job: None, "--sets", "Set55")
    assert "Set55" in message
    assert "Tiny" in message


def test_crop_that_the_windows_do_not_divide(failing_run):
    message = failing_run(
        lambda job: None, "--set", "datasets.calibration.crop=20", network="swinir"
    )
    assert "24" in message


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(("scale", "crop", "right"), [(2, 16, 32), (4, 12, 24), (3, 8, 16)])
def test_crop_that_is_too_small_for_the_network(failing_run, known, scale, crop, right):
    section = {"type": f"UpCunet{scale}x"}

    def change(job):
        torch.save(build_network(section).state_dict(), job.folder / "net.pth")
        job.recipe |= {"network_g": section if known else None, "scale": scale}
        job.recipe["datasets"]["calibration"]["crop"] = crop

    message = failing_run(change)
    assert f"UpCunet{scale}x cannot run on crops of {crop}x{crop}" in message
    assert message.endswith(f"; use datasets.calibration.crop={right}")


def test_missing_data_folder(make_job, capsys, monkeypatch):
    job = make_job("edsr")
    monkeypatch.delenv("CONDIQUANT_DATA", raising=False)
    assert "--data" in fails(capsys, monkeypatch, "run", job.write(), "--out", job.out)
    message = fails(capsys, monkeypatch, "run", job.write(), "--data", job.folder / "nowhere")
    assert "nowhere" in message


def test_missing_recipe_lists_the_ready_ones(capsys, monkeypatch, tmp_path):
    message = fails(capsys, monkeypatch, "run", "nothing.yml", "--data", tmp_path)
    assert "dat_light/x4.yml" in message


def test_recipe_that_is_no_yaml(capsys, monkeypatch, tmp_path):
    path = tmp_path / "broken.yml"
    path.write_text("a: [1, 2")
    assert "YAML" in fails(capsys, monkeypatch, "run", path, "--data", tmp_path)


def test_a_checkpoint_given_to_run_names_the_command_for_it(make_job, capsys, monkeypatch):
    job = make_job("edsr")
    message = fails(capsys, monkeypatch, "run", job.folder / "net.pth", "--data", job.data)
    assert "net.pth is no YAML file: give a recipe, or a checkpoint to `condiquant quant" in message


def test_override_without_a_value(failing_run):
    assert "key.sub=value" in failing_run(lambda job: None, "--set", "condiquant.scope")


def test_usage_errors_are_one_line(capsys, monkeypatch):
    assert "--nonsense" in fails(capsys, monkeypatch, "run", "x.yml", "--nonsense")


@pytest.mark.parametrize("command", ["evaluate", "upscale", "inspect", "export"])
def test_commands_refuse_what_is_no_ir(make_job, capsys, monkeypatch, command):
    job = make_job("edsr")
    broken = job.folder / "model.xml"
    broken.write_text("<net>")
    image = job.data / "Tiny" / "HR" / "cat.png"
    arguments = {
        "evaluate": ("evaluate", broken, "--data", job.data, "--sets", "Tiny"),
        "upscale": ("upscale", broken, image, job.folder / "big.png"),
        "inspect": ("inspect", broken),
        "export": ("export", job.folder),
    }[command]
    assert str(job.folder) in fails(capsys, monkeypatch, *arguments)
    assert not (job.folder / "big.png").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("iteration=3", "unknown key condiquant.distillation.iteration: did you mean condiquant."),
        ("iterations=-1", "condiquant.distillation.iterations=-1: use at least 0"),
        (
            "iterations=many",
            "condiquant.distillation.iterations='many': Input should be a valid int",
        ),
    ],
)
def test_keys_of_the_core_are_refused_by_their_full_names(failing_run, setting, message):
    found = failing_run(lambda job: None, "--set", f"condiquant.distillation.{setting}")
    assert message in found


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--target", "speed=3"], "--target 'speed=3' is not known: use fidelity=VALUE"),
        (["--target", "size=x"], "x is no number above 0"),
        (["--front", "1"], "--front 1: give at least 2 points"),
        (["--front", "3", "--target", "size=0.3"], "leave out --target"),
        (["--preset", "int9"], "int8"),
        (["--set", "condiquant.layers={'*.none': {weight_bits: 8}}"], "'*.none'"),
        (
            ["--set", "condiquant.layers={'*': {weight_bits: 8, bits: 2}}"],
            "condiquant.layers.*.bits",
        ),
    ],
)
def test_bits_that_cannot_be(failing_run, arguments, named):
    assert named in failing_run(lambda job: None, *arguments)
