"""One page about one or several runs, from the files in their folders: HTML that needs no other file, no
script and no network."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

from matplotlib.figure import Figure

from offload_sparse.inspect.report.charts import Chart, sections
from offload_sparse.inspect.report.page_tables import Table, difference_table, paper_tables, summary_table
from offload_sparse.inspect.report.run_data import PAGE_FILE, RunData
from offload_sparse.inspect.report.style import THEMES, Theme, themed

PICTURES_FOLDER = "pictures"
_PIXELS_PER_INCH = 160

_STYLE = """
*{box-sizing:border-box}
body{margin:0;background:var(--background);color:var(--text);
  font:16px/1.5 system-ui,-apple-system,"Segoe UI","DejaVu Sans",sans-serif}
main{max-width:76rem;margin:0 auto;padding:1.25rem 1rem 3rem}
h1{font-size:1.6rem;line-height:1.25;margin:.25rem 0 .5rem;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2rem 0 .75rem;padding-bottom:.3rem;border-bottom:1px solid var(--line)}
p{margin:.4rem 0}
.muted{color:var(--muted);font-size:.9rem;font-weight:400}
.charts{display:grid;gap:1rem;align-items:start;
  grid-template-columns:repeat(auto-fill,minmax(min(100%,23rem),1fr))}
figure{margin:0;background:var(--panel);border:1px solid var(--line);border-radius:.5rem;padding:.6rem}
figure img{display:block;width:100%;height:auto}
figcaption{color:var(--muted);font-size:.85rem;line-height:1.4;padding:.4rem .2rem 0}
.table{overflow-x:auto;margin:.75rem 0;
  background:var(--panel);border:1px solid var(--line);border-radius:.5rem}
table{border-collapse:collapse;width:100%;font-size:.92rem;font-variant-numeric:tabular-nums}
.title{position:sticky;left:0;font-weight:600;padding:.5rem .75rem 0}
.best{font-weight:700}
.best::before{content:"★ "}
th,td{padding:.35rem .75rem;text-align:right;border-top:1px solid var(--line);white-space:nowrap}
th:first-child{text-align:left;font-weight:500;position:sticky;left:0;background:var(--panel)}
thead th{color:var(--muted);font-weight:600;border-top:0}
@media(max-width:44rem){table{font-size:.78rem} th,td{padding:.3rem .4rem}
  th:first-child{max-width:8rem;white-space:normal}}
"""


def write_report(runs: Sequence[RunData], folder: Path) -> Path:
    """Write ``report.html`` and its pictures as PNG files into ``folder``, which is made if it is not there.
    They take the places of an earlier report's; other files stay. Returns the path of the page. Raises
    OSError: a file cannot be written."""
    pictures = folder / PICTURES_FOLDER
    pictures.mkdir(parents=True, exist_ok=True)
    if (folder / PAGE_FILE).is_file():
        for name in THEMES:
            for old in pictures.glob(f"*_{name}.png"):
                old.unlink()
    parts = sections(runs)
    html = "\n".join(_page(runs, parts, pictures))
    (folder / PAGE_FILE).write_text(html, encoding="utf-8")
    return folder / PAGE_FILE


def _page(runs: Sequence[RunData], parts: Mapping[str, Sequence[Chart]], pictures: Path) -> Iterator[str]:
    title = "Run " + runs[0].name if len(runs) == 1 else "Runs " + ", ".join(run.name for run in runs)
    yield "<!doctype html>"
    yield '<html lang="en"><head><meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield '<meta name="color-scheme" content="light dark">'
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    yield f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    yield f"<title>{escape(title)}</title>"
    yield f"<style>{_variables()}{_STYLE}</style></head><body><main>"
    yield f"<h1>{escape(title)}</h1>"
    yield f'<p class="muted">{escape(_subtitle(runs))}</p>'
    differences = difference_table(runs)
    for table in (summary_table(runs), *paper_tables(runs), *([differences] if differences else [])):
        yield _table(table)
    for name, charts in parts.items():
        yield f'<section><h2>{escape(name)}</h2><div class="charts">'
        for chart in charts:
            yield _figure(chart, pictures)
        yield "</div></section>"
    yield "</main></body></html>\n"


def _subtitle(runs: Sequence[RunData]) -> str:
    facts = ("method", "model.name", "data.name")
    shared = [str(runs[0].config.get(f, "")) for f in facts if len({str(r.config.get(f)) for r in runs}) == 1]
    return " · ".join(fact for fact in shared if fact)


def _variables() -> str:
    light, dark = _colours(THEMES["light"]), _colours(THEMES["dark"])
    return f":root{{color-scheme:light dark;{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"


def _colours(theme: Theme) -> str:
    names = ("background", "panel", "text", "muted", "line")
    return "".join(f"--{name}:{getattr(theme, name)};" for name in names)


def _table(table: Table) -> str:
    header = "".join(f'<th scope="col">{_cell(cell)}</th>' for cell in table.header)
    body = "".join(_row(table, number) for number in range(len(table.rows)))
    return (
        f'<div class="table" tabindex="0"><p class="title">{escape(table.title)} '
        f'<span class="muted">{_cell(table.shared)}</span></p><table>'
        f"<thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _row(table: Table, number: int) -> str:
    first, *others = table.rows[number]
    best = [' class="best"' if (number, i) in table.best else "" for i in range(1, 1 + len(others))]
    cells = "".join(f"<td{mark}>{_cell(cell)}</td>" for mark, cell in zip(best, others, strict=True))
    return f'<tr><th scope="row">{_cell(first)}</th>{cells}</tr>'


def _cell(text: str) -> str:
    """Text that may break behind the separators of names."""
    return re.sub(r"([/_.])(?=[^\W\d])", r"\1<wbr>", escape(text))


def _figure(chart: Chart, pictures: Path) -> str:
    """The figure in both themes, of which the reader's browser shows one."""
    sources = {}
    for name, theme in THEMES.items():
        with themed(theme):
            drawn = chart.draw(theme)
            drawn.savefig(pictures / f"{chart.name}_{name}.png", dpi=_PIXELS_PER_INCH)
            drawn.set_layout_engine("none")  # the places that it has found are kept
            sources[name] = _data_uri(drawn)
    text = escape(f"{chart.title}. {chart.text}", quote=True)
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{sources["dark"]}">'
        f'<img alt="{text}" src="{sources["light"]}"></picture>'
        f"<figcaption>{escape(chart.caption)}</figcaption></figure>"
    )


def _data_uri(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", dpi=_PIXELS_PER_INCH, metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
