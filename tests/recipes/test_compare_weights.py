"""``condiquant compare-weights``: rows of a tiny model, each through its own processes."""

import json
import math
import re
import sys

import pytest

from command_line import fails
from condiquant_plugin import InputError
from condiquant_recipes import cli
from condiquant_recipes.weight_comparison.comparing import foresight
from condiquant_recipes.weight_comparison.contenders import GROUPS, all_contenders, choose
from condiquant_recipes.weight_comparison.job import WeightJob
from condiquant_recipes.weight_comparison.page import front, table, write_page
from condiquant_transformers import LanguageModel, perplexity, read_folder, save_folder, windows
from language_networks import WORDS, llama, word_tokenizer

METHODS = "nncf-int4,gptq-2,gptq-2-rank-32"


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    save_folder(LanguageModel(llama(2), word_tokenizer()), folder / "model")
    (folder / "valid.txt").write_text(WORDS * 40)
    words = WORDS.split()
    (folder / "test.txt").write_text(" ".join(words[::-1] * 40))
    return folder


def arguments(*more, methods=METHODS):
    return [
        "compare-weights", "model", "--calibration", "valid.txt", "--text", "test.txt", "--out", "out",
        "--length", "32", "--windows", "4", "--scored", "3", "--group-size", "16",
        "--methods", methods, "-q", *more,
    ]  # fmt: skip


def run(monkeypatch, capsys, *more, **settings):
    monkeypatch.setattr(sys, "argv", ["condiquant", *arguments(*more, **settings)])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    captured = capsys.readouterr()
    assert not exit_info.value.code, captured.err
    return captured.out


def test_rows_are_measured_kept_and_shown(job, monkeypatch, capsys):
    monkeypatch.chdir(job)
    mine = b"x" * 2**31  # of this process, which starts those of the rows
    out = run(monkeypatch, capsys)
    del mine
    report = json.loads((job / "out" / "compare.json").read_text())
    rows = {row["id"]: row for row in report["rows"]}
    assert list(rows) == ["float", "nncf-int4", "gptq-2", "gptq-2-rank-32"]
    assert "residual_rank=32 is more than the smaller side" in rows["gptq-2-rank-32"]["reason"]
    assert "gptq-2-rank-32: no result: residual_rank=32" in out
    assert 2**28 < rows["gptq-2"]["peak_memory_bytes"] < 2**31
    assert [rows[name]["bits_per_weight"] for name in ("float", "nncf-int4", "gptq-2")] == [
        16, 4 + 16 / 16, 2 + (16 + 2) / 16,
    ]  # fmt: skip
    model = read_folder(job / "model")
    ids = windows(model.tokenizer, job / "test.txt", length=32, count=3)
    assert rows["float"]["perplexity"] == pytest.approx(perplexity(model, ids), rel=2e-3)
    assert abs(foresight(rows["gptq-2"]) - foresight(rows["float"])) > 2e-3
    assert rows["gptq-2"]["storage"] == "u2"
    for row in (rows["float"], rows["nncf-int4"], rows["gptq-2"]):
        assert row["tokens_per_second"] > 0
        assert row["memory_bytes"] > 0
    assert rows["gptq-2"]["bin_bytes"] < rows["nncf-int4"]["bin_bytes"] < rows["float"]["bin_bytes"]
    assert "GPTQ, 2 bits" in out
    page = (job / "out" / "compare.html").read_text()
    assert page.count("data:image/svg+xml") == 1
    assert "failed: " in page
    # Rows are kept, failed ones tried again, and no IR stays but the float one.
    kept = (job / "out" / "rows" / "gptq-2.json").stat().st_mtime_ns
    assert not any(path.is_dir() for path in (job / "out" / "rows").iterdir())
    run(monkeypatch, capsys, methods="gptq-2")
    assert (job / "out" / "rows" / "gptq-2.json").stat().st_mtime_ns == kept
    line = fails(capsys, monkeypatch, *arguments("--windows", "5"))
    assert "out holds a comparison of another model, text, setting or version" in line


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--methods", "gptq-7"], "methods: there is no gptq-7; use float, nncf-int8"),
        (["--length", "1"], "length=1: use at least 2 tokens"),
        (["--scored", "0"], "scored=0: use at least 1"),
        (["--length", "4000"], "less than one window of 4000: give a longer text"),
        (["--text", "no.txt"], "cannot read no.txt (No such file or directory)"),
        (["--text", "valid.txt"], "valid.txt is the calibration text, too: score on another"),
        (["--inputs", "float"], "inputs='float' is not known: use 'original' or 'compressed'"),
        (["--group-size", "0"], "group_size=0: use at least 1"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    job, tmp_path, capsys, monkeypatch, more, words
):
    monkeypatch.chdir(job)
    line = fails(capsys, monkeypatch, *arguments("--out", str(tmp_path / "out"), *more))
    assert words in line.replace(f"{job}/", "")
    assert not (tmp_path / "out").exists()


