"""A report as one HTML page that needs nothing else, and as Markdown with its pictures beside it."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from couplings.ablation.files import written_atomically
from couplings.report import couplings_part, training_part
from couplings.report.reading import Read
from couplings.report.sections import Entry, Figure, Picture, Section, Table
from couplings.report.significance import TEST

__all__ = ["build", "to_html", "to_markdown", "write"]

_STYLE = """
:root { color-scheme: light; --line: #d8dde3; --quiet: #5b6570; --accent: #0072b2; }
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; color: #1b2027;
  background: #fff; max-width: 62rem; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 2.75rem 0 .5rem; padding-top: .75rem;
  border-top: 1px solid var(--line); }
p { margin: .6rem 0; max-width: 46rem; overflow-wrap: anywhere; }
nav ul { columns: 2; column-gap: 2rem; padding-left: 1.1rem; margin: .5rem 0; }
a { color: var(--accent); text-decoration: none; } a:hover { text-decoration: underline; }
.table { margin: 1.25rem 0; } .scroll { overflow-x: auto; }
.table p, figcaption { color: var(--quiet); font-size: .875rem; line-height: 1.45; margin: 0 0 .4rem; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem .3rem 0; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
thead th { border-bottom: 1.5px solid #1b2027; font-weight: 600; vertical-align: bottom; }
tbody td { border-bottom: 1px solid var(--line); }
td.best { font-weight: 700; }
td.tied { text-decoration: underline; text-decoration-color: var(--accent); text-underline-offset: 3px; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); gap: 1rem 1.5rem; }
figure { margin: 1rem 0; min-width: 0; } figure svg { display: block; width: 100%; height: auto; max-width: 34rem; }
.images { display: flex; flex-wrap: wrap; gap: 1rem 2rem; margin: .5rem 0; }
.images img { image-rendering: pixelated; width: 20rem; max-width: 100%; display: block; }
.images span { display: block; font-size: .875rem; }
code, pre { font: .8125rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { background: #f4f6f8; padding: .7rem .9rem; overflow-x: auto; border-radius: 4px; white-space: pre-wrap;
  overflow-wrap: anywhere; }
ul { padding-left: 1.2rem; } li { margin: .2rem 0; overflow-wrap: anywhere; }
@media (max-width: 40rem) { body { padding: 1rem .9rem 3rem; font-size: 15px; } nav ul { columns: 1; }
  h1 { font-size: 1.45rem; } table { font-size: .8125rem; } }
@media print { @page { size: A4; margin: 14mm; } body { max-width: none; padding: 0; font-size: 10pt; }
  nav { display: none; } h2 { break-after: avoid; margin-top: 1.5rem; } .scroll { overflow: visible; }
  .table, figure { break-inside: avoid; } table { font-size: 7.5pt; } th, td { padding: .15rem .45rem .15rem 0; }
  thead th { white-space: normal; } .plots { grid-template-columns: 1fr 1fr; } pre { border: 1px solid var(--line); } }
"""


def build(read: Read) -> list[Section]:
    """Make all sections.

    Parameters
    ----------
    read : Read

    Returns
    -------
    list of Section
        Results first, then how they came about.
    """
    found = [*couplings_part.sections(read.cells), *training_part.sections(read.training)]
    reading = Section("How to read the tables", [TEST])
    return [*found, reading, *_origins(read)]


def _origins(read: Read) -> list[Section]:
    # What runs have in common is said once.
    alike: dict[str, list[dict[str, Any]]] = {}
    for run in read.runs:
        common = {name: value for name, value in run.items() if name not in ("date", "load", "commit", "command")}
        alike.setdefault(str(common), []).append(run)
    machine: list[Any] = []
    for runs in alike.values():
        run = runs[0]
        devices = ", ".join(device["name"] for device in run["devices"]) or "no GPU"
        packages = ", ".join(f"{name} {version}" for name, version in sorted(run["packages"].items()))
        dates = dict.fromkeys(
            f"{each['date'][:16].replace('T', ' ')} UTC" + (f" (load {each['load']:g})" if each.get("load") else "")
            for each in runs
        )
        commits = dict.fromkeys(str(each["commit"]) for each in runs if each["commit"])
        machine.append(
            f"{run['cpu']}, {run['cpus']} processors, {run['threads']} thread{'s' * (run['threads'] != 1)} where time "
            f"was taken, {devices}; {run['platform']}; couplings {run['couplings']}"
            f"{' at commit ' if commits else ''}{', '.join(commits)}, Python {run['python']}. {packages}. "
            f"Begun {', '.join(dates)}; a load above the number of processors means that others were using them."
        )
    if any(str(run["commit"]).endswith("+") for run in read.runs):
        machine.append("+: with changes that were not committed.")
    commands = list(dict.fromkeys(run["command"] for run in read.runs if run["command"]))
    again = Section("How to reproduce", [])
    if commands:
        again.parts.append("```\n" + "\n".join([*commands, f"couplings report {' '.join(read.names)}"]) + "\n```")
    grid = Section("Grid", _grid(read))
    remarks = Section(
        "Skipped, failed or warned", ["- " + "\n- ".join(read.troubles)] if read.troubles else ["Nothing."]
    )
    return [section for section in (grid, remarks, Section("Machine and versions", machine), again) if section.parts]


def _grid(read: Read) -> list[Any]:
    parts: list[Any] = []
    cells = read.cells
    if cells:
        lines = []
        for axis in ("data", "n", "metric", "quantize", "condition", "scope", "ranks"):
            lines.append(f"- {axis}: {', '.join('none' if v is None else str(v) for v in cells.each(axis))}")
        lines.append(f"- method: {', '.join(cells.labels)}")
        seeds = sorted({seed for series in cells.series for seed in series.by_seed})
        lines.append(f"- seed: {', '.join(map(str, seeds))}")
        count = sum(len(series.by_seed) for series in cells.series)
        parts += [f"{count} couplings were measured, of the combinations that the tables show, on these axes:"]
        parts.append("\n".join(lines))
    trained = [record for record in read.training if record["task"] == "training"]
    if trained:
        arms = "; ".join(dict.fromkeys(record["arm"] for record in trained))
        parts.append(f"{len(trained)} models were trained: {arms}.")
    return parts


def write(read: Read, html_path: Path | None, markdown_path: Path | None, title: str, *, force: bool) -> list[Path]:
    """Write the report.

    Parameters
    ----------
    read : Read
    html_path, markdown_path : Path or None
        Where; None for not at all.
    title : str
    force : bool
        Overwrite.

    Returns
    -------
    list of Path
        What was written: the pictures of the Markdown too.

    Raises
    ------
    ImportError
        Without Matplotlib.
    OSError
        If a file cannot be written, or exists without `force`.
    """
    sections = build(read)
    written: list[Path] = []

    def put(path: Path, content: bytes) -> None:
        with written_atomically(path, force=force) as file:
            file.write(content)
        written.append(path)

    if html_path is not None:
        put(html_path, to_html(sections, title).encode())
    if markdown_path is not None:
        text, pictures = to_markdown(sections, title, markdown_path.stem)
        put(markdown_path, text.encode())
        for name, content in pictures.items():
            put(markdown_path.parent / name, content)
    return written


# -- HTML


def _inline(text: str) -> str:
    """Escape, but for bold between pairs of stars."""
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", html.escape(text))


def _paragraph(text: str) -> str:
    if text.startswith("```"):
        return f"<pre>{html.escape(text.strip('`').strip())}</pre>"
    if text.startswith("- "):
        items = "".join(f"<li>{_inline(line[2:])}</li>" for line in text.splitlines())
        return f"<ul>{items}</ul>"
    return f"<p>{_inline(text)}</p>"


def _html_table(table: Table) -> str:
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in table.head)
    rows = []
    for row in table.rows:
        fields = []
        for entry in row:
            text, mark = (entry.text, entry.mark) if isinstance(entry, Entry) else (entry, "")
            fields.append(f'<td class="{mark}">{html.escape(text)}</td>' if mark else f"<td>{html.escape(text)}</td>")
        rows.append(f"<tr>{''.join(fields)}</tr>")
    return (
        f'<div class="table"><p>{_inline(table.caption)}</p><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></div>"
    )


def _html_figure(figure: Figure) -> str:
    return f"<figure>{''.join(figure.panels)}<figcaption>{_inline(figure.caption)}</figcaption></figure>"


def _html_picture(picture: Picture) -> str:
    images = "".join(
        f"<div><span>{html.escape(title)}</span>"
        f'<img alt="{html.escape(title)}" src="data:image/png;base64,{png}"></div>'
        for title, png in picture.images.items()
    )
    return f'<figure><div class="images">{images}</div><figcaption>{_inline(picture.caption)}</figcaption></figure>'


def to_html(sections: Sequence[Section], title: str) -> str:
    """Lay the sections out as one page.

    Parameters
    ----------
    sections : sequence of Section
    title : str

    Returns
    -------
    str
        With its style, its plots as SVG and its images in it.
    """
    links = "".join(
        f'<li><a href="#s{i}">{html.escape(section.title)}</a></li>' for i, section in enumerate(sections)
    )  # fmt: skip
    body = [f"<h1>{html.escape(title)}</h1>", f"<nav><ul>{links}</ul></nav>"]
    for i, section in enumerate(sections):
        body.append(f'<h2 id="s{i}">{html.escape(section.title)}</h2>')
        plots: list[str] = []
        for part in section.parts:
            if isinstance(part, Figure):
                plots.append(_html_figure(part))
                continue
            body += [f'<div class="plots">{"".join(plots)}</div>'] if plots else []
            plots = []
            body.append(_HTML[type(part)](part))
        body += [f'<div class="plots">{"".join(plots)}</div>'] if plots else []
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


_HTML: Mapping[type, Callable[[Any], str]] = {
    str: _paragraph,
    Table: _html_table,
    Figure: _html_figure,
    Picture: _html_picture,
}


# -- Markdown


def _markdown_table(table: Table) -> str:
    def text(entry: Entry | str) -> str:
        if isinstance(entry, str):
            return entry.replace("|", "\\|")
        return {"best": f"**{entry.text}**", "tied": f"<u>{entry.text}</u>"}.get(entry.mark, entry.text)

    lines = [
        list(table.head),
        ["---", *["---:"] * (len(table.head) - 1)],
        *([text(e) for e in row] for row in table.rows),
    ]
    return table.caption + "\n\n" + "\n".join(f"| {' | '.join(fields)} |" for fields in lines)


def to_markdown(sections: Sequence[Section], title: str, stem: str) -> tuple[str, dict[str, bytes]]:
    """Lay the sections out as Markdown.

    Parameters
    ----------
    sections : sequence of Section
    title : str
    stem : str
        What the names of the pictures begin with.

    Returns
    -------
    str, dict
        The text, and the contents of the pictures that it shows, by file name.
    """
    parts, pictures = [f"# {title}"], {}
    for section in sections:
        parts.append(f"## {section.title}")
        for part in section.parts:
            if isinstance(part, Table):
                parts.append(_markdown_table(part))
            elif isinstance(part, Figure):
                for i, panel in enumerate(part.panels):
                    name = f"{stem}-{part.name}{f'-{i}' if i else ''}.svg"
                    pictures[name] = panel.encode()
                    parts.append(f"![{part.caption}]({name})")
                parts.append(part.caption)
            elif isinstance(part, Picture):
                for i, (each, png) in enumerate(part.images.items()):
                    name = f"{stem}-{part.name}-{i}.png"
                    pictures[name] = base64.b64decode(png)
                    parts.append(f"{each}:\n\n![{each}]({name})")
                parts.append(part.caption)
            else:
                parts.append(part)
    return "\n\n".join(parts) + "\n", pictures
