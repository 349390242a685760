"""Sentences about how a report's numbers were made and judged, and what was not tested, generated from the runs."""

from collections.abc import Iterator, Mapping, Sequence

import pandas as pd

from analysis.compare.comparison import MIN_ARCHITECTURES
from analysis.compare.family import ROW_ORDER
from analysis.compare.table import Table
from analysis.render.words import count, tuning_notes
from analysis.runs.frame import natural_key, shortened
from analysis.runs.provenance import Backgrounds, counted, keys_of
from analysis.stats.power import POWER
from analysis.stats.ranks import MIN_BLOCKS
from analysis.stats.stratified import ALPHA, EXACT_PAIRS, MAX_SAMPLED

_NOTHING = {"", "None", "False", "0", "0.0", "none", "[]"}
_PLACES = (("dataset",), ("model",), ("quantizer",), ("dataset", "model"), ("model", "quantizer"))


WORDS = {
    "training.warmup_epochs": "after {} epochs of warm-up",
    "training.min_learning_rate": "down to a learning rate of {}",
    "training.cooldown_epochs": "which the last {} epochs keep",
    "training.decay_epochs": "decay at epochs {}",
    "training.decay_rate": "by a factor of {}",
    "training.momentum": "momentum {}",
    "training.nesterov": "Nesterov's",
    "training.betas": "betas {}",
    "training.eps": "eps {}",
    "training.layer_decay": "learning rates of layers decayed by {}",
    "training.weight_decay": "weight decay {}",
    "training.loss": "loss {}",
    "training.label_smoothing": "label smoothing {}",
    "training.mixup": "mixup {}",
    "training.cutmix": "cutmix {}",
    "training.dropout": "dropout {}",
    "training.drop_path": "stochastic depth {}",
    "training.clip_grad_norm": "gradients clipped to norm {}",
    "training.clip_grad_value": "gradients clipped to values of {}",
    "training.clip_grad_adaptive": "gradients clipped adaptively by {}",
    "training.ema_decay": "weights averaged with decay {}",
    "training.ema_warmup": "after a warm-up",
    "training.reestimate_norm": "batch norms measured anew",
    "training.precision": "precision {}",
    "distillation.share": "a teacher's share of {} in the loss",
    "distillation.temperature": "at temperature {}",
    "distillation.weights": "of {}",
    "data.image_size": "images of side {}",
    "data.test_size": "tested at side {}",
    "data.progressive_resizing.start": "growing from side {}",
    "data.progressive_resizing.from_epoch": "after epoch {}",
    "data.progressive_resizing.to_epoch": "until epoch {}",
    "data.interpolation": "interpolation {}",
    "data.mean": "means {}",
    "data.std": "deviations {}",
    "data.evaluation_ratio": "of each image's shorter side {} tested",
    "data.crop": "crop {}",
    "data.crop_padding": "of images padded by {}",
    "data.crop_scale": "of shares {} of the area",
    "data.horizontal_flip": "horizontal flips",
    "data.auto_augment": "policy {}",
    "data.color_jitter": "colour jitter {}",
    "data.random_erasing": "random erasing {}",
    "data.repeated_augmentation": "{} augmented copies of an image in a batch",
    "data.validation_fraction": "{} of the training set held out for validation",
    "quantization.update": "update {}",
    "quantization.clip_latents": "latents clipped",
    "quantization.scale": "weights with a real scale for each {}",
    "quantization.full_precision": "full-precision layers: {}",
    "quantization.inputs.quantizer": "inputs binary by {}",
    "quantization.inputs.sharpness.shape": "their mu {}",
    "quantization.inputs.sharpness.start": "from {}",
    "quantization.inputs.sharpness.end": "to {}",
    "quantization.accumulator.bits": "sums of {} bits",
    "quantization.accumulator.slope": "activation slope {}",
    "quantization.accumulator.penalty": "overflow penalty {}",
}
"""Phrase of the methods paragraph for each recipe param that is set; the mu of weights has a phrase of its own."""
_USUAL = {"training.loss": "cross_entropy", "training.precision": "float32", "data.repeated_augmentation": "1"}
"""Values too obvious to mention."""


