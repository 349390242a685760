"""The numbers in the figures, read from the drawn artists rather than from pixels."""

import hashlib
import io
import json
import re
import subprocess
import sys
import warnings
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from analysis_samples import cells_of, example, frame_of, many, results_of
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from PIL import Image
from tiny_cells import put, tiny_cell

from analysis.__main__ import main
from analysis.compare.table import Table, tabulate
from analysis.render import words
from analysis.render.figures import pictures, write
from analysis.render.style import LINES, MARKERS, PALETTE, Picture, file_name, styles
from analysis.runs import curves
from analysis.runs.frame import Results, findings
from quantizers import QUANTIZERS
from suite.run import mlflow_replica
from suite.run.directory import Planned, RunDir, write_plan
from suite.run.journal import Journal

OKABE_ITO = {"#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"}
KINDS = ("differences", "profiles", "curves", "flips", "masked", "distance", "gap", "size", "ranks")


def recorded_of(frame: pd.DataFrame, num_epochs: int = 6, unfinished: int = 3) -> pd.DataFrame:
    """Accuracy rises to the test's, flips halve, mu doubles to 64; failed cells stop early, waiting ones are absent."""
    records: list[curves.Record] = []
    for row in frame.to_dict("records"):
        done, quantizer = row["state"] == "done", row["quantizer"]
        last = num_epochs if done else unfinished if row["state"] == "failed" else 0
        top1 = row["top1_hard"] if done else 0.5
        for epoch in range(1, last + 1):
            where = (row["grid"], row["cell_id"], epoch)
            records.append((*where, curves.ACCURACY, top1 * epoch / num_epochs))
            if quantizer != "fp":
                records.append((*where, curves.FLIP_RATE, 0.01 * 2.0**-epoch))
                records.append((*where, curves.MASKED_SHARE, 0.05 * epoch))
                records.append((*where, curves.LATENT_GAP, 1.0 / epoch))
            if quantizer.endswith("++"):
                records.append((*where, curves.MU, 2.0**epoch))
    return curves.curves_of(records)


def sized(frame: pd.DataFrame) -> pd.DataFrame:
    """Measured cells get 8,000 binary and 100 other parameters, fp 8,100 others: 1,400 and 32,400 bytes."""
    measured, full = frame["top1_hard"].notna(), frame["quantizer"] == "fp"
    return frame.assign(
        num_binary_parameters=np.where(measured, np.where(full, 0.0, 8000.0), np.nan),
        num_full_precision_parameters=np.where(measured, np.where(full, 8100.0, 100.0), np.nan),
    )


def table_of(frame: pd.DataFrame) -> Table:
    return tabulate(Results(frame, findings(frame)))


def drawn_from(frame: pd.DataFrame, recorded: pd.DataFrame | None = None) -> dict[str, Picture]:
    """Pictures by the first word of their names."""
    recorded = recorded_of(frame) if recorded is None else recorded
    return {picture.name.split("-")[0]: picture for picture in pictures(table_of(frame), recorded)}


def figure_of(found: dict[str, Picture], kind: str) -> Figure:
    figure = found[kind].figure
    assert figure is not None, found[kind].caption
    return figure


def panel(figure: Figure, title: str) -> Axes:
    (axes,) = (axes for axes in figure.axes if axes.get_title(loc="left") == title)
    return axes


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text)]


def points_of(line: Line2D) -> npt.NDArray[np.float64]:
    """[points, 2]."""
    return np.asarray(line.get_xydata(), dtype=np.float64)


def approx(*points: tuple[float, float]) -> object:
    return pytest.approx(np.array(points, dtype=np.float64))


def marks_of(axes: Axes) -> list[tuple[str, npt.NDArray[np.float64]]]:
    """Marker and points of each artist drawn as a mark of its own."""
    marked = [line for line in axes.lines if line.get_marker() != "None" and line.get_markersize() > 5]
    return [(str(line.get_marker()), points_of(line)) for line in marked]


def in_colour(axes: Axes, quantizer: str) -> list[Line2D]:
    return [line for line in axes.lines if line.get_color() == styles([quantizer])[quantizer].color]


@pytest.fixture(scope="module")
def found() -> dict[str, Picture]:
    return drawn_from(sized(example().frame))


def test_each_kind_of_picture_is_drawn_or_says_why_not(found: dict[str, Picture]) -> None:
    assert set(found) == set(KINDS)
    assert [kind for kind in KINDS if found[kind].figure is None] == ["ranks"]
    assert "5 models or more" in found["ranks"].caption


