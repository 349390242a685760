"""Critical-difference diagram (Demsar 2006): quantizers by average rank over models; Nemenyi's groups as bars."""

from collections.abc import Sequence

from matplotlib.axes import Axes

from analysis.compare.family import FULL_PRECISION
from analysis.compare.table import MIN_METHODS, Block, Ranks, Table
from analysis.render.style import BLACK, BLUE, GREY, Picture, add_caption, file_name, new_figure, warnings
from analysis.runs.frame import shortened
from analysis.stats.ranks import MIN_BLOCKS, Ranking
from analysis.stats.stratified import ALPHA

_NAME_INCHES, _BAR_INCHES, _TOP_INCHES = 0.24, 0.12, 1.6


def critical_differences(table: Table) -> list[Picture]:
    """One diagram per task and init, over the models of all data sets; if the table has no ranks, the reason."""
    pictures = []
    found = {(own.task, own.init): own for own in table.ranks}
    for task, init in dict.fromkeys((block.task, block.init) for block in table.blocks):
        blocks = [block for block in table.blocks if (block.task, block.init) == (task, init)]
        name = file_name("ranks", *(block.grid for block in blocks), task, init)
        if (task, init) in found:
            pictures.append(_diagram(name, found[task, init], blocks, table.findings))
        else:
            pictures.append(Picture(name, None, f"task {task}, init {init}: {_why_not(blocks)}"))
    return pictures


def _why_not(blocks: Sequence[Block]) -> str:
    models = [f"{block.dataset}/{model}" for block in blocks for model in block.models]
    twice = [model for model in dict.fromkeys(models) if models.count(model) > 1]
    if twice:
        return f"no ranks over models, because {shortened(twice)} would count twice; name one grid"
    return (
        f"no ranks over models, which take {MIN_BLOCKS} models or more, and {MIN_METHODS} binary quantizers or more "
        f"measured on all of them; the number of models is {len(models)}"
    )


def _diagram(name: str, ranks: Ranks, blocks: Sequence[Block], findings: tuple[str, ...]) -> Picture:
    ranking, test = ranks.ranking, ranks.ranking.friedman
    num_rows = -(-len(ranking.methods) // 2)
    figure = new_figure(_TOP_INCHES + _NAME_INCHES * num_rows + _BAR_INCHES * len(ranking.groups))
    draw_ranking(figure.subplots(), ranking)
    partial = [
        f"{entry.quantizer} on {entry.model}"
        for block in blocks
        for entry in block.entries
        if 0 < entry.num_done < entry.num_seeds and entry.quantizer != FULL_PRECISION
    ]
    caption = add_caption(
        figure,
        f"Task {ranks.task}, init {ranks.init}: average rank by mean hard test accuracy, 1 is best, over "
        f"{len(ranks.models)} models ({shortened(ranks.models, 8)}). Quantizers joined by a bar are not separable: "
        f"their ranks differ by less than the critical difference, CD = {ranking.critical_difference:.2f} (Nemenyi, "
        f"all pairs together, {ALPHA}). That all are alike: Friedman p = {test.chi2_p:.2g}, Iman and Davenport "
        f"p = {test.f_p:.2g}.",
        f"Left out, without a mean on every model: {', '.join(ranks.incomplete)}." if ranks.incomplete else "",
        f"Means of fewer seeds than others have: {shortened(partial)}." if partial else "",
        warnings(findings),
    )
    return Picture(name, figure, caption)


def draw_ranking(axes: Axes, ranking: Ranking) -> None:
    """Draws the rank axis on top with the best rank left, labelled lines from each method to its rank, and bars below.

    One unit of y is the height of one name. Names are on both sides.
    """
    num = len(ranking.methods)
    half = -(-num // 2)
    first_name = 0.8 + 0.5 * len(ranking.groups)
    axes.set_xlim(1 - 0.22 * num, num + 0.22 * num)
    axes.set_ylim(first_name + half - 0.4, -1.6)
    axes.axis("off")
    axes.plot([1, num], [0, 0], color=BLACK, linewidth=0.8)
    for rank in range(1, num + 1):
        axes.plot([rank, rank], [0, -0.2], color=BLACK, linewidth=0.8)
        axes.text(rank, -0.28, str(rank), ha="center", va="bottom")
    end = 1 + ranking.critical_difference
    axes.plot([1, end], [-1.25, -1.25], "|-", color=GREY, linewidth=1.2, markersize=5)
    axes.text(end + 0.02 * num, -1.25, f"CD = {ranking.critical_difference:.2f}", va="center", color=GREY)
    rank_of = dict(zip(ranking.methods, ranking.average_ranks, strict=True))
    for k, (method, average) in enumerate(rank_of.items()):
        on_left = k < half
        y = first_name + (k if on_left else num - 1 - k)
        edge = 1 - 0.06 * num if on_left else num + 0.06 * num
        axes.plot([average, average, edge], [0, y, y], color=BLACK, linewidth=0.7, label=method)
        words = f"{method}  {average:.2f}" if on_left else f"{average:.2f}  {method}"
        axes.text(edge, y, f" {words} ", ha="right" if on_left else "left", va="center")
    for k, group in enumerate(ranking.groups):
        ends = rank_of[group[0]] - 0.006 * num, rank_of[group[-1]] + 0.006 * num
        axes.plot(ends, [0.5 + 0.5 * k] * 2, color=BLUE, linewidth=3.2, solid_capstyle="butt")
