from __future__ import annotations

import json
import re
from dataclasses import asdict

import pytest

from dmtjepa.cli.compare import main
from dmtjepa.config import parse_config
from dmtjepa.evaluation.comparison import compare, name_runs
from dmtjepa.evaluation.page.compare_page import make_compare_page
from tests.helpers.browser import install, open_page
from tests.helpers.reports import ACCURACY, make_report, write_metrics


@pytest.fixture
def add_run(tmp_path):
    """add_run("name", lr=0.1, steps=200, accuracy=0.6) -> a run folder; accuracy None: without a report."""

    def add(name, lr=0.001, steps=200, accuracy=None, images="the same"):
        folder = tmp_path / name
        write_metrics(folder, steps, offset=lr)
        config = parse_config({"optimization": {"lr": lr}, "logging": {"folder": str(folder)}})
        (folder / "config.yaml").write_text(config.to_yaml())
        if accuracy is not None:
            report = make_report(name, linear=ACCURACY | {"trained": accuracy})
            report.data["description"] = images
            (folder / "report").mkdir()
            (folder / "report" / "report.json").write_text(json.dumps(asdict(report)))
        return folder

    return add


def cells(text: str, title: str) -> list[str]:
    """The cells of a row of the printed table."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"{title}  ")]
    return re.split(r"\s{2,}", line.removeprefix(title).strip())


def test_settings_and_results_stand_side_by_side(add_run, capsys):
    runs = [add_run("slow", 0.001, 100, 0.5), add_run("fast", 0.25, 200, 0.6)]
    assert main(list(map(str, runs))) == 0
    text = capsys.readouterr().out
    assert cells(text, "optimization.lr") == ["0.001", "0.25"]
    assert "logging.folder" not in text
    assert "optimization.warmup" not in text  # the same in both
    assert cells(text, "steps") == ["100", "200"]
    assert cells(text, "loss") == ["0.011", "0.255"]  # 1 / 100 and 1 / 200, and the offset
    assert cells(text, "effective rank of the features") == ["19.9", "29.9"]
    assert cells(text, "Linear probe (%)") == ["50.0 ± 2.5", "60.0 ± 2.4"]
    assert cells(text, "measured after epoch") == ["2", "2"]
    assert "Linear probe: fast is the best with 60.0 ± 2.4; clearly better than slow" in text


def test_what_is_missing_is_blank_and_named(add_run, tmp_path, capsys):
    whole, without, broken, empty = (
        add_run("whole", accuracy=0.6),
        add_run("without"),
        add_run("broken"),
        tmp_path / "e",
    )
    (broken / "report").mkdir()
    (broken / "report" / "report.json").write_text('{"run": {}, "data": []}')
    (broken / "metrics.jsonl").write_text("not JSON\n")
    empty.mkdir()
    (empty / "config.yaml").write_text("{}")
    assert main([*map(str, (whole, without, broken, empty))]) == 0
    text = capsys.readouterr().out
    assert cells(text, "steps") == ["200", "200", "-", "-"]
    assert cells(text, "Linear probe (%)") == ["60.0 ± 2.4", "-", "-", "-"]
    assert f"without: it has no report: dmtjepa evaluate {without}" in text
    assert "report.json cannot be read" in text
    assert "e: nothing was logged yet" in text
    assert "is the best" not in text  # one result is no comparison


def test_close_results_and_other_images_are_told(add_run):
    close = [add_run("a", accuracy=0.6), add_run("b", accuracy=0.58), add_run("c", accuracy=0.4)]
    (finding,) = compare(close).findings
    assert "a is the best" in finding
    assert "clearly better than c; not clearly better than b" in finding
    other = compare([*close, add_run("d", accuracy=0.9, images="others")]).findings
    assert "different images" in other[0]


@pytest.mark.parametrize(("spoil", "message"), [("", "does not exist"), ("metta: {}", "did you mean meta")])
def test_a_folder_that_is_no_run_is_an_error(add_run, tmp_path, capsys, spoil, message):
    broken = tmp_path / "broken"
    if spoil:
        broken.mkdir()
        (broken / "config.yaml").write_text(spoil)
    page = tmp_path / "compare.html"
    assert main([str(add_run("good")), str(broken), "--html", str(page)]) == 1
    assert message in capsys.readouterr().err
    assert not page.exists()


def test_one_run_is_refused(add_run, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([str(add_run("alone"))])
    assert "at least two" in capsys.readouterr().err


def test_runs_have_names_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = [tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "c"]
    assert name_runs(paths) == [str(paths[0]), str(paths[1]), "c"]
    assert name_runs([paths[2], paths[2]]) == [f"{paths[2]} (1)", f"{paths[2]} (2)"]


def test_the_page_draws_runs_over_each_other(add_run, tmp_path):
    runs = [add_run("<b>one & all", 0.001, 100), add_run("two", 0.25, 600)]
    assert main([*map(str, runs), "--html", str(tmp_path / "compare.html")]) == 0
    page = (tmp_path / "compare.html").read_text()
    assert "<b>one" not in page
    loss = page[page.index("<figcaption>Loss") :].partition("</figure>")[0]
    ends = [float(points.split()[-1].split(",")[0]) for points in re.findall(r'points="([^"]+)"', loss)]
    assert len(ends) == 2
    assert ends[0] < 150 < 350 < ends[1]  # a sixth of the steps
    assert re.search(r"</span>&lt;b&gt;one &amp; all 0\.011", loss)


@pytest.mark.slow
def test_a_browser_shows_the_page(add_run, tmp_path):
    try:
        browser = install()
    except RuntimeError as error:
        pytest.skip(str(error))
    runs = [add_run(f"a-run-with-a-rather-long-name-{i}", 0.1 + 0.1 * i, 200, 0.5 + 0.1 * i) for i in range(4)]
    (tmp_path / "compare.html").write_text(make_compare_page(compare(runs)))
    opened = open_page(browser, tmp_path / "compare.html", tmp_path, (390,))
    assert opened.console == []
    (frame,) = opened.frames
    assert frame["needed"] <= frame["width"], "the page scrolls sideways"
    assert frame["charts"] == 8
    assert "clearly better than" in frame["text"]
