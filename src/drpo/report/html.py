"""One self-contained HTML page: no network, nothing from the data taken for markup or script."""

from __future__ import annotations

import base64
import gzip
import hashlib
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from drpo.errors import UserError
from drpo.files import replacing

_PLOTLY = Path(__file__).parent / "plotly" / "plotly-basic.min.js"
"""plotly.js with lines and bars alone, a quarter of the whole, in the version of the Python package that tests run with."""

_DRAW = """
const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), character => character.charCodeAt(0));
const unpacked = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
const script = document.createElement("script");
script.textContent = await new Response(unpacked).text();
document.head.append(script);
for (const holder of document.querySelectorAll(".figure")) {
  const figure = JSON.parse(holder.querySelector("script").textContent);
  const target = document.createElement("div");
  holder.append(target);
  Plotly.newPlot(target, figure.data, figure.layout, {responsive: true, displaylogo: false, displayModeBar: innerWidth > 600 && "hover"});
}
"""

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .25rem; overflow-wrap: anywhere } h2 { font-size: 1.15rem; margin: 2.2rem 0 .2rem }
p { margin: .25rem 0 .5rem; max-width: 46rem } .note { color: #555 }
.table { overflow-x: auto } table { border-collapse: collapse; width: max-content; min-width: 100%; font-size: 14px } th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #ddd; vertical-align: top }
td { white-space: pre-wrap; overflow-wrap: break-word; max-width: 26rem }
th.number, td.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
pre, code { font: 13px/1.45 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere } pre { background: #f6f6f6; padding: .8rem; }
details { margin: .5rem 0 }
mark { border-radius: 3px; padding: 0 1px } mark.attenuated { background: #fff3bf } mark.zeroed { background: #d0d0d0 }
mark.reversed { background: #ffc9c9 } mark.amplified { background: #c5dcff }
"""


def document(heading: str, kind: str, body: str, plotly: str | None = None) -> str:
    """A page with what draws its figures.

    Args:
        heading: text.
        kind: of page, for its title.
        body: HTML.
        plotly: the script that draws, packed in the page to a third of its size; by default one that knows lines and bars alone.
    """
    plotly, title = plotly or _PLOTLY.read_text(encoding="utf-8"), escape(heading)
    packed = base64.b64encode(gzip.compress(plotly.encode(), mtime=0)).decode()
    policy = f"default-src 'none'; script-src 'sha256-{_digest(plotly)}' 'sha256-{_digest(_DRAW)}'; style-src 'unsafe-inline'; img-src data: blob:"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title} - {kind}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>\n'
        f"<body><h1>{title}</h1>{body}\n"
        f'<script type="application/gzip" id="plotly">{packed}</script>\n<script type="module">{_DRAW}</script>\n</body></html>\n'
    )


def write_page(page: str, target: Path) -> None:
    """Write a page where the user wants it."""
    if target.suffix != ".html":
        raise UserError(f"--output {target}: expected a name that ends in .html")
    with replacing(target, "--output") as partial:
        partial.write_text(page, encoding="utf-8", errors="replace")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def section(title: str, note: str, content: go.Figure | str) -> str:
    """A figure or HTML under its heading and a note on what it shows; nothing where there is nothing to show."""
    if not isinstance(content, str):
        content = _drawn(content) if content.data else ""
    return f'<h2>{escape(title)}</h2><p class="note">{escape(note)}</p>\n{content}\n' if content else ""


def _drawn(figure: go.Figure) -> str:
    # Inside a script element nothing but its end tag is markup, and without "<" there is none.
    data = str(figure.to_json()).replace("<", "\\u003c")
    return f'<div class="figure"><script type="application/json">{data}</script></div>'


class Number(str):
    """A number as it is written, such as one with its interval."""


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Rows of text and numbers, a column that has numbers to the right with its heading; nothing where there are no rows."""
    if not rows:
        return ""
    is_number = [any(isinstance(row[place], (int, float, Number)) for row in rows) for place in range(len(columns))]
    head = "".join(
        f"<th{' class=number' * number}>{escape(column)}</th>"
        for column, number in zip(columns, is_number, strict=True)
    )
    body = "".join(f"<tr>{''.join(map(_cell, row, is_number))}</tr>" for row in rows)
    return f"<div class=table><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _cell(value: Any, is_number: bool) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return f"<td{' class=number' * is_number}>{escape(text)}</td>"
