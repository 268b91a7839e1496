"""Sections on training, of what ``python -m benchmarks.ablation`` recorded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from couplings.report import figures, paper
from couplings.report.sections import Entry, Picture, Samples, Section, Table, column

__all__ = ["sections"]

Record = dict[str, Any]
Rows = list[list[Entry | str]]


def sections(records: Sequence[Record]) -> list[Section]:
    """Make the sections that the records allow.

    Parameters
    ----------
    records : sequence of dict

    Returns
    -------
    list of Section
    """
    found = []
    trained = [record for record in records if record["task"] == "training"]
    for data in dict.fromkeys(record["data"] for record in trained):
        of_data = [record for record in trained if record["data"] == data]
        for objective in dict.fromkeys(record["objective"] for record in of_data):
            found.append(
                _objective([record for record in of_data if record["objective"] == objective], data, objective)
            )
    if trained:
        found.append(_paper())
    equal = [record for record in records if record["task"] == "equality"]
    if equal:
        found.append(_equal(equal))
    pictures = [record for record in records if record["task"] == "one step"]
    if pictures:
        found.append(_one_step(pictures))
    return found


def _arms(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(record["arm"] for record in records))


def _label(record: Record) -> str:
    biased = record["coupling"]["method"] == "nearest"
    return f"{record['arm']} †" if biased else str(record["arm"])


def _frechet(records: Sequence[Record], arm: str, step: int, nfe: int) -> Samples:
    return {
        record["seed"]: each["frechet"]
        for record in records
        if record["arm"] == arm
        for each in record["frechet"]
        if (each["step"], each["nfe"]) == (step, nfe)
    }


def _objective(records: Sequence[Record], data: str, objective: str) -> Section:
    arms = _arms(records)
    labels = {record["arm"]: _label(record) for record in records}
    barred = [arm for arm in arms if labels[arm].endswith("†")]
    last = max(each["step"] for record in records for each in record["frechet"])
    steps = sorted({each["step"] for record in records for each in record["frechet"]})
    everywhere = sorted({each["nfe"] for record in records for each in record["frechet"]})
    # Sampling steps at which every checkpoint was measured.
    along = sorted({each["nfe"] for record in records for each in record["frechet"] if each["step"] != last})
    seeds = sorted({record["seed"] for record in records})
    first = records[0]
    section = Section(
        f"Training: {objective}, {data}",
        [
            f"{first['steps']:,} steps of {first['rows']} rows; seed{'s' * (len(seeds) > 1)} "
            f"{', '.join(map(str, seeds))}. Frechet distance of {first['samples']:,} samples to the data, in the "
            "features of a small classifier: lower is better, and not comparable with other features. Mean ± standard "
            "deviation over seeds; the arms of a seed differ in the pairing only."
        ],
    )

    def table(caption: str, head: Sequence[str], columns: Sequence[dict[str, Samples]]) -> Table:
        shown = [column(each, "{:.0f}", higher=False, barred=barred) for each in columns]
        rows: Rows = [[labels[arm], *(each.get(arm, "") for each in shown)] for arm in arms]
        return Table(caption, ["coupling", *head], rows)

    section.parts.append(
        table(
            "By sampling steps, at the end of training (the form of the paper's Table 5).",
            [f"{nfe} step{'s' * (nfe > 1)}" for nfe in everywhere],
            [{arm: _frechet(records, arm, last, nfe) for arm in arms} for nfe in everywhere],
        )
    )
    for nfe in along:
        section.parts.append(
            table(
                f"Along training, {nfe} sampling step{'s' * (nfe > 1)} (the form of the paper's Table 4).",
                [f"at {step}" for step in steps],
                [{arm: _frechet(records, arm, step, nfe) for arm in arms} for step in steps],
            )
        )
    cost: dict[str, Samples] = {}
    columns = []
    for field, factor, show in (("reduction", 100, "{:.2f}%"), ("loss", 1, "{:.4f}"), ("coupling_ms", 1, "{:.2f}")):
        cost = {arm: {r["seed"]: factor * r[field] for r in records if r["arm"] == arm} for arm in arms}
        columns.append(column(cost, show, higher=None))
    share = {
        arm: {r["seed"]: 100 * r["coupling_ms"] / r["step_ms"] for r in records if r["arm"] == arm} for arm in arms
    }
    columns.append(column(share, "{:.1f}%", higher=None))
    rows: Rows = [[labels[arm], *(each.get(arm, "") for each in columns)] for arm in arms]
    head = ["coupling", "reduction", "loss at the end", "ms of coupling", "share of a step"]
    section.parts.append(Table("What the coupling did in training, and what it took.", head, rows))
    shown = [figures.Line(labels[arm], {nfe: _frechet(records, arm, last, nfe) for nfe in everywhere}) for arm in arms]
    plots = [
        figures.Plot(
            "frechet-nfe",
            f"Frechet distance against sampling steps: {objective}.",
            figures.lines(
                shown, f"{objective}, {last} training steps", "sampling steps", "Frechet distance", log_y=True
            ),
        )
    ]
    for nfe in along:
        shown = [figures.Line(labels[arm], {step: _frechet(records, arm, step, nfe) for step in steps}) for arm in arms]
        title = f"{objective}, {nfe} sampling step{'s' * (nfe > 1)}"
        plots.append(
            figures.Plot(
                f"frechet-steps-{nfe}",
                f"Frechet distance against training steps: {title}.",
                figures.lines(shown, title, "training steps", "Frechet distance", log_x=False, log_y=True),
            )
        )
    section.parts += figures.drawn(plots, f"{objective} {data}")
    return section


def _paper() -> Section:
    """Print the paper's own tables, for their form."""
    along: Rows = [
        [name, *(f"{value:.2f}" for value in values.values())] for name, values in paper.TABLE_4.items()
    ]  # fmt: skip
    by_nfe: Rows = [[name, *(f"{value:g}" for value in values.values())] for name, values in paper.TABLE_5.items()]
    return Section(
        "The paper's tables 4 and 5, for comparison of their form",
        [
            f"{paper.SOURCE}: DDIM on CIFAR-10 with epsilon prediction, Inception features. None of it was measured "
            "here, and no value compares with ours.",
            Table(
                "Table 4: along training, thousand steps.",
                ["coupling", *(f"{step:g}" for step in paper.TABLE_4["l2"])],
                along,
            ),
            Table("Table 5: by sampling steps.", ["coupling", *map(str, paper.TABLE_5["l2"])], by_nfe),
        ],
    )


