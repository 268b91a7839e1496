"""Tables and figures of what `couplings ablate` recorded: the `couplings report` command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path

import pandas as pd

from couplings._files import written_atomically
from couplings.ablation import pages, plots, records
from couplings.ablation.pages import Section, Table, mean_and_spread, table_by
from couplings.ablation.significance import TEST
from couplings.ablation.sources import BUILT_IN

__all__ = ["prepare", "sections", "table_3", "write"]

PAPER = "Immiscible Diffusion, arXiv 2406.12303"
PAPER_TABLE_3 = {128: (0.0193, 5.4), 256: (0.0216, 6.7), 512: (0.0232, 8.8), 1024: (0.0244, 22.8)}
"""Batch size to reduction of the L2 distance, and milliseconds of an assignment, as the paper reports them."""

_MEASURED = (
    *("reduction", "gap", "certified_gap", "agreement", "marginal", "rows", "noise_rows", "rows_used", "drift"),
    *("leakage", "rows_changed", "reduction_lost", "ms", "phases_ms", "peak_bytes", "notes", "skipped", "error"),
    *("broken", "plugin"),
)
"""Fields that all records of an ablation may lack."""

_LEAKAGE = (
    "Leakage: how well the class can be told from the noise, in standard deviations above chance, over all seeds "
    "(Stouffer)."
)


def write(
    paths: Sequence[Path],
    html: Path | None = None,
    markdown: Path | None = None,
    *,
    title: str = "Couplings: an ablation",
    force: bool = False,
) -> list[Path]:
    """Write a report of files of records.

    Parameters
    ----------
    paths : sequence of Path
        Files that `couplings ablate` wrote. A cell that is in several is taken from the last.
    html : Path, optional
        One page that needs no other file.
    markdown : Path, optional
        A page whose figures are put beside it.
    title : str
    force : bool
        Overwrite.

    Returns
    -------
    list of Path
        What was written.

    Raises
    ------
    ValueError
        If a file holds other records, or none that can be reported.
    OSError
        If a file cannot be read or written, or exists without `force`.
    """
    try:
        made = sections(paths)
    except (AttributeError, LookupError, TypeError) as error:  # fields that another program, or damage, filled
        told = f"{', '.join(map(str, paths))}: a field holds what couplings ablate does not write"
        msg = f"{told} ({type(error).__name__}: {error})."
        raise ValueError(msg) from error
    files: dict[Path, bytes] = {}
    if html is not None:
        files[html] = pages.page(title, made).encode()
    if markdown is not None:
        text, figures = pages.markdown(title, made, markdown.stem)
        files[markdown] = text.encode()
        files |= {markdown.with_name(name): content for name, content in figures.items()}
    for path, content in files.items():
        with written_atomically(path, force=force) as file:
            file.write(content)
    return list(files)


def sections(paths: Sequence[Path]) -> list[Section]:
    """Make all sections that the records allow: results first, then how they came about."""
    found = records.read_records(paths)
    cells = prepare(found)
    troubles = _troubles(cells)
    measured = cells.dropna(subset="reduction")
    plain = measured.query("scope == 'local' and quantize == 'none' and condition == 'none'")
    made = [
        Section("As in the paper: reduction and time by batch size", tables=table_3(measured)),
        *(_methods(of_data, str(data)) for data, of_data in plain.groupby("data", sort=False)),
        Section("Metrics", tables=_metrics(plain)),
        Section("Number formats", tables=_number_formats(measured)),
        Section("Classes", tables=_classes(measured)),
        Section("Over ranks", tables=_ranks(measured)),
        Section("How to read the tables", TEST),
        Section("Grid", tables=[_grid(measured), *_plugins(cells)]),
        Section("Skipped, failed or warned", "" if troubles else "Nothing.", troubles),
        *_origins(found, paths),
    ]
    return [section for section in made if section.text or section.tables or section.code]


def prepare(found: pd.DataFrame) -> pd.DataFrame:
    """Put what was measured of each cell into the form that the tables are made of.

    Parameters
    ----------
    found : DataFrame
        From `couplings.ablation.records.read_records`.

    Returns
    -------
    DataFrame
        That of `couplings.ablation.records.cells`, and ``biased``: whether the method chooses its noise (its ``label``
        ends in †), or was measured to break the marginal that it declares (‡, in all its cells). ``quantize`` and
        ``condition`` are "none" where there is none, ``leakage`` and ``drift`` are numbers.

    Raises
    ------
    ValueError
        If there are other records, or none.
    """
    others = set(found.get("task", ())) - {"run", "quality", "time"}
    cells = pd.DataFrame() if others else records.cells(found)
    if cells.empty:
        got = f"records of {', '.join(sorted(map(str, others)))}" if others else "no records"
        msg = f"a report is made of what couplings ablate recorded, but the files hold {got}."
        raise ValueError(msg)
    cells = cells.reindex(columns=cells.columns.union(_MEASURED, sort=False))
    selected = cells["marginal"] == "selected"
    broken = cells["broken"].notna().groupby(cells["label"]).transform("any")
    cells["biased"] = selected | broken
    cells["label"] += selected.map({True: " †", False: ""}) + broken.map({True: " ‡", False: ""})
    cells[["quantize", "condition"]] = cells[["quantize", "condition"]].fillna("none")
    cells["leakage"] = cells["leakage"].map(itemgetter("z"), na_action="ignore")
    cells["drift"] = cells["drift"].map(itemgetter("norm"), na_action="ignore")
    return cells


# -- results


def table_3(cells: pd.DataFrame) -> list[Table]:
    """Lay out the form of the paper's Table 3, its figures beside ours.

    Parameters
    ----------
    cells : DataFrame
        From `prepare`.

    Returns
    -------
    list of Table
        Empty where nothing was measured with its settings: l2, fp16, 32x32x3 crops.
    """
    there = "data == 'crops32' and metric == 'l2' and quantize == 'fp16' and condition == 'none' and scope == 'local'"
    cells = cells.query(there).sort_values("n")
    phases = cells["phases_ms"]
    cells["assignment"] = phases.map(lambda ms: ms["conversion"] + ms["solve"], na_action="ignore")
    ours, scipy = (cells[cells["label"] == name].groupby("n") for name in ("auction", "hungarian"))
    paper = pd.DataFrame(PAPER_TABLE_3, index=["reduction", "ms"]).T
    columns = {
        "paper: reduction": _shown(paper["reduction"], "{:.2%}"),
        "ours: reduction": _means(ours["reduction"], "{:.2%}"),
        "paper: ms": _shown(paper["ms"], "{:.1f}"),
        "ours: ms": _means(ours["assignment"], "{:.1f}"),
        "ours, scipy: ms": _means(scipy["assignment"], "{:.1f}"),
        "whole call: ms": _means(ours["ms"], "{:.1f}"),
    }
    caption = (
        f"Distance reduction and time by batch size: l2, fp16. Paper: CIFAR-10 on its authors' machine ({PAPER}, "
        "Table 3). Ours: other data (crops of photographs) and another machine. Milliseconds of the assignment, by "
        "auction and by scipy, and of the whole call with auction: cost matrix, checks and moving the noise too. "
        "Mean ± standard deviation over seeds."
    )
    return [Table(caption, _frame(list(ours.groups), columns, "batch"))] if len(ours) else []


def _methods(cells: pd.DataFrame, data: str) -> Section:
    """Show methods over batch sizes, under the metric with which most was measured."""
    metric = cells["metric"].value_counts().idxmax()
    cells = cells[cells["metric"] == metric]
    title = f"Methods on {data}"
    if cells["label"].nunique() < 2:
        return Section(title)
    # The largest size at which nearly everything was measured.
    methods = cells.groupby("n")["label"].nunique()
    n = methods.index[methods >= 0.8 * methods.max()].max()
    at_n = cells[cells["n"] == n]
    by_size = partial(table_by, cells, across="n", head="n = {}")
    reduction = "Reduction of the mean distance of the pairs."
    time = "Milliseconds of a call: mean and standard deviation over seeds of the median of its runs."
    tables = [
        by_size(reduction, value="reduction", show="{:.2%}", better="higher"),
        by_size(time, value="ms", show="{:.2f}", better="lower", logarithms=True),
        _promises(at_n, n),
        _phases(at_n.dropna(subset="phases_ms"), n),
    ]
    cells = cells.assign(percent=100 * cells["reduction"])
    lines = partial(plots.lines, cells, "n", xlabel="rows coupled together, n")
    figures = [
        lines("percent", f"Reduction against batch size, {data}", ylabel="distance reduction, %"),
        lines("ms", f"Time of a call against batch size, {data}", ylabel="milliseconds", log_y=True),
        plots.pareto(at_n, f"Reduction against time and its Pareto front, {data}, n = {n}"),
    ]
    rows = BUILT_IN.get(data, f"{data}, rows of {'x'.join(map(str, cells['shape'].iloc[0]))}")
    text = f"{rows}; metric {metric}, no quantizer."
    return Section(title, text, _filled(tables), [figure for figure in figures if figure is not None])


def _promises(cells: pd.DataFrame, n: int) -> Table:
    """Compare methods with the optimum, and show what became of the noise."""
    gap = table_by(cells, "", "n", "gap", "{:.3%}", better="lower", head="gap")
    kept = (cells["rows_used"] / cells["rows"]).where(cells["noise_rows"] == cells["rows"])
    groups = cells.groupby("label", sort=False)
    columns = {
        **gap.frame,
        "certified": groups["certified_gap"].max().map(lambda gap: f"{gap:.0e}" if gap else "0", na_action="ignore"),
        "agrees": _shown(groups["agreement"].mean(), "{:.0%}"),
        "marginal": groups["marginal"].first(),
        "rows kept": _shown(kept.groupby(cells["label"]).mean(), "{:.0%}"),
        "norm drift": _shown(groups["drift"].mean(), "{:+z.2f}"),
        "leakage z": groups["leakage"].agg(_stouffer),
    }
    caption = (
        f"n = {n}. Gap: cost above the exact optimum, in float64. Certified: largest gap that the method's own bound "
        "allows. Agrees: rows paired as in the optimum. Rows kept: share of the noise rows that are there after the "
        "coupling. Norm drift: of the squared norm of the noise, in standard deviations. "
        f"{_LEAKAGE} The couplings here ignore the classes."
    )
    return Table(caption, _frame(cells["label"], columns), gap.marks)


def _phases(cells: pd.DataFrame, n: int) -> Table:
    phases = pd.DataFrame(cells["phases_ms"].tolist(), index=cells["label"]).groupby(level=0).mean()
    memory = cells["peak_bytes"].groupby(cells["label"]).mean() / 2**20
    columns = {**phases.map("{:.2f}".format, na_action="ignore"), "peak MiB": _shown(memory, "{:.1f}")}
    caption = (
        f"n = {n}. Where the milliseconds go, and the memory (MiB) that a call needs beyond its operands. Conversion: "
        "what a solver needs done to the cost; gather: moving the noise; report: the distances that are returned."
    )
    return Table(caption, _frame(cells["label"], columns))


def _metrics(cells: pd.DataFrame) -> list[Table]:
    tables = []
    several = cells[cells.groupby(["data", "n", "label"])["metric"].transform("nunique") > 1]
    for data, of_data in several.groupby("data", sort=False):
        for n, there in of_data.groupby("n"):
            reduction = f"{data}, n = {n}. Reduction, each in its own unit: columns do not compare."
            time = f"{data}, n = {n}. Milliseconds of a call."
            tables += [
                table_by(there, reduction, "metric", "reduction", "{:.2%}", better="higher"),
                table_by(there, time, "metric", "ms", "{:.1f}", better="lower", logarithms=True),
            ]
    return _filled(tables)


def _number_formats(cells: pd.DataFrame) -> list[Table]:
    """Compare number formats with float32, where several were measured."""
    cells = cells.query("scope == 'local' and condition == 'none' and quantize != 'none'")
    several = cells[cells.groupby(["data", "metric", "label", "n"])["quantize"].transform("nunique") > 1]
    several = several.sort_values("label", kind="stable")
    tables = []
    for (data, metric), there in several.groupby(["data", "metric"], sort=False):
        rows = there["label"] + ", " + there["quantize"]
        columns = {}
        for n, at_n in there.groupby("n"):
            groups = at_n.assign(lost=1e4 * at_n["reduction_lost"]).groupby(rows)
            columns[f"n = {n}: rows changed"] = _shown(groups["rows_changed"].mean(), "{:.1%}")
            columns[f"n = {n}: reduction lost"] = _means(groups["lost"], "{:.2f}")
        caption = (
            f"{data}, {metric}, against float32: share of rows that are paired otherwise, and what that costs of the "
            "reduction, in hundredths of a percentage point."
        )
        tables.append(Table(caption, _frame(rows, columns)))
    return tables


def _classes(cells: pd.DataFrame) -> list[Table]:
    """Compare coupling within classes with coupling across them."""
    cells = cells.query("scope == 'local' and quantize == 'none'")
    both = _groups_with(cells, cells["condition"] == "class").sort_values("n", kind="stable")
    tables = []
    for (data, metric), there in both.groupby(["data", "metric"], sort=False):
        rows = there["label"] + ", n = " + there["n"].astype(str)
        columns = {}
        for name, condition in (("across", "none"), ("within", "class")):
            groups = there[there["condition"] == condition].groupby(rows)
            columns[f"{name}: reduction"] = _means(groups["reduction"], "{:.2%}")
            columns[f"{name}: leakage z"] = groups["leakage"].agg(_stouffer)
        caption = f"{data}, {metric}: coupled across all rows, and within the classes only. {_LEAKAGE}"
        tables.append(Table(caption, _frame(rows, columns)))
    return tables


def _ranks(cells: pd.DataFrame) -> list[Table]:
    """Compare coupling over ranks with coupling on each by itself."""
    cells = cells.query("condition == 'none' and quantize == 'none'")
    both = _groups_with(cells, cells["scope"] == "global").sort_values(["n", "label", "ranks"], kind="stable")
    # What ranks send each other, waiting for the others included.
    sent = ("header", "noise", "points", "condition", "costs", "index")
    exchanging = both["phases_ms"].map(lambda ms: sum(ms.get(name, 0.0) for name in sent), na_action="ignore")
    both = both.assign(exchanging=exchanging.where(both["ranks"] > 1))
    tables = []
    for (data, metric), there in both.groupby(["data", "metric"], sort=False):
        where = there["ranks"].map(lambda ranks: "alone" if ranks == 1 else f"on each of {ranks}")
        rows = there["label"] + ", " + there["n"].astype(str) + " rows " + where
        groups = there.groupby(rows)
        columns = {
            "reduction": _means(groups["reduction"], "{:.2%}"),
            "ms": _means(groups["ms"], "{:.1f}"),
            "of it exchanging": _shown(groups["exchanging"].mean(), "{:.1f}"),
        }
        caption = (
            f"{data}, {metric}: one process's rows by themselves, and the rows of all ranks together: gloo processes "
            "of one thread each that share the processors of one machine, so that the times are not those of a cluster."
        )
        tables.append(Table(caption, _frame(rows, columns)))
    return tables


# -- how they came about


def _grid(cells: pd.DataFrame) -> Table:
    values = {}
    for axis in ("data", "n", "label", "metric", "quantize", "condition", "scope", "ranks", "seed"):
        found = cells[axis].sort_values() if axis in ("n", "ranks", "seed") else cells[axis]
        values["method" if axis == "label" else axis] = ", ".join(map(str, found.unique()))
    caption = f"{len(cells)} couplings were measured, of the combinations that the tables show, on these axes."
    return Table(caption, pd.DataFrame({"values": values}).rename_axis("axis"), words=True)


def _plugins(cells: pd.DataFrame) -> list[Table]:
    """Name the packages of the methods that are not built in."""
    found = cells.dropna(subset="plugin").drop_duplicates("label", keep="last").set_index("label")
    if found.empty:
        return []
    frame = pd.DataFrame(found["plugin"].tolist(), index=found.index.rename("method")).fillna("").astype(object)
    return [Table("Methods of other packages; source: a digest of the file with the function.", frame, words=True)]


def _troubles(cells: pd.DataFrame) -> list[Table]:
    reasons = [
        cells["skipped"].map("skipped: {}".format, na_action="ignore"),
        cells["error"].map("failed: {}".format, na_action="ignore"),
        cells["broken"],
        cells["notes"].explode(),
    ]
    reason = pd.concat(reasons).dropna().map(lambda text: " ".join(text.split()))
    # As a rule the same for every seed.
    found = pd.DataFrame({"cell": cells["title"][reason.index], "reason": reason}).drop_duplicates()
    return [Table("", found.set_index("cell"), words=True)] if len(found) else []


def _origins(found: pd.DataFrame, paths: Sequence[Path]) -> list[Section]:
    """Show what the runs were measured on, once where they were alike, and their commands."""
    runs = found[found["task"] == "run"]
    if runs.empty:
        return []
    environments = pd.DataFrame(runs["environment"].tolist())
    names = environments["devices"].map(lambda devices: ", ".join(device["name"] for device in devices) or "none")
    packages = environments["packages"].map(lambda versions: ", ".join(map(" ".join, sorted(versions.items()))))
    environments = environments.assign(devices=names, packages=packages).astype(object).fillna("").astype(str)
    changing = ["commit", "date", "load"]
    alike = environments.groupby([*environments.columns.drop(changing)], sort=False)
    frame = alike[changing].agg(lambda values: ", ".join(values.unique())).reset_index()[environments.columns].T
    frame.columns = ["value"] if frame.shape[1] == 1 else [f"value {i + 1}" for i in range(frame.shape[1])]
    caption = (
        "Threads: where time was taken. Load: before a run; above the number of processors, others were using them. A "
        "commit with +: with changes that were not committed."
    )
    commands = [*runs["command"].dropna().unique(), f"couplings report {' '.join(path.name for path in paths)}"]
    return [
        Section("Machine and versions", tables=[Table(caption, frame.rename_axis("property"), words=True)]),
        Section("How to reproduce", code="\n".join(commands)),
    ]


# -- pieces of tables


def _filled(tables: Sequence[Table]) -> list[Table]:
    return [table for table in tables if not table.frame.empty]


def _frame(rows: Sequence[str], columns: Mapping[str, pd.Series], first: str = "method") -> pd.DataFrame:
    """Put columns beside each other; rows in the order of `rows`, which may name them repeatedly."""
    return pd.DataFrame(columns, index=pd.Index(rows, name=first).unique()).astype(object).fillna("")


def _means(groups: pd.api.typing.SeriesGroupBy, show: str) -> pd.Series:
    return groups.agg(mean_and_spread, show=show)


def _shown(values: pd.Series, show: str) -> pd.Series:
    return values.map(show.format, na_action="ignore")


def _stouffer(z: pd.Series) -> str:
    """Combine standard deviations above chance: their sum over the root of their number."""
    return f"{z.sum() / z.count() ** 0.5:+.1f}" if z.count() else ""


def _groups_with(cells: pd.DataFrame, wanted: pd.Series) -> pd.DataFrame:
    """Keep the data, metrics, sizes and methods with which something was measured that is wanted."""
    return cells[wanted.groupby([cells[axis] for axis in ("data", "metric", "n", "label")]).transform("any")]