def test_the_forest_has_the_comparisons_estimates_intervals_and_verdicts() -> None:
    groups = [
        cells_of(name, many(shift), model=model)
        for model in ("a", "b")
        for name, shift in (("fp", 0.3), ("bc", 0.0), ("bnn", 0.19), ("bnn++", 0.2))
    ]
    table = table_of(frame_of(*groups))
    (block,) = table.blocks
    figure = figure_of(drawn_from(frame_of(*groups)), "differences")
    (axes,) = figure.axes
    rows = {label.get_text(): place for place, label in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)}
    for answer in (*block.reference, *block.primary):
        y = rows[words.baseline_of(answer)]
        assert answer.estimate is not None
        (diamond,) = (line for line in axes.lines if line.get_marker() == "D" and points_of(line)[0, 1] == y)
        assert points_of(diamond) == approx((100 * answer.estimate, y))
        bars = [np.asarray(path.vertices) for bar in axes.collections for path in bar.get_paths()]
        ends = [bar for bar in bars if len(bar) == 2 and (bar[:, 1] == y).all()]
        if answer.interval is None:
            assert (ends, diamond.get_markerfacecolor()) == ([], "white")
        else:
            assert ends[0] == approx((100 * answer.interval.low, y), (100 * answer.interval.high, y))
        (text,) = (text.get_text() for text in axes.texts if text.get_position()[1] == y)
        assert text.startswith(f"n={answer.n}")
        assert text.endswith(answer.verdict.value)


def test_the_models_stand_below_as_faint_rows_with_every_pair(found: dict[str, Picture]) -> None:
    axes = figure_of(found, "differences").axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels[labels.index("bnn") :][:3] == ["bnn", " resnet20", " resnet110"]
    place = axes.get_yticks()[labels.index("bnn") + 1]
    circles = [points_of(line) for line in axes.lines if line.get_marker() == "o"]
    (pairs,) = (points for points in circles if points[0, 1] == pytest.approx(place))
    assert pairs[:, 0] == pytest.approx(np.array([1.5, 0.61, 1.05]))


def test_an_interval_without_bounds_is_an_arrow_and_the_margin_is_shaded() -> None:
    results = results_of(cells_of("bc", [0.5, 0.6]), cells_of("bnn++", [0.6, 0.7]), margin_points=0.5)
    (forest, *_) = pictures(tabulate(results), curves.curves_of([]))
    assert forest.figure is not None
    assert "design too small (needs 6 seeds)" in " ".join(texts(forest.figure))
    assert "the declared margin of 0.5 points" in forest.caption
    assert len([text for text in forest.figure.axes[0].texts if text.get_text() == ""]) == 2


def test_a_profile_is_the_share_of_runs_that_close_so_much_of_the_gap() -> None:
    frame = frame_of(cells_of("fp", [0.9, 0.9]), cells_of("bc", [0.5, 0.5]), cells_of("bnn++", [0.6, 0.8]))
    figure = figure_of(drawn_from(frame), "profiles")
    (line,) = figure.axes[0].lines
    heights = dict(np.round(points_of(line), 6).tolist())
    assert (heights[20.0], heights[50.0], heights[80.0]) == (100.0, 50.0, 0.0)
    assert "bnn++ 50 % [" in drawn_from(frame)["profiles"].caption


def test_a_curve_is_the_mean_over_seeds_with_a_band_from_the_lowest_to_the_highest(found: dict[str, Picture]) -> None:
    axes = panel(figure_of(found, "curves"), "resnet20")
    (mean,) = in_colour(axes, "bnn")
    mean_at_the_end = (96.10 + 97.20 + 96.40) / 3
    assert points_of(mean) == approx(*((epoch, mean_at_the_end * epoch / 6) for epoch in range(1, 7)))
    bands = {to_hex(np.asarray(band.get_facecolor())[0]).upper(): band for band in axes.collections}
    outline = np.asarray(bands[styles(["bnn"])["bnn"].color].get_paths()[0].vertices)
    at_the_end = outline[outline[:, 0] == 6, 1]
    assert (at_the_end.min(), at_the_end.max()) == pytest.approx((96.10, 97.20))


def test_a_run_that_failed_is_a_thin_line_with_a_cross_and_never_part_of_the_mean(found: dict[str, Picture]) -> None:
    axes = panel(figure_of(found, "curves"), "resnet20")
    mean, thin, cross = in_colour(axes, "bc")
    assert points_of(mean)[-1:] == approx((6, (97.02 + 97.38) / 2))
    assert thin.get_linewidth() < mean.get_linewidth()
    assert cross.get_marker() == "x"
    assert points_of(cross) == approx((3, 25.0))
    assert "not finished" in found["curves"].caption


