"""The page of a comparison: complete, self-contained, safe with any text."""

import re
from base64 import b64decode
from copy import deepcopy
from html.parser import HTMLParser
from math import inf
from xml.etree import ElementTree

import pytest
import torch
from matplotlib.text import Text

from condiquant_basicsr import write_image
from condiquant_recipes.comparison.page import GROUPS, write_page
from condiquant_recipes.comparison.plots import MOST_LABELS, STYLES, layer_errors, scatter
from condiquant_recipes.weight_comparison.contenders import GROUPS as WEIGHT_GROUPS

VOID = {"meta", "link", "img", "input", "br", "wbr"}


class Page(HTMLParser):
    """Elements with their text; fails on a tag that is not closed in turn."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements, self._open = [], []
        self.feed(source)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attributes):
        element = {"tag": tag, "text": "", **dict(attributes)}
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag, attributes):
        self.elements.append({"tag": tag, "text": "", **dict(attributes)})

    def handle_endtag(self, tag):
        assert self._open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self._open:
            element["text"] += data

    def all(self, tag, **attributes):
        found = (e for e in self.elements if e["tag"] == tag)
        return [e for e in found if all(e.get(k) == v for k, v in attributes.items())]


def row(name, group, psnr, size, latency, **more):
    return {
        "id": name, "label": f"{name} label", "group": group, "weight_bits": 4,
        "activation_bits": 4, "reason": None, "notes": [], "psnr": {"Set5": psnr},
        "ssim": {"Set5": 0.9}, "drop": {"Set5": 30 - psnr}, "fidelity": {"Set5": psnr + 10},
        "bin_bytes": size, "xml_bytes": 2048, "compression": 3.5, "latency_ratio": latency,
        "latency_ms": 12.0, "int8_share": 0.5, "calibration_seconds": 3.0,
        "peak_memory_bytes": 2**30, "pareto_size": False, "pareto_latency": False, **more,
    }  # fmt: skip


@pytest.fixture
def report(tmp_path):
    rows = [
        row("float", "float", 30.0, 900_000, 1.0, fidelity={"Set5": inf}, pareto_size=True),
        row("broken", "nncf-weights", 0, 0, 0, reason="<script>alert('x')</script> & more"),
        row("nncf", "nncf-int8", 29.7, 300_000, 0.5, latency_ratio=None, notes=["<b>slow</b>"]),
        row("ours", "condiquant", 29.9, 200_000, 0.4, pareto_size=True, pareto_latency=True),
    ]
    for key in ("psnr", "ssim", "bin_bytes", "latency_ratio"):
        rows[1][key] = None
    del rows[1]["drop"], rows[1]["pareto_size"], rows[1]["pareto_latency"]
    names = ("reference", "nncf", "ours")
    for shade, name in enumerate(names):
        (tmp_path / "crops/000").mkdir(parents=True, exist_ok=True)
        write_image(tmp_path / f"crops/000/{name}.png", torch.full((3, 8, 12), shade / 4))
    return {
        "recipe": "net<i>", "scale": 4, "sets": ["Set5"], "reference": "hr",
        "image_shape": [1, 3, 64, 64], "versions": {"nncf": "3.4"}, "seed": 0,
        "calibration": {"name": "photos", "count": 4, "crop": 64}, "distillation_iterations": 0,
        "command": 'condiquant compare "x"', "rows": rows,
        "layers": [
            {"name": "a&b", "condition_before": 900.0, "condition_after": 40.0,
             "output_error": 0.1, "bits": 4, "quantized_output_error_before": 0.2,
             "quantized_output_error_after": 0.05},
            {"name": "c", "condition_before": None, "condition_after": inf,
             "output_error": None, "bits": None, "quantized_output_error_before": None},
        ],
        "crops": [{
            "set": "Set5", "image": "cat", "x": 3, "y": 5, "width": 12, "height": 8,
            "psnr": {"nncf": 27.125, "ours": 28.5},
            "files": {name: f"crops/000/{name}.png" for name in names},
        }],
    }  # fmt: skip


def page_of(report, folder) -> tuple[str, Page]:
    source = write_page(report, folder).read_text()
    return source, Page(source)


def images(page, attribute):
    return [e for e in page.all("img") if attribute in e]


def svg_of(uri) -> str:
    svg = b64decode(uri.removeprefix("data:image/svg+xml;base64,")).decode()
    ElementTree.fromstring(svg)
    return svg


def test_one_self_contained_file(report, tmp_path):
    before = set(tmp_path.iterdir())
    source, page = page_of(report, tmp_path)
    assert set(tmp_path.iterdir()) - before == {tmp_path / "compare.html"}
    assert not re.search(r"https?://|url\(|@import", source)
    crops, plots = images(page, "data-id"), images(page, "class")[:3]
    assert [e["src"][:22] for e in crops] == ["data:image/png;base64,"] * 3
    assert [e["src"][:26] for e in plots] == ["data:image/svg+xml;base64,"] * 3
    assert all(e["href"].startswith(("#", "data:")) for e in page.elements if "href" in e)
    assert source == write_page(deepcopy(report), tmp_path).read_text()


def test_ids_are_unique_and_used_names_exist(report, tmp_path):
    _, page = page_of(report, tmp_path)
    ids = [e["id"] for e in page.elements if "id" in e]
    assert len(ids) == len(set(ids))
    used = {e["href"][1:] for e in page.all("use")}
    used |= {e["aria-labelledby"] for e in page.elements if "aria-labelledby" in e}
    assert used <= set(ids)


def test_every_row_is_there_and_failed_ones_come_last(report, tmp_path):
    _, page = page_of(report, tmp_path)
    rows = [e for e in page.all("tr") if "data-id" in e]
    assert [e["data-id"] for e in rows] == ["float", "nncf", "ours", "broken"]
    assert "failed: <script>alert('x')</script> & more" in rows[-1]["text"]
    cells = [line for line in rows[1]["text"].split("\n") if line]
    assert cells[1:] == [
        "4", "4", "29.70", "0.9000", "0.30", "39.70", "293", "2", "3.50×", "–", "12.00", "50%",
        "3.0", "1,024", "<b>slow</b>",
    ]  # fmt: skip
    assert "inf" not in rows[0]["text"]
    assert "–" in rows[0]["text"]


def test_columns_of_head_and_body_agree(report, tmp_path):
    report["sets"] = ["Set5", "Set14"]
    _, page = page_of(report, tmp_path)
    columns = sorted(int(e["data-column"]) for e in page.all("button") if "data-column" in e)
    table = [e for e in page.elements if e["tag"] in ("td", "tr", "th")]
    start = next(i for i, e in enumerate(table) if e.get("data-id") == "float")
    end = next(i for i, e in enumerate(table) if e.get("data-id") == "nncf")
    assert columns == list(range(end - start - 2))  # The notes are not for sorting.
    failed = next(i for i, e in enumerate(table) if e.get("data-id") == "broken")
    width = sum(int(e.get("colspan", 1)) for e in table[failed + 1 : failed + 6])
    assert width == end - start - 1


def test_untrusted_text_is_escaped(report, tmp_path):
    report["crops"][0]["image"] = '"><script>'
    report["rows"][3]["label"] = "a_<script>"
    source, page = page_of(report, tmp_path)
    assert len(page.all("script")) == 1
    assert not page.all("b")
    assert not page.all("i")
    assert "net<i> ×4" in page.all("title")[0]["text"]
    assert "&lt;script&gt;alert(&#39;x&#39;)" in source


def test_crops_show_the_chosen_pair(report, tmp_path):
    _, page = page_of(report, tmp_path)
    shown = {e["data-id"]: (e.get("class") or "").strip() for e in images(page, "data-id")}
    assert shown == {"reference": "", "nncf": "left", "ours": "right"}
    assert {e["data-id"]: e["data-psnr"] for e in images(page, "data-id")} == {
        "reference": "", "nncf": "27.12 dB", "ours": "28.50 dB",
    }  # fmt: skip
    chosen = [e["value"] for e in page.all("option") if "selected" in e]
    assert chosen == ["nncf", "ours"]


def test_plots_mark_the_front_and_name_what_is_missing(report, tmp_path):
    _, page = page_of(report, tmp_path)
    size, latency, layers = (svg_of(e["src"]) for e in page.all("img", **{"class": "drawn"}))
    for label in ("1 float label", "4 ours label"):
        assert label in size
    assert "nncf label" not in size
    assert "1 float label" not in latency
    assert "weights as trained, median 20.00%" in layers
    assert "CondiQuant, median 5.00%" in layers
    captions = [" ".join(e["text"].split()) for e in page.all("figcaption")]
    assert captions == ["PSNR against size.", "PSNR against latency. Without a value: 3."]


def test_fidelity_is_plotted_where_float_is_the_reference(report, tmp_path):
    report["reference"] = "float"
    report["rows"][0]["psnr"] = {"Set5": None}
    _, page = page_of(report, tmp_path)
    captions = [" ".join(e["text"].split()) for e in page.all("figcaption")]
    assert captions[0] == "Fidelity to float against size. Without a value: 1."
    heads = [e["text"] for e in page.all("th", scope="colgroup")]
    assert heads == ["Bits", "PSNR to float, dB", "SSIM to float", "Drop, dB", "Fidelity, dB"]


def test_nothing_but_failures(report, tmp_path):
    report["rows"], report["layers"], report["crops"] = report["rows"][1:2], [], []
    _, page = page_of(report, tmp_path)
    assert not page.all("figure")
    assert not page.all("img")
    assert [e["data-id"] for e in page.all("tr") if "data-id" in e] == ["broken"]


def test_failure_leaves_the_page_as_it_was(report, tmp_path):
    write_page(report, tmp_path)
    before = (tmp_path / "compare.html").read_bytes()
    (tmp_path / "crops/000/ours.png").unlink()
    with pytest.raises(FileNotFoundError):
        write_page(report, tmp_path)
    assert (tmp_path / "compare.html").read_bytes() == before


def test_every_group_has_a_style():
    assert STYLES.keys() == GROUPS.keys() | WEIGHT_GROUPS.keys()


def test_labels_are_anybodys_text(report, tmp_path):
    report["rows"][3]["label"] = "$x$ <b> & \\frac"
    _, page = page_of(report, tmp_path)
    svg = svg_of(page.all("img", **{"class": "drawn"})[0]["src"])
    assert "4 $x$ &lt;b&gt; &amp; \\frac" in svg


@pytest.mark.parametrize("log", [True, False])
def test_labels_are_few_and_stay_apart_and_outliers_leave_the_axis(log):
    values = [8.0, 14.0, 31.0, *(32 + i / 100 for i in range(20))]
    rows = [
        {"number": i, "label": "a method with a name", "group": "float", "front": i > 9}
        for i in range(len(values))
    ]
    plot = scatter(
        rows,
        lambda r: (1.0 + r["number"] / 50, values[r["number"]]),
        "front",
        title="",
        x_label="",
        y_label="",
        log=log,
    )
    assert plot.below == [(0, 8.0), (1, 14.0)]
    (axes,) = plot.figure.axes
    assert axes.get_ylim()[0] > 30
    plot.figure.canvas.draw()
    renderer = plot.figure.canvas.get_renderer()
    inside = axes.get_window_extent(renderer)
    boxes = [Text.get_window_extent(text, renderer) for text in axes.texts]
    assert len(boxes) == MOST_LABELS
    assert {text.get_text().split()[0] for text in axes.texts} >= {"10", "22"}
    markers = [
        line.get_window_extent(renderer) for line in axes.lines if len(line.get_xdata()) == 1
    ]
    assert len(markers) == len(rows)
    for i, box in enumerate(boxes):
        assert inside.x0 < box.x0
        assert box.x1 < inside.x1
        assert inside.y0 < box.y0
        assert box.y1 < inside.y1
        assert not any(box.overlaps(other) for other in boxes[:i] + markers)


def test_layers_without_errors_have_no_plot(report):
    assert layer_errors(report["layers"][1:]) is None
    assert layer_errors(report["layers"]) == layer_errors(report["layers"])
