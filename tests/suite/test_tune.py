"""Trials: the same number for every method, drawn identically on every machine, scored without the test set."""

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tiny_cells import tiny_cell, tiny_grid

from suite.data import datasets
from suite.engines.process_group import Layout
from suite.errors import DataError, SettingError
from suite.recipe.cell import Cell
from suite.recipe.choices import Choice, Choices, ChoicesError, Setting, Tried, best
from suite.recipe.grid import Grid, Resolved
from suite.recipe.grid_file import GridError, load_grid
from suite.recipe.tune import Knob, Scalar, Tune, location
from suite.run.atomic import read_json
from suite.run.directory import RunDir
from suite.run.tuning import read_choices, write_choices
from suite.train import train
from suite.training.trainer import Trainer

LR, PC, BNNPP = "training.learning_rate", "quantization.sharpness.pc.end", "quantization.sharpness.bnn++.end"
TUNE = {LR: {"log": [0.0003, 0.03]}, BNNPP: {"log": [10, 1000]}, "trials": 4, "seeds": [1000, 1001]}
NOWHERE = Path("no-data-needed")


def grid_of(
    folder: Path, tune: dict[str, Any] | None = None, overrides: list[str] | None = None, **more: object
) -> Grid:
    raw = tiny_grid(tune=TUNE if tune is None else tune, **more)
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    return load_grid(str(path), overrides)


def tune_of(**changes: object) -> Tune:
    knobs = {
        LR: Knob.of(LR, {"log": [0.001, 0.1]}),
        PC: Knob.of(PC, [0.5, 1.0]),
        BNNPP: Knob.of(BNNPP, {"log": [10, 1000]}),
    }
    return Tune.model_validate({"knobs": knobs, "trials": 12, "seeds": (1000, 1001), **changes})


ALL = ("fp", "bc", "pc", "bnn++")


@pytest.mark.parametrize("sampler", ["sobol", "random"])
def test_every_method_gets_as_many_trials_and_shares_the_values_of_common_knobs(sampler: str) -> None:
    drawn = {name: tune_of(sampler=sampler).draw(name, ALL) for name in ALL}
    assert {len(trials) for trials in drawn.values()} == {12}
    assert len({tuple(values[LR] for values in trials) for trials in drawn.values()}) == 1
    assert {tuple(trials[0]) for trials in drawn.values()} == {(LR,), (LR, PC), (LR, BNNPP)}
    for trials in drawn.values():
        assert len({json.dumps(values) for values in trials}) == 12


def test_the_draws_are_these_on_every_machine() -> None:
    """A cell's id depends on the draws: a library that drew others would change a launched grid."""
    found = [[values[LR] for values in tune_of(sampler=name, trials=4).draw("bc", ALL)] for name in ("sobol", "random")]
    assert found == [[0.001206, 0.02977, 0.03237, 0.008586], [0.001395, 0.03921, 0.001307, 0.09461]]


def test_more_trials_begin_with_the_fewer_ones() -> None:
    assert tune_of(trials=20).draw("bnn++", ALL)[:5] == tune_of(trials=5).draw("bnn++", ALL)


def test_sobol_points_cover_the_range_more_evenly_than_random_ones() -> None:
    """Each sixteenth of the range, on its own scale, has exactly one of 16 points."""
    values = [values[LR] for values in tune_of(trials=16).draw("bc", ["bc"])]
    knob = Knob.of(LR, {"log": [0.001, 0.1]})
    assert sorted(int(knob.position(value) * 16) for value in values) == list(range(16))


def test_the_grid_sampler_tries_every_combination() -> None:
    tune = tune_of(
        knobs={LR: Knob.of(LR, [0.1, 0.2]), "data.crop": Knob.of("data.crop", ["none", "padded"])},
        sampler="grid",
        trials=4,
    )
    assert [tuple(values.values()) for values in tune.draw("bc", ["bc"])] == [
        (0.1, "none"),
        (0.1, "padded"),
        (0.2, "none"),
        (0.2, "padded"),
    ]


def test_a_point_that_comes_twice_in_lists_is_drawn_again() -> None:
    tune = tune_of(knobs={LR: Knob.of(LR, [0.1, 0.2, 0.3])}, trials=3)
    assert sorted(values[LR] for values in tune.draw("bc", ["bc"])) == [0.1, 0.2, 0.3]
    with pytest.raises(SettingError, match="trials: 4 are more than the 3 combinations of bc's knobs"):
        tune.model_copy(update={"trials": 4}).draw("bc", ["bc"])