def test_cells_of_several_recipes_are_never_averaged() -> None:
    mixed = [*cells_of("bnn++", [0.5], recipe_id="old"), *cells_of("bnn++", [0.9, 0.9], recipe_id="new")]
    axes = panel(figure_of(drawn_from(frame_of(mixed)), "curves"), "resnet20")
    assert len([line for line in axes.lines if line.get_marker() == "x"]) == 3
    assert not axes.collections


def test_a_mean_has_a_gap_where_a_finished_seed_has_no_value() -> None:
    frame = frame_of(cells_of("bnn++", [0.8, 0.9]))
    recorded = recorded_of(frame)
    lost = (recorded["cell_id"] == frame["cell_id"].iloc[1]) & (recorded["epoch"] == 4)
    axes = panel(figure_of(drawn_from(frame, recorded[~lost]), "curves"), "resnet20")
    points = points_of(axes.lines[0])
    assert points[np.isnan(points[:, 1]), 0].tolist() == [4]


def test_flip_rates_stand_on_a_logarithmic_axis_that_has_a_place_for_zero() -> None:
    frame = frame_of(cells_of("bnn++", [0.8, 0.9]))
    recorded = recorded_of(frame)
    axes = panel(figure_of(drawn_from(frame, recorded), "flips"), "resnet20")
    assert axes.get_yscale() == "log"
    assert points_of(axes.lines[0]) == approx(*((epoch, 2.0**-epoch) for epoch in range(1, 7)))
    still = (recorded["metric"] == curves.FLIP_RATE) & (recorded["epoch"] == 6)
    recorded.loc[still, "value"] = 0.0
    axes = panel(figure_of(drawn_from(frame, recorded), "flips"), "resnet20")
    assert (axes.get_yscale(), axes.get_ylim()[0]) == ("symlog", 0)
    assert points_of(axes.lines[0])[-1].tolist() == [6, 0]


def test_masked_weights_are_a_share_and_distances_are_in_the_latents_own_unit() -> None:
    frame = frame_of(cells_of("bnn++", [0.8, 0.9]))
    drawn = drawn_from(frame, recorded_of(frame))
    masked, distance = (panel(figure_of(drawn, kind), "resnet20") for kind in ("masked", "distance"))
    assert points_of(masked.lines[0]) == approx(*((epoch, 5.0 * epoch) for epoch in range(1, 7)))
    assert points_of(distance.lines[0]) == approx(*((epoch, 1.0 / epoch) for epoch in range(1, 7)))
    assert {masked.get_yscale(), distance.get_yscale()} == {"linear"}


def test_the_gap_stands_at_the_final_mu_and_without_mu_on_the_left(found: dict[str, Picture]) -> None:
    axes = panel(figure_of(found, "gap"), "resnet20")
    look, marks = styles([]), dict(marks_of(axes))
    assert marks[look["bnn++"].marker] == approx((64, 0.4))
    words = [label.get_text() for label in axes.get_xticklabels()]
    none = axes.get_xticks()[words.index("none")]
    left = [marks[look[name].marker][0] for name in ("bc", "bnn")]
    assert np.exp(np.log([x for x, _ in left]).mean()) == pytest.approx(none)
    assert [gap for _, gap in left] == [0, 0]
    assert none < axes.get_xticks()[words.index("10")]
    assert "no gap by epoch" in found["gap"].caption


def test_size_counts_one_bit_for_a_binary_parameter_and_32_for_any_other(found: dict[str, Picture]) -> None:
    axes = figure_of(found, "size").axes[0]
    square = styles([])["fp"].marker
    (full,) = (points for marker, points in marks_of(axes) if marker == square)
    assert full == approx((32_400, (99.11 + 99.04 + 99.17) / 3))
    binary = [points[0, 0] for marker, points in marks_of(axes) if marker != square]
    assert len(set(binary)) == len(binary) == 6  # bc and bnn and bnn++, of two models
    assert np.exp(np.log(binary).mean()) == pytest.approx(1400)


def many_models(num_models: int) -> pd.DataFrame:
    """bnn++ is best on all models, bc is worst; bnn and pc alternate."""
    groups = [cells_of("fp", [0.99, 0.99], model=f"m{k}") for k in range(num_models)]
    for k in range(num_models):
        for quantizer, top1 in {"bc": 0.6, "pc": 0.7 + 0.1 * (k % 2), "bnn": 0.75, "bnn++": 0.9}.items():
            groups.append(cells_of(quantizer, [top1, top1 + k / 1000], model=f"m{k}"))
    return frame_of(*groups)


