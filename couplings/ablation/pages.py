"""Pages of tables and figures, as HTML and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import jinja2
import pandas as pd

from couplings.ablation.plots import Figure
from couplings.ablation.significance import marks

__all__ = ["Section", "Table", "markdown", "mean_and_spread", "page", "table_by"]


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes
    ----------
    caption : str
    frame : DataFrame
        Of strings. The index names the rows, and the name of the index is the headline of the first column.
    marks : DataFrame
        ``"best"``, ``"tied"`` or ``""`` for fields of `frame`; fields that it does not have are not marked.
    words : bool
        Whether the fields are words rather than numbers: aligned to the left, and broken into lines.
    """

    caption: str
    frame: pd.DataFrame
    marks: pd.DataFrame = field(default_factory=pd.DataFrame)
    words: bool = False


@dataclass(frozen=True)
class Section:
    """A headline and what stands below it, in this order; `code` is shown as it is."""

    title: str
    text: str = ""
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    code: str = ""


def mean_and_spread(values: pd.Series, show: str) -> str:
    """Write a mean and the standard deviation.

    Parameters
    ----------
    values : Series
        One for each seed; missing ones are left out.
    show : str
        Format of a number, such as ``"{:.2%}"``.

    Returns
    -------
    str
        Without the standard deviation if there is one value, and empty if there is none.
    """
    if not values.count():
        return ""
    mean = show.format(values.mean())
    return mean if values.count() == 1 else f"{mean} ± {show.format(values.std()).rstrip('%')}"


def table_by(
    cells: pd.DataFrame,
    caption: str,
    across: str,
    value: str,
    show: str,
    *,
    better: str | None = None,
    logarithms: bool = False,
    head: str = "{}",
) -> Table:
    """Make a table of means over seeds.

    Parameters
    ----------
    cells : DataFrame
        A row for each measurement, with the columns ``label``, ``seed``, `across` and `value`, and ``biased``: whether
        the label is left out of the search for the best.
    caption : str
    across : str
        The column of `cells` whose values become the columns of the table; numbers are sorted.
    value : str
        The column of `cells` that is shown.
    show : str
        Format of a number.
    better : str, optional
        ``"higher"`` or ``"lower"``: the best row of each column is marked, if there are several.
    logarithms : bool
        Compare logarithms: for what varies by factors, such as time.
    head : str
        Format of the headline of a column.

    Returns
    -------
    Table
    """
    cells = cells.dropna(subset=[value])
    fields, marked = {}, {}
    for name, group in cells.groupby(across, sort=pd.api.types.is_numeric_dtype(cells[across])):
        title = head.format(name)
        samples = group.pivot_table(index="seed", columns="label", values=value, sort=False)
        fields[title] = samples.apply(mean_and_spread, show=show)
        compared = samples.drop(columns=group.loc[group["biased"], "label"].unique())
        if better is not None and compared.shape[1] > 1:
            marked[title] = marks(compared.map(math.log) if logarithms else compared, higher=better == "higher")
    rows = pd.Index(cells["label"].unique(), name="method")
    frame, marked_frame = (pd.DataFrame(each, index=rows).astype(object).fillna("") for each in (fields, marked))
    return Table(caption, frame, marked_frame)


def page(title: str, sections: Sequence[Section]) -> str:
    """Lay sections out as one HTML page that needs no other file."""
    return _TEMPLATES.get_template("page.html.j2").render(title=title, sections=sections)


def markdown(title: str, sections: Sequence[Section], stem: str) -> tuple[str, dict[str, bytes]]:
    """Lay sections out as Markdown.

    Returns
    -------
    str, dict
        The page, and the contents of its figures by the names of their files, which begin with `stem`.
    """
    figures = {f"{stem}-{figure.file}": figure.content for section in sections for figure in section.figures}
    return _TEMPLATES.get_template("page.md.j2").render(title=title, sections=sections, stem=stem), figures


_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("couplings.ablation"),
    autoescape=jinja2.select_autoescape(["html.j2"]),
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    undefined=jinja2.StrictUndefined,
)