def _equal(records: Sequence[Record]) -> Section:
    rows: Rows = [
        [
            ", ".join(record["of"]),
            f"{record['objective']}, {record['data']}",
            str(record["batches"]),
            f"{record['largest_difference']:.1e}",
            f"{100 * record['same_pairs']:.1f}%",
        ]
        for record in records
    ]
    caption = (
        "One of each group was trained. On the batches of its training: the largest relative difference between the "
        "costs that the group reaches, in float64, and the least share of rows with the same noise."
    )
    head = ["methods", "batches of", "number", "largest difference", "same pairs"]
    return Section("Methods that make the same pairs", [Table(caption, head, rows)])


def _one_step(records: Sequence[Record]) -> Section:
    parts: list[Any] = [
        "The x0 that a trained model predicts from pure noise, in one evaluation (the form of the paper's figure 3). "
        "Where pairs are random, nothing in the noise tells of the data, and the answer is the mean of all data. "
        "Spread: standard deviation of the predictions, that of the data being 1."
    ]
    for objective in dict.fromkeys(record["objective"] for record in records):
        here = [record for record in records if record["objective"] == objective]
        images = {f"{record['arm']}, spread {record['spread']:.2f}": record["png"] for record in here}
        name = figures.slug(f"one-step {objective} {here[0]['data']}")
        parts.append(Picture(name, f"{objective}, {here[0]['data']}, the same noise.", images))
    return Section("What the model sees in pure noise", parts)
