"""Self-contained HTML pages: one style, tables, embedded images. All data is escaped.

```python
write_text("page.html", page("Losses", [table(("step", "loss"), rows), picture(figure, "Loss by step")]))
```
"""

import base64
import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

import rbfast
from rbfast.report.plots import print_png

_DPI = 144  # 1.5 times the 96 of CSS: sharp on high-density screens
_NUMBER = re.compile(r"[-+]?\d[\d,.]*%?( \(.{1,30}\))?")
_SMALLEST = 0.62  # an image shrinks to this share of its width, then scrolls: its text stays legible on a phone
_STYLE = """
:root{color-scheme:light dark;--line:#ddd;--soft:#f6f6f6;--quiet:#666}
@media(prefers-color-scheme:dark){:root{--line:#444;--soft:#242424;--quiet:#aaa}}
*{box-sizing:border-box}
body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:1.5rem auto;padding:0 1rem;overflow-wrap:anywhere}
h1,h2,h3{line-height:1.25}h2{margin-top:2.5rem}h3{margin-top:2rem}
.wide{overflow-x:auto;margin:1rem 0}
table{border-collapse:collapse;overflow-wrap:normal}
td,th{padding:.25rem .8rem .25rem 0;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
img{display:block;height:auto;max-width:100%;background:#fff;border-radius:4px}
pre,.text{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--soft);padding:.8rem;border-radius:4px}
pre,.text,.pair{margin:.5rem 0}
.text{max-height:26rem;overflow-y:auto;font-size:.9rem}
.quiet,footer{color:var(--quiet)}
summary{cursor:pointer;padding:.3rem 0}
.pair{display:grid;gap:0 1rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,22rem),1fr))}
.strategic{background:rgba(0,114,178,.22)}.tactical{background:rgba(213,94,0,.18)}.answer{background:rgba(0,158,115,.32)}
mark{padding:0 .3rem;border-radius:3px;font-weight:600}del{opacity:.6}
"""


def page(title: str, body: Sequence[str]) -> str:
    """A complete page; `body` is HTML, `title` plain text."""
    head = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><link rel="icon" href="data:,">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
    )
    return "\n".join([head, *body, f"<footer>rbfast {rbfast.__version__}</footer></body></html>\n"])


def escape(value: object) -> str:
    """Escape a value as text, for an element or a quoted attribute. A lone surrogate becomes `?`."""
    return html.escape(str(value).encode("utf-8", "replace").decode("utf-8"))


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """An HTML table of texts, numbers or None (empty). A column is right-aligned if its first cell is a number."""
    texts = [[_text(cell) for cell in row] for row in rows]
    right = [bool(_NUMBER.fullmatch(cell)) for cell in texts[0]] if texts else [False] * len(header)
    lines = [_line("th", header, right), *(_line("td", row, right) for row in texts)]
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _text(cell: Any) -> str:
    if isinstance(cell, int | float) and not isinstance(cell, bool):
        return f"{cell:,}"
    return "" if cell is None else str(cell)


def _line(tag: str, cells: Sequence[str], right: Sequence[bool]) -> str:
    align = {True: ' class="n"', False: ""}
    return f"<tr>{''.join(f'<{tag}{align[r]}>{escape(c)}</{tag}>' for c, r in zip(cells, right, strict=True))}</tr>"


def picture(figure: Figure, alt: str) -> str:
    """The figure as an embedded image; `alt` describes it."""
    figure.set_dpi(_DPI)
    buffer = io.BytesIO()
    print_png(figure, buffer)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    width = round(96 * figure.get_figwidth())
    size = f'width="{width}" style="min-width:{round(_SMALLEST * width)}px"'
    return f'<div class="wide"><img {size} alt="{escape(alt)}" src="data:image/png;base64,{encoded}"></div>'


def stages_table(sheet: Mapping[str, Any]) -> str:
    """The stages of a curation as an HTML table: what came in, what was dropped and why, what came out."""
    rows = [(s["stage"], s["in"], dropped_because(s["dropped"]), s["out"]) for s in sheet["stages"]]
    return table(("stage", "in", "dropped, and why", "out"), rows)


def domains_table(domains: Sequence[Mapping[str, Any]]) -> str:
    """The domains of a curation as an HTML table."""
    rows = [(d["domain"], d["before"], d["eligible"], d["after"]) for d in domains]
    return table(("domain", "in the pool", "eligible", "picked"), rows)


def dropped_because(counts: Mapping[str, int]) -> str:
    """Counts by reason, as one line of text."""
    return "; ".join(f"{reason}: {count:,}" for reason, count in counts.items())


def remark(text: str) -> str:
    """A paragraph of plain text in a muted colour."""
    return f'<p class="quiet">{escape(text)}</p>'
