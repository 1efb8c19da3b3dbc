"""What is printed, at 80 columns and into a pipe."""

import json
from io import StringIO

import pytest
from rich.console import Console

from condiquant_recipes.reporting import run_report


@pytest.fixture(params=[80, None])
def width(request, monkeypatch):
    """Of a terminal; none in a pipe."""
    if request.param is None:
        monkeypatch.delenv("COLUMNS", raising=False)
    else:
        monkeypatch.setenv("COLUMNS", str(request.param))
    return request.param


def test_nodes_for_ignored_scope_can_be_copied(make_job, condiquant, width):
    job = make_job("swinir")
    described = json.loads(condiquant("inspect", job.write(), "--json"))
    lines = condiquant("inspect", job.write()).splitlines()
    nodes = [row["nncf_node"] for row in described["layers"]]
    assert lines[-len(nodes) :] == nodes
    table = lines[: -len(nodes) - 1]
    assert width is None or max(map(len, table)) <= width
    assert all(any(row["name"] in line for line in table) for row in described["layers"])


def test_an_ir_is_summed_up_first(finished_job, condiquant, width):
    job = finished_job("compact")
    lines = condiquant("inspect", job.out).splitlines()
    assert lines[0] == (
        "tiny, enlarges 2 times; 4-bit weights and 4-bit inputs of the layers in scope (all)"
    )
    assert lines[1] == "takes [1,3,?,?], gives [1,3,2..,2..]"
    ir = json.loads((job.out / "metrics.json").read_text())["ir"]
    assert lines[2].startswith(f"{ir['bin_bytes'] / 1024:.0f} KiB of weights, ")
    assert lines[2].endswith("of 5 convolutions and matrix products 3 run as int8 on this CPU")
    assert all(any(f"parity.{key} " in line for line in lines) for key in ("tie_rate", "precision"))


@pytest.mark.parametrize("sets", [True, False])
def test_a_run_says_what_came_out_with_and_without_test_sets(finished_job, sets):
    metrics = json.loads((finished_job("compact").out / "metrics.json").read_text())
    if not sets:
        metrics |= {"float": {}, "quantized": {}}
    console = Console(width=80, record=True, file=StringIO())
    for part in run_report(metrics):
        console.print(part)
    printed = console.export_text()
    assert ("Tiny" in printed) == sets
    assert f"{metrics['fidelity']:.2f} dB on held-out crops" in printed
    assert f"{metrics['ir']['bin_bytes'] / 1024:.0f} KiB .bin" in printed
    assert "W4A4" in printed
    assert len(printed.splitlines()) < 20


def test_names_that_are_too_long_get_numbers(finished_job, condiquant, tmp_path, width):
    finished_job("compact")
    (tmp_path / "second").mkdir()
    for suffix in ("xml", "bin"):
        content = (tmp_path / "out" / f"model.{suffix}").read_bytes()
        (tmp_path / "second" / f"a_long_name_of_a_network_w4a4.{suffix}").write_bytes(content)
    names = ["model", "a_long_name_of_a_network_w4a4"]
    given = [tmp_path / "out", tmp_path / "second" / f"{names[1]}.xml"]
    lines = condiquant("benchmark", *given, "-niter", 1, "-t", 0.01).splitlines()
    rows = [line.split()[0] for line in lines if line.endswith("%  ")]
    if width is None:
        assert rows == names
    else:
        assert lines[:2] == [f"1: {names[0]}", f"2: {names[1]}"]
        assert rows == ["1", "2"]
        assert max(map(len, lines)) <= width
