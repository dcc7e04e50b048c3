"""Pictures: what their words say of known data, and that nothing of them is cut off."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

from fastpref.dynamics.band import Band
from fastpref.report import dynamics_charts, preference_charts, style
from fastpref.report.chart import Picture, moved, number
from fastpref.report.line_charts import Lines
from fastpref.report.page import PICTURES
from fastpref.report.runs import Run
from tests.helpers.report_runs import evaluated, full, run, trained, with_band

NAME = "_a $run$ & <b> whose name is longer than any legend"


def reading(name: str, *runs: Run) -> str:
    (picture,) = (each for each in PICTURES if each.name == name)
    with style.settings():
        drawn = picture.draw(runs)
    assert drawn is not None
    return drawn.reading


def test_numbers_have_three_digits_or_all_of_thousands() -> None:
    shown = [number(x) for x in (0.123456, -12.34, 999.4, 1234.5, 1e6, 0.0)]
    assert shown == ["0.123", "−12.3", "999", "1,234", "1,000,000", "0"]


def test_what_moved() -> None:
    assert moved(2, 1, "nats") == "fell from 2 to 1 nats"
    assert moved(-2, 1) == "rose from −2 to 1"
    assert moved(1, 1.0001) == "stayed at 1"


def test_one_run_is_said_in_a_sentence_and_several_in_a_line_each() -> None:
    assert reading("loss", full()) == "Fell from 0.75 to 0.0513, held-out 0.5."
    assert reading("lengths", full("a"), full("b")) == (
        "a: chosen stayed at 7 tokens, rejected stayed at 9 tokens.\n"
        "b: chosen stayed at 7 tokens, rejected stayed at 9 tokens."
    )


def test_displacement_is_said_in_nats() -> None:
    """Evaluations of the same pairs are better than steps, if they are enough for a curve."""
    assert reading("logps", full()) == (
        "Chosen fell by 9.75 nats while rejected fell by 19.5: both down.\n"
        "Shown are training pairs."
    )
    changes = [
        {"eval_logps/chosen_change": s / 4, "eval_logps/rejected_change": 0.0 - s} for s in range(5)
    ]
    records = [trained(s + 1) | changes[s] for s in range(5)]
    assert reading("logps", run(records)) == (
        "Chosen rose by 1 nats while rejected fell by 4: chosen up, rejected down.\n"
        "Shown are held-out pairs."
    )
    without = [{"step": s, "logps/chosen": -1.0 * s, "logps/rejected": s} for s in (1, 2, 3)]
    assert "chosen fell by 2 nats while rejected rose by 2: chosen down, rejected up" in reading(
        "logps", run(without, "a"), run(without, "b")
    )


def test_runs_with_and_without_a_reference_are_compared_by_what_both_have() -> None:
    without = [{"step": s, "logps/chosen": -1.0, "logps/rejected": -2.0} for s in (1, 2)]
    said = reading("logps", full("a"), run(without, "b"))
    assert "b: chosen rose by 0 nats while rejected rose by 0" in said
    (picture,) = (each for each in PICTURES if each.name == "logps")
    assert picture.draw([full("a"), run([{"step": 1, "loss": 1.0}], "b")]) is None


@pytest.mark.parametrize("count", [40, 1000])
def test_stretches_of_a_pathway_cover_the_run(count: int) -> None:
    """Both fall until the middle; from there chosen rises."""
    steps = np.arange(count, dtype=np.float64)
    found = dynamics_charts.pathways(steps, np.abs(steps - count / 2), -steps)
    assert [name for *_, name in found] == ["both down", "chosen up, rejected down"]
    assert found[0][0] == 0 and found[1][1] == count - 1
    assert found[0][1] == found[1][0] == pytest.approx(count / 2, abs=count / 12)


def test_a_single_point_has_no_pathway() -> None:
    one = np.ones(1)
    assert dynamics_charts.pathways(one, one, one) == []


def test_pathways_are_those_of_the_band() -> None:
    codes = {"chosen down, rejected up": 0, "both up": 1, "both down": 2}
    codes["chosen up, rejected down"] = 3
    signs = [(w, l) for w in (-1.0, 0.0, 1.0) for l in (-1.0, 0.0, 1.0)]  # noqa: E741
    chosen, rejected = torch.tensor(signs).T
    expected = Band(*5 * [chosen], chosen, rejected).pathway.tolist()
    assert [codes[dynamics_charts.pathway(*pair)] for pair in signs] == expected
    assert set(dynamics_charts.PATHWAYS) == set(codes)


def test_lines_with_one_side_alone_have_no_pathway() -> None:
    """As of single responses that were all desirable; the others are compared."""
    records = [trained(step) for step in range(1, 9)]
    del records[3]["logps/rejected_change"], records[6]["logps/chosen_change"]
    assert "both down" in reading("logps", run(records))


def test_the_band_is_said_in_shares_of_pairs() -> None:
    assert reading("band", full()) == (
        "75% of the pairs were inside the band, 75% at the end, with log r 0.25 below its centre."
    )


def test_without_a_bound_there_is_still_a_band_picture() -> None:
    """Where no cosine was positive the edges are infinite and no line has them."""
    records = [with_band(step) for step in (1, 2, 3)]
    for record in records:
        del record["band/lower"], record["band/upper"]
    assert reading("band", run(records)).startswith("75%")


def test_contrast_says_the_shares_at_the_last_evaluation() -> None:
    assert reading("contrast", full()) == (
        "At the end Z is below 12 for 90% of the pairs, up to 16 for 10%, above for 0%."
    )


def test_the_view_of_a_histogram_has_all_but_the_tails() -> None:
    uniform = {"counts": [10] * 50, "edges": np.linspace(0, 1, 51).tolist()}
    low, high = preference_charts._view([uniform], (5.0, 6.0))  # margins far away do not count
    assert (low, high) == (pytest.approx(0.005 - 0.99 / 40), pytest.approx(0.995 + 0.99 / 40))
    assert preference_charts._view([uniform], (-0.2, 1.3))[0] < -0.2
    assert preference_charts._view([uniform], (-0.2, 1.3))[1] > 1.3


def test_calibration_is_off_by_the_mean_over_pairs() -> None:
    """Bins: predicted .1 of p .2, five pairs; .6 of .5, two. |.5| + |.2| over seven pairs."""
    assert reading("calibration", full()) == (
        "Predictions are off by 0.1 on average, surer than p."
    )


def test_the_trade_off_names_the_best() -> None:
    low = run([evaluated(0), evaluated(10)], "low")
    high = run([evaluated(0), evaluated(40)], "high")
    assert reading("trade-off", low, high) == (
        "Accuracy is highest with high (0.9), the KL lowest with low (10.1), "
        "PCI highest with low (0.4)."
    )
    assert reading("trade-off", high) == (
        "Accuracy rose from 0.5 to 0.9, the KL rose from 0.1 to 40.1 nats, and PCI stayed at 0.4."
    )


@pytest.mark.parametrize("picture", PICTURES, ids=lambda picture: picture.name)
def test_a_picture_without_its_metrics_is_none(picture: Picture) -> None:
    assert picture.draw([run([{"step": 1}])]) is None
    assert picture.draw([run([{"step": 1}]), run([{"step": 2}], "b")]) is None


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("picture", PICTURES, ids=lambda picture: picture.name)
def test_all_of_a_picture_is_inside_it(picture: Picture, count: int) -> None:
    with style.settings():
        drawn = picture.draw([full(f"{k}{NAME}") for k in range(count)])
        assert drawn is not None
        drawn.figure.draw_without_rendering()
        box = drawn.figure.get_tightbbox()
        width, height = drawn.figure.get_size_inches()
    assert box.x0 >= -0.01 and box.y0 >= -0.01
    assert box.x1 <= width + 0.01 and box.y1 <= height + 0.01


@pytest.mark.parametrize("paper", ["#ffffff", "#f6f8fa", "#0d1117", "#161b22"])
def test_colours_of_runs_are_seen_in_light_and_dark(paper: str) -> None:
    """The contrast ratio of WCAG 2 is 3 or more, on the page's papers and on its cards."""

    def luminance(colour: str) -> float:
        linear = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)
        ]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    template = (Path(style.__file__).parent / "templates" / "report.html").read_text()
    assert paper in template
    for colour in style.COLOURS:
        dark, light = sorted((luminance(colour), luminance(paper)))
        assert (light + 0.05) / (dark + 0.05) >= 3


def test_an_inline_svg_takes_size_and_ink_of_the_page(tmp_path: Path) -> None:
    pair = [full(NAME), full("other")]
    found = []
    for name in ("first", "second"):
        with style.settings(name):
            drawn = Lines("loss", "loss").draw(pair)
            assert drawn is not None
            found.append(style.write(drawn.figure, tmp_path / name))
    svg, other = found
    assert svg.startswith("<svg") and "width=" not in svg[: svg.index(">")]
    assert style.INK not in svg and style.PAPER not in svg and "currentColor" in svg
    assert style.INK in (tmp_path / "first.svg").read_text()
    assert (tmp_path / "first.png").read_bytes().startswith(b"\x89PNG")
    ids = [set(re.findall(r' id="([^"]*)"', text)) for text in found]
    assert ids[0] and not ids[0] & ids[1] and "<metadata" not in other


def test_names_are_neither_formulas_nor_markup(tmp_path: Path) -> None:
    with style.settings():
        drawn = Lines("loss", "loss").draw([full("_$a$ <script>"), full("b")])
        assert drawn is not None
        svg = style.write(drawn.figure, tmp_path / "p")
    assert "_$a$ &lt;script&gt;" in svg and "<script" not in svg
