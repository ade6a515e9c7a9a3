"""report.html: what stands in it, and, in a browser, how it looks."""

from __future__ import annotations

import dataclasses
import json
import re
import zlib
from html.parser import HTMLParser

import pytest

from dmtjepa.config import parse_config
from dmtjepa.evaluation.figures import FigureData
from dmtjepa.evaluation.page.report_page import make_report_page
from dmtjepa.run_folder import RunFolder
from tests.helpers.browser import install, open_page, print_page
from tests.helpers.reports import HOSTILE, make_report, write_metrics

CONFIG = parse_config({"optimization": {"lr": 0.00123}, "logging": {"folder": f"/runs/{HOSTILE}"}})


class Tags(HTMLParser):
    """The tags of a page: (name, attributes)."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def page(everything, tmp_path_factory):
    """The page of a run with everything that a report can hold."""
    folder = tmp_path_factory.mktemp("page") / "<b>run & co</b>"
    write_metrics(folder)
    start = {"time": "today", "host": HOSTILE, "packages": {"torch": "2.11.0", "xformers": None}, "cpus": 2}
    (folder / "environment.json").write_text(json.dumps({"starts": [{}, start]}))
    return make_report_page(make_report(), everything, RunFolder(folder, "jepa"), CONFIG)


def test_names_are_escaped(page):
    assert HOSTILE not in page
    assert "<b>run" not in page
    assert "&lt;script src=http" in page
    tags = Tags(page).found
    assert not [tag for tag, _ in tags if tag in ("script", "iframe", "object", "embed", "b>")]
    assert not [name for _, attributes in tags for name in attributes if name.startswith("on")]


def test_nothing_is_loaded(page):
    links = [attributes[name] for _, attributes in Tags(page).found for name in ("src", "href") if name in attributes]
    assert links
    assert all(link.startswith("data:") for link in links)
    assert "@import" not in page
    assert "url(" not in page


def test_the_verdict_comes_first(page):
    text = re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.DOTALL)
    order = "Better than the untrained network and than raw", "Training", "Main results", "Masks", "0.00123"
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    assert "± 2.4" in text  # of 60% of 400 images
    for part in (
        "Loss",
        "Explained variance",
        "Effective rank",
        "Learning rate",
        "Images per second",
        "Time without data",
    ):
        assert part in text  # fmt: skip
    for part in ("Neighbours", "Principal components", "Nearest images", "Segmentation", "packages.torch", "2 times"):
        assert part in text


def test_a_bare_report_is_a_page(tmp_path):
    """Of a run that recorded nothing, on images without labels."""
    report = make_report()
    empty = {
        field.name: field.default_factory()
        for field in dataclasses.fields(report)
        if field.default_factory is not dataclasses.MISSING
    }
    data = report.data | {"classes": None, "most_frequent_class": None}
    report = make_report(**(empty | {"data": data, "run": report.run | {"epoch": None}}))
    text = make_report_page(report, FigureData(grid_size=(4, 6)), RunFolder(tmp_path, "jepa"), parse_config({}))
    assert "nothing was compared" in text
    assert "All settings have their defaults" in text
    assert "<img" not in text
    assert "<figure" not in text


@pytest.fixture(scope="module")
def browser():
    try:
        return install()
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_a_browser_shows_it(page, browser, tmp_path):
    """Without a network and without errors, on a phone and on a desk, in the dark."""
    (tmp_path / "report.html").write_text(page)
    opened = open_page(browser, tmp_path / "report.html", tmp_path, (390, 1200), dark=True)
    assert opened.console == []
    for frame, width in zip(opened.frames, (390, 1200), strict=True):
        assert frame["width"] <= width
        assert frame["needed"] <= frame["width"], "the page scrolls sideways"
        # Of three images: masks, neighbours, components, nearest. Of two: the image, its mask, three predictions.
        assert len(frame["pictures"]) == 3 * (1 + 1 + 3 + 3) + 2 * 5
        assert all(pixels > 0 for pixels, _ in frame["pictures"])
        assert all(alt for _, alt in frame["pictures"])
        assert frame["charts"] == 8
        assert HOSTILE in frame["text"]
        assert all(name.startswith("data:") for name in frame["loaded"])
        red, green, blue = map(int, re.findall(r"\d+", frame["background"]))
        assert max(red, green, blue) < 60, "the page is not dark"


PRINTED = 695, 935
"""Width and height of what fits on letter paper within the margins of the page, in pixels."""


@pytest.mark.slow
def test_on_paper_it_is_light_and_whole(page, browser, tmp_path):
    """Also where the reader's screen is dark."""
    assert page.count("@media print") == 1
    (tmp_path / "as_printed.html").write_text(page.replace("@media print", "@media all"))
    (frame,) = open_page(browser, tmp_path / "as_printed.html", tmp_path, PRINTED[:1], dark=True).frames
    assert frame["background"] == "rgb(255, 255, 255)"
    assert frame["needed"] <= frame["width"], "something is cut off at the right"
    assert 0 < frame["tallest"] <= PRINTED[1], "a figure does not fit on a sheet"
    assert all(frame["folded"]), "the settings are folded away"

    (tmp_path / "report.html").write_text(page)
    printed = print_page(browser, tmp_path / "report.html", tmp_path, dark=True)
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", printed)) <= 20
    assert len(re.findall(rb"/Subtype\s*/Image\b", printed)) >= 20
    colors = find_colors(printed)
    assert {"0 0 0", "1 1 1"} <= colors  # text and paper
    assert ".0627 .0745 .0902" not in colors, "the paper is dark"  # that of the dark screen, #101317


def find_colors(pdf: bytes) -> set[str]:
    """The colors with which a PDF file fills areas and text: red, green and blue from 0 to 1."""
    found = set()
    for stream in re.findall(rb"stream\r?\n(.*?)endstream", pdf, re.DOTALL):
        try:
            text = zlib.decompressobj().decompress(stream)
        except zlib.error:  # an image
            continue
        found |= {color.decode() for color in re.findall(rb"([\d.]+ [\d.]+ [\d.]+) rg\b", text)}
    return found
