from dataclasses import asdict

import pytest

from dmtjepa.evaluation.page.scores import find_headline, list_scores
from tests.helpers.reports import make_report


def headline(**changes):
    values = asdict(make_report(**changes))
    return find_headline(values, list_scores(values))


def test_each_measure_has_a_standard_error():
    scores = {score.measure: score.values for score in list_scores(asdict(make_report()))}
    assert str(scores["Linear probe"]["trained"]) == "60.0 ± 2.4"  # sqrt(0.6 * 0.4 / 400)
    assert str(scores["k-NN, best k"]["trained"]) == "60.0 ± 2.4"
    assert scores["k-NN with layout, best k"]["pixels"] == scores["k-NN, best k"]["pixels"]
    assert str(scores["Mean IoU"]["pixels"]) == "50.0 ± 1.0"
    assert "pixels" not in scores["Attentive probe"]


@pytest.mark.parametrize(
    ("linear", "tone", "text"),
    [
        ({"trained": 0.6, "untrained": 0.4, "pixels": 0.5}, "good", "Better than the untrained network and than raw"),
        ({"trained": 0.6, "untrained": 0.4, "pixels": 0.56}, "mixed", "not clearly better than raw pixels"),
        ({"trained": 0.6, "untrained": 0.59, "pixels": 0.4}, "mixed", "not clearly better than the untrained network"),
        ({"trained": 0.4, "untrained": 0.5, "pixels": 0.5}, "bad", "Not clearly better than the untrained network or"),
    ],
)
def test_two_standard_errors_decide(linear, tone, text):
    found = headline(linear=linear)
    assert found.tone == tone
    assert text in found.text
    assert "linear probe" in found.text


def test_what_decides_without_a_linear_probe():
    assert "(k-NN, best k)" in headline(linear={}).text
    assert "(mean IoU)" in headline(linear={}, knn={}, knn_layout={}).text
    assert headline(linear={}, knn={}, knn_layout={}, segmentation={}).tone == "neutral"


def test_a_collapse_comes_before_everything():
    assert headline(collapsed=True).tone == "bad"
    assert "Collapsed" in headline(collapsed=True).text