def test_from_five_models_on_ranks_are_drawn_with_the_groups_that_are_not_separable() -> None:
    frame = many_models(6)
    (ranks,) = table_of(frame).ranks
    figure = figure_of(drawn_from(frame), "ranks")
    (axes,) = figure.axes
    average = dict(zip(ranks.ranking.methods, ranks.ranking.average_ranks, strict=True))
    foot = {str(line.get_label()): points_of(line)[0].tolist() for line in axes.lines}
    assert {method: foot[method] for method in average} == {method: [rank, 0] for method, rank in average.items()}
    assert foot["bnn++"] == [1, 0]
    assert "fp" not in foot
    bars = [points_of(line)[:, 0] for line in axes.lines if line.get_linewidth() > 3]
    covered = [{method for method, rank in average.items() if low <= rank <= high} for low, high in bars]
    assert covered == [set(group) for group in ranks.ranking.groups]
    assert covered
    assert f"CD = {ranks.ranking.critical_difference:.2f}" in texts(figure)


def test_below_five_models_there_are_no_ranks() -> None:
    assert drawn_from(many_models(4))["ranks"].figure is None


def test_findings_stand_in_every_figure(found: dict[str, Picture]) -> None:
    (oom, *_) = (finding for finding in findings(example().frame) if "oom" in finding)
    for kind in KINDS[:-1]:
        assert oom in found[kind].caption
        assert oom in " ".join(texts(figure_of(found, kind))).replace("\n", " ")


def test_colours_are_okabe_and_itos() -> None:
    assert set(PALETTE) <= OKABE_ITO
    assert {style.color for style in styles(QUANTIZERS).values()} <= OKABE_ITO


def test_without_colour_every_quantizer_is_told_apart_by_its_mark_and_line() -> None:
    look = styles([*QUANTIZERS, *(f"mine{k}" for k in range(40))])
    assert len({(style.marker, style.linestyle) for style in look.values()}) == len(look)
    first = [styles(QUANTIZERS)[name] for name in ("fp", "bc", "pc", "bnn", "bnn+", "bnn++")]
    assert len({style.marker for style in first}) == len({str(style.linestyle) for style in first}) == 6
    assert len(MARKERS) * len(LINES) >= len(look)


def test_a_quantizer_looks_the_same_in_every_figure() -> None:
    assert styles(["bnn++"])["bnn++"] == styles(QUANTIZERS)["bnn++"]


@pytest.fixture
def written_words(monkeypatch: pytest.MonkeyPatch) -> list[Text]:
    """The texts that are actually drawn: axes also keep invisible ones, such as ticks beyond their ends."""
    written: list[Text] = []
    real = Text.draw

    def draw_and_note(text: Text, *arguments: Any, **options: Any) -> None:  # noqa: ANN401
        written.append(text)
        real(text, *arguments, **options)

    monkeypatch.setattr(Text, "draw", draw_and_note)
    return written


def wide_zoo() -> pd.DataFrame:
    """All quantizers on two models with five seeds; some failed."""
    rng = np.random.default_rng(0)
    groups = [
        cells_of(name, [*(0.9 + 0.05 * rng.random(4)).tolist(), "failed: oom" if k % 3 else 0.9], model=model)
        for model in ("resnet8", "vit_mini_patch2_8")
        for k, name in enumerate(QUANTIZERS)
    ]
    return sized(frame_of(*groups))


@pytest.mark.parametrize(
    "frame", [sized(example().frame), wide_zoo(), many_models(6)], ids=["example", "zoo", "models"]
)
def test_no_text_lies_on_another_or_outside_the_page(frame: pd.DataFrame, written_words: list[Text]) -> None:
    for picture in pictures(table_of(frame), recorded_of(frame)):
        if picture.figure is None:
            continue
        picture.figure.draw_without_rendering()  # constrained layout settles during the first drawing
        written_words.clear()
        picture.figure.draw_without_rendering()
        shown = [text for text in written_words if text.get_visible() and text.get_text().strip()]
        boxes = {text: text.get_window_extent() for text in shown}
        assert len(boxes) > 5
        corners = {text: (box.min, box.max) for text, box in boxes.items()}
        page = picture.figure.bbox.padded(2)
        assert [text for text in shown if not all(page.contains(*corner) for corner in corners[text])] == []
        upright = [text for text in boxes if text.get_rotation() in {0, 90}]  # slanted texts' boxes are mostly empty
        both = combinations(upright, 2)
        touching = [(one, other) for one, other in both if boxes[one].padded(-1).overlaps(boxes[other].padded(-1))]
        assert (picture.name, touching) == (picture.name, [])


