"""The report of a matrix as one page that needs nothing else, and the files behind it."""

from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import get_args

import pandas as pd
from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure

from coda_ray.config import Split
from coda_ray.tracking.figures import figure_png
from coda_ray.tracking.findings import Findings
from coda_ray.tracking.report_figures import (
    bar_figure,
    difference_figure,
    example_figure,
    figure_svg,
    granularity_figure,
    layer_figure,
    map_figure,
)
from coda_ray.tracking.report_tables import (
    Table,
    autoencoder_tables,
    data_table,
    difference_tables,
    feature_tables,
    granularity_table,
    score_tables,
)
from coda_ray.tracking.table import OF_SPLIT, matrices, seeds_text, shown

PAGE = "report.html"
TEMPLATE = "page.html"
# Raise it when the page or a file of it changes, so that reports are written anew.
PAGE_VERSION = 2
TERMS = (
    ("source, target", "the laboratory whose labels trained the model, and the one whose images are classified without labels"),
    (
        "accuracy",
        "the share of images whose mechanism of action (MoA) was named rightly; by chance, one in the number of MoAs",
    ),
    ("macro-F1", "the same question, with every MoA counting alike, however many images it has"),
    ("per well, per compound", "the model's answers are averaged over the images of a well, or of a compound, before it decides"),
    ("mean ± std over seeds", "how much the figure changes when the training is repeated from another random start"),
    ("95 % interval over wells", "how much a figure would change with other wells of the same kind"),
    ("source with itself", "the plate that was held out of its training: how well the model does at home"),
    ("compounds held out", "scored on compounds that were in no training: mechanisms recognised, not compounds remembered"),
)
SCORE_WORDS = (
    (
        "replicates against DMSO, against compounds",
        "whether wells of one compound, from different batches, look more like each other than like DMSO wells, or than like "
        "wells of other compounds (normalised mean average precision: 0 by chance, 1 perfect)",
    ),
    ("same MoA", "whether compounds of one mechanism look more like each other than like other compounds (the same scale)"),
    (
        "batches mix",
        "whether images of different batches lie among each other (iLISI, kBET, silhouette: 0 apart, 1 mixed; of iLISI, "
        "neighbours by chance reach about 0.85 with three batches and 0.65 with eight)",
    ),
)


@dataclass(frozen=True)
class Picture:
    """One picture: its file's name, what is above and below it, and the figure."""

    name: str
    title: str
    words: str
    figure: Figure


@dataclass(frozen=True)
class Section:
    """One part of the page."""

    name: str
    title: str
    words: Sequence[str]
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    terms: Sequence[tuple[str, str]] = ()


def report_files(found: Findings) -> dict[str, bytes]:
    """Write a report.

    Parameters
    ----------
    found
        What the matrix found.

    Returns
    -------
    dict
        Name to content: `report.html`, which holds every picture and needs no network, and each picture as PNG and SVG, each
        table, unrounded, as CSV.
    """
    sections = [section for section in _sections(found) if section.tables or section.pictures or section.terms]
    written: dict[str, bytes] = {}
    for section in sections:
        written |= {f"{table.name}.csv": table.data.to_csv(index=False).encode() for table in section.tables}
        for picture in section.pictures:
            written[f"{picture.name}.png"] = figure_png(picture.figure)
            written[f"{picture.name}.svg"] = figure_svg(picture.figure)
    encoded = {name.removesuffix(".png"): b64encode(data).decode() for name, data in written.items() if name.endswith(".png")}
    text = (files("coda_ray.tracking") / TEMPLATE).read_text(encoding="utf-8")
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(text)
    page = template.render(
        title=f"Report: {found.job['name']}",
        facts=_facts(found),
        sections=sections,
        encoded=encoded,
        unfinished=found.unfinished,
        unscored=found.unscored,
        remedy=found.remedy,
        notes=found.notes,
    )
    return {PAGE: page.encode(), **written}


def _facts(found: Findings) -> list[tuple[str, str]]:
    """Say what was compared."""
    frame = found.transfers
    if frame.empty:
        return [("matrix", f"{found.job['key']}, nothing is scored yet"), ("command", found.job["command"])]
    across = frame[frame["source"] != frame["target"]]
    counts = across.groupby("target")[["n_images", "n_wells", "n_compounds"]].max()
    of_targets = [
        f"{target}: {row['n_images']:,} images of {row['n_wells']:,} wells, {row['n_compounds']:,} compounds"
        for target, row in ((name, counts.loc[name]) for name in shown(counts.index.tolist()))
    ]
    names = {column: ", ".join(map(str, shown(frame[column].astype(str).tolist()))) for column in ("source", "method", "seed")}
    return [
        ("sources (trained with labels)", names["source"]),
        ("targets (classified without labels), and the most of each that was scored", "; ".join(of_targets)),
        ("methods", names["method"]),
        ("seeds", names["seed"]),
        ("matrix", found.job["key"]),
        ("command", found.job["command"]),
    ]