def test_ids_are_unique_and_the_float_network_is_always_there():
    known = all_contenders()
    ids = [contender.id for contender in known]
    assert len(set(ids)) == len(ids)
    assert {contender.group for contender in known} == set(GROUPS)
    assert [c.id for c in choose(known, ["pbs2p-4:8"])] == ["float", "pbs2p-4:8"]
    with pytest.raises(InputError, match="there is no a, b; use float"):
        choose(known, ["b", "a", "float"])


def report_of(rows):
    return {
        "model": "a<b", "texts": {"calibration": "valid.txt", "text": "test.txt"},
        "windows": {"calibration": 16, "text": 12}, "length": 512, "group_size": 64, "inputs": "compressed",
        "versions": {"nncf": "3.4"}, "command": "condiquant <x>", "rows": rows,
    }  # fmt: skip


def row_of(name, group, bits, perplexity, *, front=False, reason=None):
    return {
        "id": name, "label": name, "group": group, "bits_per_weight": bits, "perplexity": perplexity,
        "pareto_bits": front, "reason": reason,
    }  # fmt: skip


def test_the_page_escapes_names_and_the_plot_has_perplexities_at_its_axis(tmp_path):
    rows = [
        row_of("float", "float", 16, 30, front=True),
        row_of("two", "gptq", 2.28, 400, front=True),
        row_of("three", "gptq", 3.28, 45, front=True),
        row_of("signs", "one-bit", 1.25, 2.5e12),
        row_of("nothing", "pruned", 1.5, None),
        *(row_of(f"low {rank}", "low-rank", 8, 35 + rank) for rank in range(4)),
        {
            "id": "x",
            "label": "<i>",
            "group": "one-bit",
            "reason": "it & broke",
            "pareto_bits": False,
        },
    ]
    page = write_page(report_of(rows), tmp_path).read_text()
    assert "a&lt;b" in page
    assert "<i>" not in page
    assert "it &amp; broke" in page
    assert "4 (2.5e+12)." in page  # under the axis
    plot = front([row | {"number": n} for n, row in enumerate(rows[:9], 1)])
    (axes,) = plot.figure.axes
    texts = [axes.yaxis.get_major_formatter()(-math.log(value), 0) for value in (30, 45)]
    assert texts == ["30", "45"]
    assert plot.absent == [5]
    assert re.sub(r"\s", "", str([*table(report_of(rows)).columns[1].cells])) == (
        "['30','400','45','2.5e+12','–','35','36','37','38','–']"
    )


def test_a_comparison_belongs_to_its_model_be_it_a_folder_or_a_file(job, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    texts = {
        key: str(job / f"{name}.txt") for key, name in (("calibration", "valid"), ("text", "test"))
    }
    folder, file = (
        WeightJob(str(model), **texts).identity({})
        for model in (job / "model", tmp_path / "model.gguf")
    )
    assert json.loads(file)["model"] == [["model.gguf", 4]]
    assert ["config.json", (job / "model" / "config.json").stat().st_size] in json.loads(folder)[
        "model"
    ]