def few() -> pd.DataFrame:
    return frame_of(cells_of("bc", [0.5, 0.6]), cells_of("bnn++", [0.6, 0.9]))


def digests(frame: pd.DataFrame, folder: Path) -> dict[str, str]:
    written = write(pictures(table_of(frame), recorded_of(frame)), folder)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in written}


def test_the_same_runs_give_the_same_bytes_whatever_the_readers_own_settings(tmp_path: Path) -> None:
    first = digests(sized(few()), tmp_path / "one")
    assert len(first) == 14
    with mpl.rc_context({"font.size": 20, "axes.grid": True, "savefig.dpi": 50, "lines.linewidth": 9}):
        assert digests(sized(few()), tmp_path / "two") == first
        assert mpl.rcParams["font.size"] == 20


def test_a_png_has_200_dots_per_inch_and_the_pdf_no_date_and_no_type_3_fonts(tmp_path: Path) -> None:
    results = Results(few(), ())
    written = write(pictures(tabulate(results), recorded_of(few())), tmp_path / "new")
    assert sorted(written) == sorted((tmp_path / "new").iterdir())
    for path in written:
        content = path.read_bytes()
        if path.suffix == ".png":
            image = Image.open(io.BytesIO(content))
            assert [round(dpi) for dpi in image.info["dpi"]] == [200, 200]
            assert image.width == 1440
        else:
            assert b"CreationDate" not in content
            assert b"/Type3" not in content


def test_no_figure_stays_open_in_pyplot(tmp_path: Path) -> None:
    from matplotlib import pyplot as plt

    before = plt.get_fignums()
    digests(few(), tmp_path)
    assert plt.get_fignums() == before


EDGES = {
    "nothing has run": frame_of(cells_of("bc", ["planned"] * 3), cells_of("bnn++", ["queued"] * 3)),
    "all failed": frame_of(cells_of("bc", ["failed: nan"] * 3), cells_of("bnn++", ["failed: oom"] * 3)),
    "one seed": frame_of(cells_of("bc", [0.5]), cells_of("bnn++", [0.6])),
    "equal differences": frame_of(cells_of("bc", [0.5, 0.6]), cells_of("bnn++", [0.6, 0.7])),
    "perfect": frame_of(cells_of("bc", [1.0, 1.0]), cells_of("bnn", [1.0, 1.0])),
    "full precision only": frame_of(cells_of("fp", [0.9, 0.8])),
    "no seed in common": frame_of(cells_of("bc", [0.5, "failed: nan"]), cells_of("bnn++", ["failed: nan", 0.6])),
    "two data sets": frame_of(cells_of("bc", [0.5]), cells_of("bnn++", [0.6], dataset="other")),
    "names": frame_of(
        cells_of("a_b $x^$ 50% <b>", [0.5], model=r"m/../x\n$"), cells_of("bnn++", [0.6], model=r"m/../x\n$")
    ),
}


@pytest.mark.parametrize("frame", EDGES.values(), ids=EDGES)
@pytest.mark.parametrize("with_curves", [True, False], ids=["curves", "no curves"])
def test_whatever_is_missing_nothing_crashes_and_every_kind_is_accounted_for(
    frame: pd.DataFrame, *, with_curves: bool
) -> None:
    recorded = recorded_of(frame) if with_curves else curves.curves_of([])
    found = pictures(table_of(frame), recorded)
    for picture in found:
        if picture.figure is not None:
            picture.figure.draw_without_rendering()
    assert {picture.name.split("-")[0] for picture in found} == set(KINDS)
    assert all(picture.caption for picture in found)
    assert len({picture.name for picture in found}) == len(found)
    assert not any(set(picture.name) & set("/$ <") for picture in found)


def test_one_epoch_is_enough() -> None:
    frame = sized(example().frame)
    assert figure_of(drawn_from(frame, recorded_of(frame, num_epochs=1, unfinished=1)), "curves")


def test_names_of_files_hold_what_tells_blocks_apart_once() -> None:
    assert file_name("curves", "digits", "digits", "bw", "scratch") == "curves-digits-bw-scratch"
    assert file_name("curves", "a/b c", "bnn++") == "curves-a_b_c-bnn++"