def test_a_range_too_narrow_for_its_trials_is_refused() -> None:
    tune = tune_of(knobs={LR: Knob.of(LR, {"linear": [0.1, 0.1002]})}, trials=4)
    with pytest.raises(SettingError, match="trials: 4 are more than the 3 combinations of bc's knobs to four digits"):
        tune.draw("bc", ["bc"])


def test_ids_do_not_depend_on_the_last_bits_of_exp() -> None:
    knob = Knob.of(LR, {"log": [0.0003, 0.03]})
    for position in np.random.default_rng(0).random(1000):
        value = knob.at(position)
        assert isinstance(value, float)
        assert float(f"{value:.4g}") == value
        assert math.isclose(knob.position(value), position, abs_tol=2e-4)


@pytest.mark.parametrize(
    ("written", "value", "is_edge"),
    [
        ({"log": [1, 100]}, 1.2, True),
        ({"log": [1, 100]}, 2.0, False),
        ({"linear": [0, 1]}, 0.95, True),
        ({"linear": [0, 1]}, 0.5, False),
        ([0.5, 0.75, 1.0], 1.0, True),
        ([0.5, 0.75, 1.0], 0.75, False),
        ([0.5, 1.0], 1.0, False),  # with two values, every choice would be at an edge
        (["sgd", "adamw", "lamb"], "sgd", False),
        ({"log": [1, 100]}, 0.0, True),  # written by hand into choices.yaml
        ({"log": [1, 100]}, "much", False),
    ],
)
def test_a_choice_at_the_edge_of_its_range(written: object, value: Scalar, is_edge: bool) -> None:
    assert Knob.of(LR, written).is_edge(value) == is_edge


@pytest.mark.parametrize(
    ("tune", "line"),
    [
        ({LR: {"log": [0.03, 0.0003]}}, f"{LR}: [0.03, 0.0003] is not an increasing range above 0"),
        (
            {LR: {"logarithmic": [1, 2]}},
            f"{LR}: needs {{log: [low, high]}}, {{linear: [low, high]}} or a list of values",
        ),
        ({LR: 0.1}, f"{LR}: needs {{log: [low, high]}}, {{linear: [low, high]}} or a list of values"),
        ({LR: [0.1, 0.1]}, f"{LR}: contains a value twice"),
        (
            {"training.epochs": [1, 2]},
            "training.epochs: cannot be tuned: it is the budget of a run, not a knob: set tune.epochs",
        ),
        ({"learning_rate": [1, 2]}, "learning_rate: is none of trials, sampler, seeds, epochs, nor a recipe's key"),
        ({"training.learning_rat": [0.1, 0.2, 0.3, 0.4]}, "training.learning_rat: "),
        ({"training.batch_size": {"linear": [10, 20]}}, "training.batch_size: "),
        ({}, "needs a knob, for instance training.learning_rate"),
        ({LR: [0.1, 0.2]}, "trials: 4 are more than the 2 combinations of fp's knobs"),
        ({LR: {"log": [0.1, 1]}, "sampler": "grid"}, f"{LR}: sampler: grid needs a list of values"),
        ({LR: [0.1, 0.2], "sampler": "grid"}, "trials: sampler: grid tries all 2 combinations of fp's knobs"),
        ({LR: {"log": [0.1, 1]}, "seeds": [0, 5]}, "seeds: 0 is one of the grid's own seeds; take others"),
        ({LR: {"log": [0.1, 1]}, "seeds": [5, 5]}, "seeds: [5, 5] contains a seed twice"),
        ({LR: {"log": [0.1, 1]}, "trials": 0}, "trials: input should be greater than 0"),
    ],
)
def test_what_cannot_be_tuned_is_told_with_its_line(tmp_path: Path, tune: dict[str, Any], line: str) -> None:
    tune = {"trials": 4, "seeds": [1000], **tune}
    with pytest.raises(GridError) as caught:
        grid_of(tmp_path, tune)
    found = str(caught.value)
    key = line.partition(":")[0]
    lines = (tmp_path / "grid.yaml").read_text(encoding="utf-8").splitlines()
    starts = [f"{key}:", "tune:"]
    number = max(k for k, text in enumerate(lines, 1) if text.strip().startswith(tuple(starts)))
    assert found.startswith(f"{tmp_path / 'grid.yaml'}:{number}: tune")
    assert line in found
    assert "\n" not in found