def design(frame: pd.DataFrame) -> str:
    """`36 runs: 2 models x 6 quantizers x 3 seeds (0, 1, 2) on digits; 36 are done.`"""
    counts = [_plural(len(_values(frame, name)), name) for name in ("model", "quantizer", "seed")]
    done = int((frame["state"] == "done").sum())
    how_many = "all of them done" if done == len(frame) else f"{done} of them done"
    return (
        f"{_plural(len(frame), 'training run')}, {how_many}: {counts[0]} ({shortened(_values(frame, 'model'), 8)}), "
        f"{counts[1]} ({shortened(_values(frame, 'quantizer'), 30)}) and {counts[2]} "
        f"({shortened(_values(frame, 'seed'), 10)}), on {shortened(_values(frame, 'dataset'))}."
    )


def _plural(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _values(frame: pd.DataFrame, column: str) -> list[str]:
    order = {name: place for place, name in enumerate(ROW_ORDER)}
    values = {str(value) for value in frame[column]}
    return sorted(values, key=lambda value: (order.get(value, len(order)), natural_key(value)))


def methods(table: Table, frame: pd.DataFrame) -> Iterator[str]:
    """The report's methods section: measurement, comparison and terms; one paragraph each."""
    inits = {"scratch": "random weights", "pretrained": "published weights", "finetune": "another run of the same seed"}
    tasks = {
        "bw": "binary weights",
        "bwa": "binary weights and activations",
        "bwaa": "binary weights and activations and sums of few bits",
        "ba": "binary activations and real weights",
    }
    what = " and ".join(tasks.get(task, task) for task in _values(frame, "task"))
    start = " or ".join(inits.get(init, init) for init in _values(frame, "init"))
    yield (
        f"{design(frame)} Networks have {what} (task {', '.join(_values(frame, 'task'))}) and start from {start}. A "
        "seed fixes initialisation, order of the data and augmentation; all quantizers of a model and seed share "
        "these, so their results are compared in pairs."
    )
    yield (
        "Accuracy is top-1 on the test set, as a percentage, read once after the last epoch, with every quantized "
        "weight set to exactly −1 or +1 (hard accuracy). Soft accuracy is read with the weights as trained. Shown are "
        "the mean and the sample standard deviation (ddof 1: squares summed are divided by n − 1) over n seeds."
    )
    answers = [answer for block in table.blocks for answer in block.primary]
    if any(answer.n for answer in answers):
        yield from _tests(table)
    if table.is_tuned:
        yield from tuning_notes(table)
    if table.ranks:
        yield (
            "Ranks over models describe and decide nothing: each method has one mean per model, and from "
            f"{MIN_BLOCKS} models on Friedman's test (with Iman and Davenport's F) and Nemenyi's are shown. Both take "
            "models for independent samples; Demšar's blocks are data sets."
        )
    if table.publication:
        yield (
            "Published numbers are compared by two one-sided t tests against the grid's margin, only where the runs "
            f"follow the published protocol, at {ALPHA} divided by the number of published numbers tested."
        )


def _tests(table: Table) -> Iterator[str]:
    size = {block.grid: block.family_size for block in table.blocks if block.family_size}
    family = ", ".join(count(number, "comparison") for number in size.values())
    margin = "none" if table.margin is None else f"{100 * table.margin:g} points"
    yield (
        f"Primary question, one for each binary baseline: is {table.label} different from it on these models? Models "
        "are fixed, seeds are random. The estimate is the mean over the models of the mean paired difference, in "
        "percentage points. The test is a sign-flip test, stratified by model: if the two were interchangeable on "
        "every model, each difference could as well have had the other sign. All 2ⁿ sign patterns of n pairs are tried "
        f"up to n = {EXACT_PAIRS}, and at most {MAX_SAMPLED:,} drawn ones beyond. The statistic is the estimate over "
        "its standard error within models, so that differences between the models do not count as noise. The interval "
        "inverts the same test: it excludes 0 exactly where the test rejects."
    )
    yield (
        f"Family: {family}, run or not. Full precision is no hypothesis, and quantizers that trained identical "
        f"networks count once. Holm's method keeps the chance of even one false difference at {ALPHA:.0%} or below. "
        "Intervals are at the level at which it judged each comparison. n pairs cannot give a p below 2/2ⁿ; if that, "
        f"adjusted, is above {ALPHA} whatever the data, the verdict is that the design is too small."
    )
    yield (
        "Single models are tested only for baselines that the primary family tells apart (gatekeeping), in a second "
        "family of all baselines and models, by Holm's method; the others are estimates. Equivalence within the "
        f"margin declared in the grid ({margin}) takes two one-sided tests of the same kind, by Holm's method over the "
        "same family."
    )
    if any(answer.images for block in table.blocks for answer in block.primary):
        yield (
            "New test images: all runs read the same images. A bootstrap that draws images and seeds, independently, "
            "gives an interval for both."
        )
    yield (
        f"What would be needed is planned for the same test and family, with a power of {POWER:.0%}, from the spread "
        "of these runs' own differences, taken as normal."
    )


def recipes(frame: pd.DataFrame, backgrounds: Backgrounds) -> list[tuple[str, str]]:
    """(which cells, their recipe in words), one pair per distinct recipe, then the schedules of mu."""
    known = [backgrounds[key].recipe for key in keys_of(frame)]
    if not any(known):
        return [("all cells", "no recipe is recorded.")]
    training = _by_text(frame, [_recipe(own) for own in known])
    return [*training, *((f"mu of {who}", text) for who, text in _by_text(frame, [_sharpness(own) for own in known]))]


def _by_text(frame: pd.DataFrame, texts: Sequence[str]) -> list[tuple[str, str]]:
    """Groups cells by text: (the shortest names that identify the group, text)."""
    told = frame[["dataset", "model", "quantizer"]].assign(text=list(texts))
    if len(set(texts)) == 1:
        return [("all cells", texts[0])]
    for columns in _PLACES:
        if len(told[list(columns)].drop_duplicates()) == len(told[[*columns, "text"]].drop_duplicates()):
            names = told[list(columns)].agg("/".join, axis=1)
            return [(shortened(dict.fromkeys(names[told["text"] == text]), 20), text) for text in dict.fromkeys(texts)]
    return [(f"{texts.count(text)} cells", text) for text in dict.fromkeys(texts)]


def _recipe(own: Mapping[str, str]) -> str:
    def value(name: str) -> str:
        found = own.get(name, "")
        return "" if found in _NOTHING or found == _USUAL.get(name) else _short(found)

    training = [
        f"{value('training.epochs')} epochs in batches of {value('training.batch_size')}",
        f"{value('training.optimizer')}, learning rate {value('training.learning_rate')}",
        f"{value('training.schedule')} schedule",
    ]
    training += [words.format(found) for name, words in WORDS.items() if (found := value(name))]
    return ", ".join(training) + "."


def _short(number: str) -> str:
    """`2.0` as `2`."""
    return number.removesuffix(".0")


def _sharpness(own: Mapping[str, str]) -> str:
    start, end = (own.get(f"quantization.sharpness.{name}", "None") for name in ("start", "end"))
    if start == "None":
        return "none."
    if end == "None":
        return f"constant at {_short(start)}."
    return f"{own.get('quantization.sharpness.shape', '')} from {_short(start)} to {_short(end)} over training."


def quantizers(frame: pd.DataFrame) -> list[tuple[str, str]]:
    """Names and citations of the quantizers that are in the catalogue."""
    from quantizers import QUANTIZERS

    return [(name, QUANTIZERS[name].citation) for name in _values(frame, "quantizer") if name in QUANTIZERS]


def settings(frame: pd.DataFrame, backgrounds: Backgrounds) -> list[tuple[str, str]]:
    """Every recipe setting with its value or values."""
    known = [backgrounds[key].recipe for key in keys_of(frame)]
    names = sorted({name for own in known for name in own})
    return [(name, counted(own.get(name, "not set") for own in known)) for name in names]


def not_tested(table: Table, frame: pd.DataFrame) -> Iterator[str]:
    """Conclusions that the report does not support."""
    models, datasets = (shortened(_values(frame, column), 8) for column in ("model", "dataset"))
    yield (
        f"Other quantizers against each other: only {table.label} was tested against each of them. A higher row is no "
        "evidence of a better method."
    )
    if not any(block.architectures for block in table.blocks):
        yield f"Other architectures: the answers are about these models; that question takes {MIN_ARCHITECTURES}."
    yield (
        f"Anything beyond {models} on {datasets}: tests are about new seeds of the same models and data, not about "
        "other "
        "data sets. All runs read one test set."
    )
    if table.is_tuned:
        yield (
            "Other recipes: what was not among the tuned knobs is the same for all methods, and may suit one better "
            "than another."
        )
    else:
        yield (
            "Other recipes: no method was tuned here; each was run with the recipe under Methods. Whether that suits "
            "one method better than another, the runs do not tell."
        )
    yield "Curves, flip rates, gaps, profiles and sizes are described, not tested. Memory and energy were not measured."
    if table.margin is None:
        yield "Equality: the grid declares no margin (analysis.margin_points), so equivalence was not tested."
    if table.publication is None:
        yield "Published numbers: none was compared with these runs (--against NAME does)."
