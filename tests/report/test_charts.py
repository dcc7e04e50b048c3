"""Charts: their readings of known data, and that no part of a chart is cut off."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

from fastpref.dynamics.band import Band
from fastpref.report import dynamics_charts, preference_charts, style
from fastpref.report.chart import ChartSpec, moved, number
from fastpref.report.line_charts import LineChart
from fastpref.report.page import CHARTS
from fastpref.report.runs import Run
from tests.helpers.report_runs import evaluated, full, run, trained, with_band

NAME = "_a $run$ & <b> whose name is longer than any legend"


def reading(name: str, *runs: Run) -> str:
    (spec,) = (spec for spec in CHARTS if spec.name == name)
    with style.settings():
        chart = spec.draw(runs)
    assert chart is not None
    return chart.reading


def test_numbers_have_three_digits_or_all_of_thousands() -> None:
    shown = [number(x) for x in (0.123456, -12.34, 999.4, 1234.5, 1e6, 0.0)]
    assert shown == ["0.123", "−12.3", "999", "1,234", "1,000,000", "0"]


def test_changes_are_described() -> None:
    assert moved(2, 1, "nats") == "fell from 2 to 1 nats"
    assert moved(-2, 1) == "rose from −2 to 1"
    assert moved(1, 1.0001) == "stayed at 1"


def test_one_run_has_a_sentence_and_several_have_a_line_each() -> None:
    assert reading("loss", full()) == "Loss fell from 0.75 to 0.0513 (last evaluation: 0.5)."
    assert reading("lengths", full("a"), full("b")) == (
        "a: chosen stayed at 7 tokens, rejected stayed at 9 tokens.\n"
        "b: chosen stayed at 7 tokens, rejected stayed at 9 tokens."
    )


def test_displacement_is_read_in_nats() -> None:
    """Evaluations of the same pairs are preferred if there are enough for a curve."""
    assert reading("logps", full()) == (
        "Chosen fell by 9.75 nats while rejected fell by 19.5: both down.\n"
        "The chart shows training pairs."
    )
    changes = [
        {"eval_logps/chosen_change": s / 4, "eval_logps/rejected_change": 0.0 - s} for s in range(5)
    ]
    records = [trained(s + 1) | changes[s] for s in range(5)]
    assert reading("logps", run(records)) == (
        "Chosen rose by 1 nats while rejected fell by 4: chosen up, rejected down.\n"
        "The chart shows held-out pairs."
    )
    without = [{"step": s, "logps/chosen": -1.0 * s, "logps/rejected": s} for s in (1, 2, 3)]
    assert "chosen fell by 2 nats while rejected rose by 2: chosen down, rejected up" in reading(
        "logps", run(without, "a"), run(without, "b")
    )


def test_runs_with_and_without_a_reference_are_compared_by_what_both_have() -> None:
    without = [{"step": s, "logps/chosen": -1.0, "logps/rejected": -2.0} for s in (1, 2)]
    text = reading("logps", full("a"), run(without, "b"))
    assert "b: chosen rose by 0 nats while rejected rose by 0" in text
    (spec,) = (spec for spec in CHARTS if spec.name == "logps")
    assert spec.draw([full("a"), run([{"step": 1, "loss": 1.0}], "b")]) is None


@pytest.mark.parametrize("count", [40, 1000])
def test_stretches_of_a_pathway_cover_the_run(count: int) -> None:
    """Both fall until the middle; from there chosen rises."""
    steps = np.arange(count, dtype=np.float64)
    segments = dynamics_charts.pathways(steps, np.abs(steps - count / 2), -steps)
    assert [name for *_, name in segments] == ["both down", "chosen up, rejected down"]
    assert segments[0][0] == 0 and segments[1][1] == count - 1
    assert segments[0][1] == segments[1][0] == pytest.approx(count / 2, abs=count / 12)


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


def test_records_with_one_side_only_have_no_pathway() -> None:
    """Batches of single responses may be all desirable; the other records are compared."""
    records = [trained(step) for step in range(1, 9)]
    del records[3]["logps/rejected_change"], records[6]["logps/chosen_change"]
    assert "both down" in reading("logps", run(records))


def test_the_band_is_read_in_fractions_of_steps() -> None:
    assert reading("band", full()) == (
        "The batch was inside its band in 75% of the measured steps; at the end log r was 0.25 "
        "below the band's center."
    )


def test_the_pathways_of_the_pairs_are_read_as_shares() -> None:
    assert reading("pair-pathways", full()) == (
        "50% inside, 25% both down, 25% both up, 0% crossed."
    )


def test_without_a_bound_there_is_still_a_band_chart() -> None:
    """If no cosine was positive, the edges are infinite and missing from all records."""
    records = [with_band(step) for step in (1, 2, 3)]
    for record in records:
        del record["band/lower"], record["band/upper"]
    assert "75% of the measured steps" in reading("band", run(records))


def test_contrast_says_the_shares_at_the_last_evaluation() -> None:
    assert reading("contrast", full()) == (
        "At the last evaluation Z is below 12 for 90% of the pairs, from 12 to 16 for 10%, and "
        "above 16 for 0%."
    )


def test_the_view_of_a_histogram_has_all_but_the_tails() -> None:
    uniform = {"counts": [10] * 50, "edges": np.linspace(0, 1, 51).tolist()}
    low, high = preference_charts._visible_range([uniform], (5.0, 6.0))  # far margins are ignored
    assert (low, high) == (pytest.approx(0.005 - 0.99 / 40), pytest.approx(0.995 + 0.99 / 40))
    assert preference_charts._visible_range([uniform], (-0.2, 1.3))[0] < -0.2
    assert preference_charts._visible_range([uniform], (-0.2, 1.3))[1] > 1.3


def test_calibration_is_off_by_the_mean_over_pairs() -> None:
    """Bins: predicted .1 for p .2, five pairs; .6 for .5, two. |.5| + |.2| over seven pairs."""
    assert reading("calibration", full()) == (
        "Predictions are off by 0.1 on average and more confident than the target."
    )


def test_the_trade_off_names_the_best() -> None:
    low = run([evaluated(0), evaluated(10)], "low")
    high = run([evaluated(0), evaluated(40)], "high")
    assert reading("trade-off", low, high) == (
        "Accuracy is highest for high (0.9), KL is lowest for low (10.1), and PCI is highest for "
        "low (0.4)."
    )
    assert reading("trade-off", high) == (
        "Accuracy rose from 0.5 to 0.9, KL rose from 0.1 to 40.1 nats, and PCI stayed at 0.4."
    )


@pytest.mark.parametrize("spec", CHARTS, ids=lambda spec: spec.name)
def test_a_chart_without_its_metrics_is_none(spec: ChartSpec) -> None:
    assert spec.draw([run([{"step": 1}])]) is None
    assert spec.draw([run([{"step": 1}]), run([{"step": 2}], "b")]) is None


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("spec", CHARTS, ids=lambda spec: spec.name)
def test_all_of_a_chart_is_inside_it(spec: ChartSpec, count: int) -> None:
    with style.settings():
        chart = spec.draw([full(f"{k}{NAME}") for k in range(count)])
        assert chart is not None
        chart.figure.draw_without_rendering()
        box = chart.figure.get_tightbbox()
        width, height = chart.figure.get_size_inches()
    assert box.x0 >= -0.01 and box.y0 >= -0.01
    assert box.x1 <= width + 0.01 and box.y1 <= height + 0.01


@pytest.mark.parametrize("paper", ["#ffffff", "#f6f8fa", "#0d1117", "#161b22"])
def test_colors_of_runs_are_seen_in_light_and_dark(paper: str) -> None:
    """The contrast ratio of WCAG 2 is 3 or more, on the page's papers and on its cards."""

    def luminance(color: str) -> float:
        linear = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)
        ]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    template = (Path(style.__file__).parent / "templates" / "report.html").read_text()
    assert paper in template
    for color in style.COLORS:
        dark, light = sorted((luminance(color), luminance(paper)))
        assert (light + 0.05) / (dark + 0.05) >= 3


def test_an_inline_svg_takes_size_and_ink_of_the_page(tmp_path: Path) -> None:
    pair = [full(NAME), full("other")]
    texts = []
    for name in ("first", "second"):
        with style.settings(name):
            chart = LineChart("loss", "loss", "loss").draw(pair)
            assert chart is not None
            texts.append(style.write(chart.figure, tmp_path / name))
    svg, other = texts
    assert svg.startswith("<svg") and "width=" not in svg[: svg.index(">")]
    assert style.INK not in svg and style.PAPER not in svg and "currentColor" in svg
    assert style.INK in (tmp_path / "first.svg").read_text()
    assert (tmp_path / "first.png").read_bytes().startswith(b"\x89PNG")
    ids = [set(re.findall(r' id="([^"]*)"', text)) for text in texts]
    assert ids[0] and not ids[0] & ids[1] and "<metadata" not in other


def test_names_are_neither_formulas_nor_markup(tmp_path: Path) -> None:
    with style.settings():
        chart = LineChart("loss", "loss", "loss").draw([full("_$a$ <script>"), full("b")])
        assert chart is not None
        svg = style.write(chart.figure, tmp_path / "p")
    assert "_$a$ &lt;script&gt;" in svg and "<script" not in svg