def test_an_epoch_that_was_trained_again_counts_as_it_was_the_last_time() -> None:
    again = [("digits", "a", 1, "mu", 2.0), ("digits", "a", 2, "mu", 3.0), ("digits", "a", 1, "mu", 5.0)]
    recorded = curves.curves_of(again)
    assert recorded.dtypes.astype(str).to_dict() == curves.SCHEMA
    assert curves.by_epoch(curves.by_cell(recorded), "digits", ["a", "b"], "mu")["a"].to_dict() == {1: 5.0, 2: 3.0}


def test_cells_of_another_grid_are_other_cells() -> None:
    recorded = curves.curves_of([("digits", "a", 1, "mu", 2.0), ("again", "a", 1, "mu", 3.0)])
    assert curves.by_epoch(curves.by_cell(recorded), "again", ["a"], "mu")["a"].to_dict() == {1: 3.0}


def made_runs(root: Path) -> None:
    """ROOT/tiny with two finished cells and journals, one cell resumed, as run directories and in ROOT/mlflow.db."""
    cells = [tiny_cell(quantizer=name) for name in ("bc", "bnn++")]
    write_plan(root / "tiny", map(Planned, cells))
    for k, cell in enumerate(cells):
        run = RunDir.create(root / "tiny" / cell.id, cell)
        attempt = put(run, state="running")
        book = Journal(run.journal, attempt)
        for epoch, top1 in ((1, 0.25), (2, 0.0), (2, 0.5 + k / 8)):
            book.append(epoch, {"val/top1": top1, "health/flip_rate": 0.01 / epoch, "mu": 2.0 * epoch})
        book.append(2, {"test/top1_soft": 0.5, "test/top1_hard": 0.5 + k / 8})
        book.close()
        attempt.finish(state="done")
        result = {"top1_hard": 0.5 + k / 8, "top1_soft": 0.5, "num_binary_parameters": 80}
        run.result_path.write_text(json.dumps({**result, "num_full_precision_parameters": 5}), encoding="utf-8")
    mlflow_replica.sync(root / "tiny", mlflow_replica.default_uri(root))


def typed(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    for variable in ("MLFLOW_TRACKING_URI", "PROXBENCH_ROOT"):
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    monkeypatch.setattr(sys, "argv", ["analysis", "figures", *arguments])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.slow
def test_the_command_draws_the_same_from_the_store_and_from_run_directories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The ``noload`` loader strategy", category=DeprecationWarning)
        made_runs(tmp_path)
    options = ["tiny", "--root", str(tmp_path)]
    uri = mlflow_replica.default_uri(tmp_path)
    assert typed(monkeypatch, *options, "--tracking-uri", uri, "--output", str(tmp_path / "store")) == 0
    printed = capsys.readouterr()
    assert typed(monkeypatch, *options, "--output", str(tmp_path / "folders")) == 0
    capsys.readouterr()
    stored, read = ({path.name: path.read_bytes() for path in (tmp_path / k).iterdir()} for k in ("store", "folders"))
    assert stored == read
    assert sorted(Path(line).name for line in printed.out.splitlines()) == sorted(stored)
    assert re.match(r"no ranks-\S+: .*5 models", printed.err.splitlines()[-1])


def test_what_the_user_got_wrong_is_one_line_and_exit_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed(monkeypatch, "--root", str(tmp_path / "none"), "--output", str(tmp_path / "out")) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_help_does_not_wait_for_matplotlib() -> None:
    code = "import sys, analysis.__main__; sys.exit('matplotlib' in sys.modules or 'pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_more_models_than_a_picture_holds_stand_in_further_ones() -> None:
    groups = [cells_of(name, [0.5, 0.6], model=f"m{k}") for k in range(13) for name in ("bc", "bnn++")]
    frame = frame_of(*groups)
    drawn = pictures(table_of(frame), recorded_of(frame))
    figures = {picture.name: picture.figure for picture in drawn if picture.figure}
    titles = [[axes.get_title(loc="left") for axes in figures[f"gap-digits-bw-scratch{k}"].axes] for k in ("", "-2")]
    assert titles == [[f"m{k}" for k in range(12)], ["m12"]]
    (sizes,) = figures["size-digits-bw-scratch"].axes[0].child_axes
    assert [text.get_text() for text in sizes.get_xticklabels()] == ["m0, m1, m2 and 9 more"]
    assert len(drawn) == len({picture.name for picture in drawn})