def _sections(found: Findings) -> Iterable[Section]:
    """Order everything, as the paper does."""
    tidy = found.matrix
    yield Section("terms", "What the numbers mean", (), terms=TERMS)
    yield Section(
        "images",
        "The images",
        ("What each laboratory brought, and how its images look before and after the only correction that the networks get.",),
        [data_table(found.data)] if len(found.data) else [],
        _examples(found),
    )
    if tidy.empty:
        return
    yield Section(
        "accuracy",
        "Accuracy from source to target",
        (
            "Supervised and dual models know the source alone. ODA and CODA go on learning on the target's images, without "
            "labels; compare each with the dual model it starts from.",
        ),
        score_tables(tidy, "accuracy", "2"),
        [_bars(part) for part in matrices(tidy, "accuracy")],
    )
    yield Section("macro-f1", "Macro-F1", ("Every mechanism counts alike, rare ones too.",), score_tables(tidy, "macro_f1", "4"))
    yield Section(
        "autoencoders",
        "Masked autoencoder and test-time training",
        ("Another way to learn without labels: images are completed from a quarter of their patches.",),
        autoencoder_tables(tidy),
    )
    yield Section(
        "differences",
        "Does it help?",
        (
            "Both methods of a row answered for the same images, so their difference is known better than either accuracy. The "
            "interval comes from drawing whole wells anew; seeds and sources of a target are averaged. It does not tell "
            "how another target, or another source, would fare.",
        ),
        difference_tables(found.differences),
        _differences(found.differences),
    )
    yield Section(
        "granularity",
        "How much to adapt to at once",
        ("The whole target, each of its batches, or each of its plates, with the same number of steps.",),
        pictures=_granularities(found),
    )
    yield Section(
        "features",
        "The features, whatever the classifier says",
        ("Scores of the embeddings before adaptation (the dual models) and after it.",),
        feature_tables(found.transfers),
        [*_maps(found), *_layers(found)],
        SCORE_WORDS,
    )


def _examples(found: Findings) -> list[Picture]:
    """Figure 3."""
    if not found.examples:
        return []
    words = (
        "Each channel is one colour. Left: the prepared tiles. Right: the same as networks see them, each channel of each tile "
        "at zero mean and unit spread (shown to 2.5 standard deviations). Without a bar, the size of a pixel is not known."
    )
    return [Picture("figure-3-examples", "Figure 3: example tiles of each source", words, example_figure(found.examples))]


def _bars(tidy: pd.DataFrame) -> Picture:
    """Figure 7."""
    words = "Bars are means over seeds, whiskers their standard deviation, diamonds the published figures where there are any."
    name = f"figure-7-bars-{_part(tidy)}"
    return Picture(name, f"Figure 7: accuracy by method and target, {_named(tidy)}", words, bar_figure(tidy))


def _differences(differences: pd.DataFrame) -> list[Picture]:
    """Intervals as lines."""
    words = "A line that does not cross zero is a difference that these wells support. Diamond: all targets together."
    return [
        Picture(f"differences-{_part(part)}", f"Differences in accuracy, {_named(part)}", words, difference_figure(part))
        for _, part in differences.groupby(["split", "granularity"], sort=False)
    ]


def _granularities(found: Findings) -> list[Picture]:
    """Figure 4, where there are two granularities or more."""
    table = granularity_table(found.transfers, found.matrix)
    words = (
        "Filled, solid line: scored on the unit that was adapted to. Hollow, broken line: the model of each unit scored on the "
        "whole target, mean over units. Lines across: methods that adapt to no unit."
    )
    pictures = []
    for split in get_args(Split):
        part = table[table["split"] == split]
        if part["granularity"].nunique() > 1:
            name = "figure-4-granularity" + ("" if split == "plate" else f"-{split}")
            title = f"Figure 4: accuracy by granularity{OF_SPLIT[split]}"
            pictures.append(Picture(name, title, words, granularity_figure(part)))
    return pictures


def _maps(found: Findings) -> list[Picture]:
    """Figure 5."""
    words = (
        "Each point is an image; near points look alike to the network. Adaptation should bring images of one MoA together and "
        "batches among each other. Distances between groups, and the axes, mean little."
    )
    return [
        Picture(
            f"figure-5-map-{m.source}-{m.target}", f"Figure 5: map of the features, {m.source} → {m.target}", words, map_figure(m)
        )
        for m in found.maps
    ]


def _layers(found: Findings) -> list[Picture]:
    """Figure 6."""
    words = (
        "How alike two networks see the same images, block by block: 1 alike, 0 unrelated. A bright diagonal means that a block "
        "kept its role. All tokens: the whole image; CLS: the summary that is the embedding."
    )
    return [Picture(f"figure-6-layers-{one.name}", f"Figure 6: {one.title}", words, layer_figure(one)) for one in found.layers]


def _part(tidy: pd.DataFrame) -> str:
    """Name the files of one split and granularity."""
    split, granularity = str(tidy["split"].iloc[0]), str(tidy["granularity"].iloc[0])
    return granularity + ("" if split == "plate" else f"-{split}")


def _named(tidy: pd.DataFrame) -> str:
    """Name one split and granularity, and the seeds, for people."""
    return f"adapted per {tidy['granularity'].iloc[0]}{OF_SPLIT[tidy['split'].iloc[0]]}, {seeds_text(tidy)}"