def test_validation_must_hold_something_out(tmp_path: Path) -> None:
    with pytest.raises(GridError, match=r"data\.validation_fraction: trials are scored on the held-out part"):
        grid_of(tmp_path, data={"validation_fraction": 0})


def test_a_setting_is_tuned_in_one_block_only(tmp_path: Path) -> None:
    with pytest.raises(GridError, match="digits/resnet8/fp is in several blocks, so its tuning is ambiguous"):
        grid_of(tmp_path, blocks=[{}, {"training": {"epochs": 3}}])


def test_knobs_may_be_nested_overridden_by_blocks_and_unset(tmp_path: Path) -> None:
    nested = {
        "training": {"learning_rate": [0.1, 0.2], "weight_decay": {"log": [0.01, 0.1]}},
        "trials": 2,
        "seeds": [9],
    }
    first, second = grid_of(tmp_path, nested, blocks=[{}, {"models": ["vit_mini_patch2_8"], "tune": {LR: None}}]).blocks
    assert first.tune is not None and second.tune is not None  # noqa: PT018
    assert (set(first.tune.knobs), set(second.tune.knobs)) == (
        {LR, "training.weight_decay"},
        {LR, "training.weight_decay"},
    )
    grid = grid_of(tmp_path, overrides=["tune.trials=2", f"tune.{LR}=[0.1,0.2]"])
    assert len(grid.resolve().trials) == 4
    assert not grid_of(tmp_path, overrides=["tune=null"]).is_tuned


def test_a_users_quantizer_with_dots_in_its_name_has_knobs() -> None:
    assert location("quantization.sharpness.my.module:row.end") == ("quantization", "sharpness", "my.module:row", "end")
    assert location(LR) == ("training", "learning_rate")


def test_shorter_trials_have_their_whole_schedule(tmp_path: Path) -> None:
    training = {"epochs": 40, "batch_size": 64, "learning_rate": 0.1, "warmup_epochs": 4, "schedule": "step"}
    grid = grid_of(tmp_path, {**TUNE, "epochs": 10}, training={**training, "decay_epochs": [20, 32]})
    own = grid.resolve().trials[0].cells[0].training
    assert (own.epochs, own.warmup_epochs, own.decay_epochs) == (10, 1.0, (5, 8))
    longer = grid_of(tmp_path, {**TUNE, "epochs": 100}, training={**training, "decay_epochs": [20, 32]})
    assert longer.resolve().trials[0].cells[0].training.epochs == 40
    assert longer.declared()["tuning"][0][5:] == [4, 2, 40, ""]


def test_trials_are_cells_of_their_own_and_no_part_of_the_grids(tmp_path: Path) -> None:
    grid = grid_of(tmp_path)
    resolved = grid.resolve()
    assert all(cell.trial for cell in resolved.cells)
    assert len(resolved.cells) == 2 * 4 * 2 == len({cell.id for cell in resolved.cells})
    assert {trial.setting.name for trial in resolved.trials} == {"digits/resnet8/fp", "digits/resnet8/bnn++"}
    one, other = resolved.trials[0].cells
    assert (one.seed, other.seed) == (1000, 1001)
    assert one.recipe_id == other.recipe_id
    assert one.name == f"digits/resnet8/fp/s1000/trial-{one.recipe_id[:6]}"
    assert "trial" not in tiny_cell().model_dump(), "cells other than trials keep their ids"


def chosen(resolved: Resolved, *names: str) -> Choices:
    """Choices of the first trial of each named setting, or of all."""
    first = {trial.setting: trial for trial in reversed(resolved.trials)}
    return Choices(
        choices=tuple(
            Choice(**setting._asdict(), values=dict(trial.values), trials=(Tried(values=dict(trial.values)),))
            for setting, trial in first.items()
            if not names or setting.name in names
        )
    )


