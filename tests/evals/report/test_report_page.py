"""Pages and pictures: whole, self-contained, readable without seeing them, the same for the same rows."""

import re
import struct
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from longspan.errors import SaveError
from longspan.evals.journal import Entry
from longspan.evals.report import drawing, heat, sections
from longspan.evals.report.curves import by_bytes, by_length, by_task, short, size
from longspan.evals.report.make import make, write
from longspan.evals.report.reading import entries
from longspan.evals.report.samples import samples
from longspan.evals.report.scores import AVERAGE, Scores

pytest.importorskip("matplotlib")
RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
VOID = {"meta", "link", "img", "wbr", "br"}


class Page(HTMLParser):
    """What stands in a page: elements with their attributes, and whether they are closed in turn."""

    def __init__(self, text):
        super().__init__()
        self.open, self.found, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture(scope="module")
def rows(entry):
    """Two mechanisms at two lengths, two tasks, one of them with a needle; one question without an answer."""
    found = []
    for mechanism, kept in (("dense", 4000), ("snapkv:budget=64", 500), ("snapkv:budget=256", 2000)):
        for length in (4096, 8192):
            for number in range(6):
                given = {"mechanism": mechanism, "length": length, "kept_bytes": kept * length // 4096}
                right = (number * 7 + length // 4096 + kept) % 3 > 0
                found.append(entry(float(right), number, **given, answer="<b>&amp; 'it' said</b>"))
                found.append(entry(float(right), number, task="niah_single_1", depths=[number / 5], **given))
    return [*found, entry(0.0, 9, error="<script>alert(1)</script> is too long")]


@pytest.fixture(scope="module")
def report(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "deeper" / "still"
    return folder, write(make(rows), folder)


def test_files_are_written_the_page_first(report):
    folder, files = report
    names = ["report.html", "ruler-length.png", "ruler-needles.png", "ruler-bytes.png", "ruler-tasks.png"]
    assert [file.name for file in files] == names and all(file.parent == folder for file in files)
    for file in files[1:]:
        data = file.read_bytes()
        width, height = struct.unpack(">II", data[16:24])
        assert data[:8] == b"\x89PNG\r\n\x1a\n" and width > 600 and height > 400


def test_the_page_loads_nothing_and_runs_nothing(report):
    text = report[1][0].read_text(encoding="utf-8")
    page = Page(text)
    links = [value for _, attributes in page.found for name, value in attributes.items() if name in ("src", "href")]
    assert links and all(link.startswith(("data:", "#")) for link in links)
    assert not {"script", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.found}
    assert not [name for _, attributes in page.found for name in attributes if name.startswith("on")]
    assert "url(" not in text and "@import" not in text


def test_the_page_can_be_read_without_seeing_it(report):
    page = Page(report[1][0].read_text(encoding="utf-8"))
    assert page.all("html") == [{"lang": "en"}] and page.all("title") and page.all("meta")[1]["name"] == "viewport"
    images = page.all("img")
    assert len(images) == 1 + 3 + 2 + 2
    assert all(len(image["alt"]) > 40 and re.search(r"\d", image["alt"]) for image in images)
    assert "Score by depth" in images[1]["alt"] or "depth" in images[1]["alt"]
    tables = page.all("table")
    assert len(tables) == len(page.all("caption")) >= 5
    assert all(head.get("scope") in ("row", "col") for head in page.all("th"))
    assert all(region["aria-label"] for region in page.all("div") if region.get("role") == "region")


def test_what_models_answer_is_shown_as_text(report):
    text = report[1][0].read_text(encoding="utf-8")
    page = Page(text)
    assert "<b>&amp; 'it' said</b>" in page.texts and "<script>" not in text
    assert any("<script>alert(1)</script> is too long" in told for told in page.texts)


def test_figures_of_the_page_are_those_of_the_report(rows, report):
    page = Page(report[1][0].read_text(encoding="utf-8"))
    lines = [line for line in make(rows).told()["scores"] if line["task"] == "average"]
    assert len(lines) == 6 and all(f"{line['score']:.1f}" in page.texts for line in lines)
    assert {line["kept_bytes"] for line in lines} == {4000, 8000, 500, 1000, 2000}


def test_the_same_rows_in_any_order_give_the_same_page(rows, report, tmp_path):
    again = write(make(rows), tmp_path)[0].read_bytes()
    assert again == report[1][0].read_bytes()
    told = make([*rows[len(rows) // 2 :], *rows[: len(rows) // 2]]).told()["scores"]
    by_cell = {(line["how"], line["task"], line["length"]): line for line in told}
    for line in make(rows).told()["scores"]:
        assert by_cell[line["how"], line["task"], line["length"]] == line


def test_pictures_in_the_page_follow_light_and_dark(rows):
    scores = Scores("ruler", samples(rows)[0])
    drawn = drawing.svg(by_length(scores, "vt"))
    assert drawn == drawing.svg(by_length(scores, "vt"))
    root = ElementTree.fromstring(drawn)
    assert root.tag.endswith("svg") and b"prefers-color-scheme:dark" in drawn and b"currentColor" in drawn
    assert b"#1f2124" not in drawn.split(b"</style>")[1] and b"<image" not in drawn
    words = " ".join(root.itertext())
    assert "dense" in words and "4K" in words and "95 % intervals" in words


def test_curves_over_bytes_join_budgets_of_one_mechanism(rows):
    from matplotlib.figure import Figure

    panel = by_bytes(Scores("ruler", samples(rows)[0]), 4096)
    axis = Figure().subplots()
    panel.draw(axis)
    curves = {
        label: handle[0].get_xdata().tolist() for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    assert curves == {"dense": [4000.0], "snapkv": [500.0, 2000.0]}
    assert "snapkv:budget=64" in panel.alt and "500 B" in panel.alt


def test_scores_and_intervals_are_drawn_where_they_are(entry):
    from matplotlib.figure import Figure

    scores = Scores("ruler", samples([entry(float(i < 6), i, length=n) for n in (4096, 8192) for i in range(8)])[0])
    axis = Figure().subplots()
    by_length(scores, "vt").draw(axis)
    (container,) = axis.containers
    assert container[0].get_xdata().tolist() == [4096, 8192] and container[0].get_ydata().tolist() == [75, 75]
    found = next(iter(scores.cells.values())).score
    ends = [pytest.approx(100 * found.low), pytest.approx(100 * found.high)]
    (bars,) = container[2]
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [ends] * 2


def test_what_guessing_scores_is_a_line_with_its_name(entry):
    def drawn(*chances):
        rows = [entry(1.0, i, chance=chance) for i, chance in enumerate(chances)]
        return b" ".join(
            re.findall(rb">([^<>]*guessing[^<>]*)<", drawing.svg(by_length(Scores("r", samples(rows)[0]), "vt")))
        )

    assert drawn(0.25, 0.25) == b"guessing" and drawn(0.0, 0.0) == drawn(1e-5, 1e-5) == b""


def test_what_guessing_scores_is_told_where_tasks_and_lengths_differ_in_it(entry):
    """MRCR's: it depends on how many identical asks there are, and a little on every question."""
    chances = {("mrcr_2", 2048): 0.61, ("mrcr_2", 4096): 0.58, ("mrcr_8", 2048): 0.25, ("mrcr_8", 4096): 0.27}
    rows = [
        entry(0.5, eval="mrcr", task=task, length=length, mechanism=who, chance=chance)
        for (task, length), chance in chances.items()
        for who in ("dense", "quest")
    ]
    scores = Scores("mrcr", samples(rows)[0])
    whole = sections.by_asked(scores, AVERAGE)
    assert [name for name, _ in whole.rows] == ["dense", "quest", "guessing"]
    assert [value.text for value in whole.rows[-1][1]] == ["43.0", "42.5"]
    own = sections.by_tasks(scores, next(iter(scores.names)))
    assert own.head[-1] == "guessing"
    assert [(name, row[-1].text) for name, row in own.rows] == [
        ("mrcr_2", "59.5"),
        ("mrcr_8", "26.0"),
        ("average", "42.8"),
    ]
    panel = by_length(scores, "mrcr_2")
    assert panel.alt.endswith("guessing: 2K 61.0, 4K 58.0.")
    drawn = drawing.svg(by_task(scores, next(iter(scores.names))))
    assert drawn.count(b">guessing<") == 1, "one name for the dotted lines of two tasks"
    plain = Scores("mrcr", samples([replace(row, row={**row.row, "chance": 0.0}) for row in rows])[0])
    assert len(sections.by_asked(plain, AVERAGE).rows) == 2
    assert "guessing" not in sections.by_tasks(plain, next(iter(plain.names))).head


def test_long_names_take_several_lines(entry):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    url = "http://a-rather-long-name-of-a-host.example:18765/v1"
    rows = [
        entry(eval="r", model=f"a-model-with-a-very-long-name-{i}" * 2, endpoint=url, fingerprint=str(i))
        for i in (1, 2)
    ]
    scores = Scores("r", samples(rows)[0])
    panel = by_length(scores, "vt")
    with drawing._figure(1, 1) as figure:
        axis = figure.subplots()
        drawing._draw(axis, replace(panel, title=" ".join(scores.names.values())))
        drawing._legend(figure, [axis], 2)
        assert isinstance(figure, Figure)
        FigureCanvasAgg(figure).draw()
        for shown in (axis.title, figure.legends[0]):
            box = shown.get_window_extent()
            assert box.x0 >= 0 and box.x1 <= figure.bbox.width


def test_maps_have_a_cell_a_depth_and_length(entry):
    rows = [
        entry(float(depth != 0.5), i, length=length, parameters={"depth": depth, "kind": kind}, task=f"{kind}_{depth}")
        for kind in ("single", "multikey")
        for length in (1024, 2048)
        for depth in (0.0, 0.5, 1.0)
        for i in range(2)
    ]
    panel, other = heat.maps(Scores("needle", samples(rows)[0]))
    assert (panel.title, other.title) == ("single, dense", "multikey, dense"), "depths are the rows of a map"
    assert "1K: 0 % 100, 50 % 0, 100 % 100; 2K: 0 % 100" in panel.alt
    many = [entry(1.0, i, depths=[i / 40], task="niah") for i in range(40)]
    (panel,) = heat.maps(Scores("ruler", samples(many)[0]))
    assert panel.alt.count("100,") >= 9 and "90-100 % 100" in panel.alt
    assert heat.maps(Scores("ruler", samples([entry(depths=[0.1, 0.9])])[0])) == []


def test_other_evals_keep_their_own_tables_and_pictures(tmp_path):
    results = [RESULTS / "compare-cpu.json", RESULTS / "compress-h200.json"]
    found = make(entries(results))
    assert found.scores == [] and [aside.eval for aside in found.asides] == ["compare", "compress"]
    files = write(found, tmp_path)
    assert [file.name for file in files] == ["report.html", "compare-4096.png", "compress.png"]
    page = Page(files[0].read_text(encoding="utf-8"))
    assert len(page.all("img")) == 2 and "streaming" in page.texts and "snapkv+" not in page.texts
    twice = [Entry({"task": {"length": n}, "row": row}, {}) for n in (1, 2) for row in found.asides[0].rows[:2]]
    assert [aside.name for aside in make(twice).asides] == ["compare-4096", "compare-4096-2"]


def test_more_pictures_than_a_page_bears_are_told(entry, tmp_path, monkeypatch):
    monkeypatch.setattr("longspan.evals.report.make._MOST_PANELS", 2)
    rows = [entry(1.0, i, depths=[0.5], mechanism=who) for who in ("dense", "quest", "tree") for i in range(2)]
    page = Page(write(make(rows), tmp_path)[0].read_text(encoding="utf-8"))
    assert "Needles by depth and length (2 of 3)" in page.texts and "Score against length" in page.texts


@pytest.mark.parametrize("given", [{"scoring": "probability", "eval": "perplexity"}, {}, {"depths": [0.5]}])
def test_a_run_without_any_answer_has_a_page(entry, tmp_path, given):
    found = make([entry(0.0, i, error="it did not fit", **given) for i in range(2)])
    page = Page(write(found, tmp_path)[0].read_text(encoding="utf-8"))
    assert "it did not fit" in page.texts and found.notes[0].startswith("2 of 2 questions")


def test_without_matplotlib_the_page_has_its_tables(rows, tmp_path, monkeypatch):
    monkeypatch.setattr("longspan.evals.report.make.available", lambda: False)
    (file,) = write(make(rows), tmp_path)
    page = Page(file.read_text(encoding="utf-8"))
    assert not page.all("img") and len(page.all("table")) >= 5
    assert any("Pictures need matplotlib" in text for text in page.texts)


def test_a_folder_that_can_not_be_written_is_told(rows, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="can't make"):
        write(make(rows), tmp_path / "file")
    (tmp_path / "report.html").mkdir()
    with pytest.raises(SaveError, match=r"can't write .*report\.html"):
        write(make([rows[0]]), tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir() if file.is_file()) == ["file", "ruler-length.png"]


def test_many_who_were_asked_can_still_be_told_apart():
    looks = [
        tuple(sorted((k, v) for k, v in drawing.look(i).items() if k in ("color", "marker", "linestyle")))
        for i in range(28)
    ]
    assert len(set(looks)) == 28


def test_sizes_and_lengths_are_short():
    assert [size(count) for count in (0, 512, 999, 1500, 5e6, 7.77e9)] == [
        "0 B",
        "512 B",
        "999 B",
        "1.5 kB",
        "5 MB",
        "7.77 GB",
    ]
    assert [short(length) for length in (900, 1024, 1536, 131072, 1 << 20)] == ["900", "1K", "1.5K", "128K", "1M"]