def test_the_grids_own_cells_follow_from_the_choice_with_fresh_seeds(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, seeds=[0, 1, 2])
    resolved = grid.resolve(chosen(grid.resolve(), "digits/resnet8/bnn++"))
    own = [cell for cell in resolved.cells if not cell.trial]
    assert [(cell.quantizer, cell.seed) for cell in own] == [("bnn++", seed) for seed in (0, 1, 2)]
    values = chosen(grid.resolve(), "digits/resnet8/bnn++").choices[0].values
    assert own[0].training.learning_rate == values[LR]
    assert own[0].quantization.sharpness["bnn++"].end == values[BNNPP]
    assert own[0].training.epochs == 2
    assert sum(cell.trial for cell in resolved.cells) == 16, "its trials stay in the plan"


def test_finetune_trials_start_from_the_chosen_full_precision_network_of_their_own_seed(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, blocks=[{}, {"init": "finetune", "quantizers": ["bnn++"]}])
    first = grid.resolve()
    assert not any(cell.init == "finetune" for cell in first.cells), "they wait for full precision's choice"
    choices = chosen(first, "digits/resnet8/fp")
    second = grid.resolve(choices)
    by_id = {cell.id: cell for cell in second.cells}
    trials = [cell for cell in second.cells if cell.init == "finetune"]
    assert len(trials) == 8
    for trial in trials:
        parent = by_id[str(trial.parent)]
        assert (parent.quantizer, parent.seed, parent.trial) == ("fp", trial.seed, True)
        assert parent.training.learning_rate == choices.choices[0].values[LR]
        assert parent.training.epochs == 2
    last = grid.resolve(chosen(second))
    own = [cell for cell in last.cells if cell.init == "finetune" and not cell.trial]
    parents = [{cell.id: cell for cell in last.cells}[str(cell.parent)] for cell in own]
    assert [(cell.quantizer, cell.seed, cell.trial) for cell in parents] == [("fp", 0, False)]
    order = [cell.id for cell in last.cells]
    assert all(order.index(str(cell.parent)) < order.index(cell.id) for cell in last.cells if cell.parent)


def test_untuned_is_the_grid_with_the_values_of_its_file(tmp_path: Path) -> None:
    grid, without = grid_of(tmp_path), grid_of(tmp_path, overrides=["tune=null"])
    tuned = [cell.id for cell in grid.cells()]
    assert [cell.id for cell in grid.untuned().cells()] == [cell.id for cell in without.cells()]
    assert [cell.id for cell in grid.cells()] == tuned
    assert "tuning" not in without.declared()


SPACE = {LR: Knob.of(LR, {"log": [0.0001, 1]})}


def tried(*scores: float | str, lr: float = 0.01) -> Tried:
    return Tried(values={LR: lr}, cells=("a",) * len(scores), scores=scores)


def test_the_best_mean_is_chosen_and_failures_are_the_worst() -> None:
    assert best([tried(0.9, 0.8), tried(0.86, 0.86), tried(0.99, "failed: nan")], SPACE) == 1
    assert best([tried("failed: nan"), tried("failed: oom")], SPACE) is None
    assert best([], SPACE) is None
    assert best([tried("failed: nan"), tried(0.0)], SPACE) == 1


def test_ties_go_to_the_value_nearer_to_the_middle_then_to_the_first() -> None:
    trials = [tried(0.5, lr=0.0001), tried(0.5, lr=0.02), tried(0.5, lr=0.9), tried(0.5, lr=0.02)]
    assert best(trials, SPACE) == 1
    # Equal up to rounding: (0.1 + 0.7) / 2 and (0.3 + 0.5) / 2 are different floats.
    apart = [tried(0.1, 0.7, lr=0.9), tried(0.3, 0.5, lr=0.01)]
    assert best(apart, SPACE) == 1


def test_choices_are_read_as_they_were_written(tmp_path: Path) -> None:
    setting = Setting("digits", "resnet8", "bnn++", "bw", "scratch")
    trials = (
        tried(0.1 + 0.2, 1 / 3, lr=1e-5),
        # Numbers in YAML 1.2.
        Tried(values={LR: 1e-7}, cells=("6113e3820904", "123456789012"), scores=("failed: nan", 0.5)),
    )
    written = Choices(choices=(Choice(**setting._asdict(), values={LR: 1e-5}, epochs=3, trials=trials),))
    write_choices(tmp_path / "choices.yaml", written)
    assert read_choices(tmp_path / "choices.yaml") == written
    assert read_choices(tmp_path / "nowhere.yaml") == Choices()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("choices:\n- {dataset: digits, model: resnet8, values: {}}\n", ":2: choices.quantizer: is required"),
        ("choice: []\n", ":1: choice: unknown key 'choice'; did you mean 'choices'?"),
        ("- a\n", ":1: a file of choices is a mapping with the keys choices"),
        (
            "choices:\n" + "- {dataset: digits, model: resnet8, quantizer: bc, values: {}}\n" * 2,
            ": digits/resnet8/bc has two choices",
        ),
    ],
)
def test_a_bad_file_of_choices_is_told_with_its_line(tmp_path: Path, text: str, line: str) -> None:
    path = tmp_path / "choices.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ChoicesError) as caught:
        read_choices(path)
    assert str(caught.value).startswith(f"{path}{line}")


def test_a_choice_with_impossible_values_is_refused_by_name(tmp_path: Path) -> None:
    wrong = Choices(choices=(Choice(dataset="digits", model="resnet8", quantizer="fp", values={LR: -1}),))
    with pytest.raises(ChoicesError, match=r"the choice for digits/resnet8/fp: training\.learning_rate: "):
        grid_of(tmp_path).resolve(wrong)


def test_a_trial_neither_reads_nor_needs_the_test_set(tmp_path: Path) -> None:
    """Fashion-MNIST's test files are damaged, so opening them would fail."""
    place = tmp_path / "data" / "fashion-mnist"
    _small_fashion_mnist(place)
    for part in ("images-idx3", "labels-idx1"):
        (place / f"t10k-{part}-ubyte.gz").write_bytes(b"not for trials")
    cell = tiny_cell(dataset="fashion-mnist", data={"validation_fraction": 0.5}, training__batch_size=8, trial=True)
    run = RunDir.create(tmp_path / "runs" / cell.id, cell)
    train(run, tmp_path / "data")
    result = read_json(run.result_path)
    assert {"val_top1_hard", "val_top1_soft"} <= result.keys()
    assert not any(key.startswith("top1") or "test" in key for key in result)
    assert not run.predictions_path.exists()
    assert "test/" not in run.journal.read_text(encoding="utf-8")
    with pytest.raises(Exception, match=r"gzip|not a gzipped|Not a gzipped"):
        datasets.load("fashion-mnist", tmp_path / "data")


def _small_fashion_mnist(place: Path) -> None:
    place.mkdir(parents=True)
    for name, count in (("train", 40), ("t10k", 10)):
        images = np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for kind, head, array in (("images-idx3", 16, images), ("labels-idx1", 8, labels)):
            (place / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(bytes(head) + array.tobytes()))


def test_class_folders_without_a_test_split_do_for_a_trial(lamps: Path) -> None:
    (lamps / "test").rename(lamps / "val")
    source = datasets.load("folder/lamps", lamps.parent, with_test=False)
    assert source.test is None
    assert source.validation is not None
    with pytest.raises(DataError, match="test: not there"):
        datasets.load("folder/lamps", lamps.parent)


def test_a_trial_is_scored_as_its_network_would_be_deployed() -> None:
    """With hard weights, on the validation part, after the recipe's steps for deployment."""
    trainer = Trainer(tiny_cell(trial=True, training__reestimate_norm=True), Layout(), NOWHERE, None)
    assert trainer.loaders.final is trainer.loaders.validation
    soft, hard = trainer.test()
    assert len(hard.right) == len(trainer.loaders.final.reader.labels) == 144
    assert len(soft.right) == 144


def test_a_trial_of_a_data_set_without_validation_is_refused(lamps: Path) -> None:
    cell = tiny_cell(
        dataset="folder/lamps",
        data={"validation_fraction": 0.0, "image_size": 8},
        training__batch_size=2,
        trial=True,
    )
    with pytest.raises(DataError, match="no validation part, which trials are scored on"):
        Trainer(cell, Layout(), lamps.parent, None)


def test_cells_that_tune_nothing_are_unchanged(make_cell: Callable[..., Cell]) -> None:
    assert make_cell().model_copy(update={"trial": True}).id != make_cell().id
    assert make_cell().name.endswith("/s0")
