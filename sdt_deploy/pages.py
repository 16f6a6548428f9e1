"""HTML pages in one file: no network, light and dark, wide and narrow.

Charts are Vega-Lite specifications (https://vega.github.io/vega-lite/), plain dictionaries. The
libraries that draw them stand in the page, brought by ``vl-convert-python``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from sdt_deploy.extras import require

Chart = Mapping[str, Any]
"""A Vega-Lite specification without ``$schema``, width and colours of text and axes."""


@dataclass(kw_only=True)
class Page:
    """A page that grows from top to bottom; texts that are given are escaped."""

    title: str
    subtitle: str = ""
    _body: list[str] = field(default_factory=list)
    _charts: list[Chart] = field(default_factory=list)

    def heading(self, text: str) -> None:
        """Add a heading."""
        self._body.append(f"<h2>{escape(text)}</h2>")

    def text(self, text: str) -> None:
        """Add a paragraph."""
        self._body.append(f"<p>{escape(text)}</p>")

    def html(self, fragment: str) -> None:
        """Add HTML as it stands; the caller has escaped what is in it."""
        self._body.append(fragment)

    def facts(self, facts: Mapping[str, tuple[str, str]]) -> None:
        """Add a row of tiles: by name, the figure and a remark."""
        tiles = "".join(
            f'<div class="tile"><span>{escape(name)}</span><b>{escape(figure)}</b>'
            f"<span>{escape(remark)}</span></div>"
            for name, (figure, remark) in facts.items()
        )
        self._body.append(f'<div class="tiles">{tiles}</div>')

    def table(self, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Add a table; cells that begin with a digit or a sign are set to the right."""
        head = "".join(f"<th>{escape(name)}</th>" for name in header)
        body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
        self._body.append(
            f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
            "</div>"
        )

    def definitions(self, facts: Mapping[str, object]) -> None:
        """Add names with what they stand for."""
        rows = "".join(
            f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items()
        )
        self._body.append(f"<dl>{rows}</dl>")

    def code(self, text: str) -> None:
        """Add a block of code."""
        self._body.append(f"<pre><code>{escape(text)}</code></pre>")

    def chart(self, chart: Chart, *, says: str) -> None:
        """Add a chart as wide as the page.

        Args:
            chart: the specification.
            says: what it shows, for those who do not see it.
        """
        place = f'<figure id="chart-{len(self._charts)}" role="img" aria-label="{escape(says)}">'
        self._body.append(f"{place}</figure>")
        self._charts.append(chart)

    def to_html(self) -> str:
        """Return the whole page.

        Raises:
            MissingExtraError: if there are charts and vl-convert-python is not installed.
        """
        scripts = ""
        if self._charts:
            library = require("vl_convert", extra="report", purpose="Drawing charts")
            specs = json.dumps(self._charts, allow_nan=False).replace("<", "\\u003c")
            scripts = (
                f"<script>{library.javascript_bundle()}</script>\n"
                f'<script type="application/json" id="charts">{specs}</script>\n'
                f"<script>{_DRAW}</script>\n"
            )
        subtitle = f'<p class="subtitle">{escape(self.subtitle)}</p>' if self.subtitle else ""
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta name="color-scheme" content="light dark">\n'
            '<link rel="icon" href="data:,">\n'
            f"<title>{escape(self.title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>"
            f"\n<h1>{escape(self.title)}</h1>\n{subtitle}\n"
            + "\n".join(self._body)
            + f"\n</main>\n{scripts}</body>\n</html>\n"
        )


def _cell(text: str) -> str:
    is_number = text[:1].isdigit() or text[:1] in ("-", "+", "–")
    return f'<td class="number">{escape(text)}</td>' if is_number else f"<td>{escape(text)}</td>"


_STYLE = """
:root { --back: #ffffff; --ink: #1c2128; --faint: #57606a; --line: #d8dee4; --tile: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --back: #14181d; --ink: #e6edf3; --faint: #9aa4af; --line: #343b44; --tile: #1e242b; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
p { margin: .5rem 0; max-width: 46rem; }
.subtitle, dt, .tile span { color: var(--faint); }
.tiles { display: grid; gap: .75rem; margin: 1.25rem 0;
  grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); }
.tile { background: var(--tile); border: 1px solid var(--line); border-radius: .5rem;
  padding: .6rem .8rem; display: flex; flex-direction: column; }
.tile b { font-size: 1.5rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tile span { font-size: .85rem; line-height: 1.35; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .75rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left;
  white-space: nowrap; }
th { font-weight: 600; color: var(--faint); }
td.number { text-align: right; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; font-size: .9rem;
  margin: .5rem 0; }
dd { margin: 0; overflow-wrap: anywhere; }
pre { background: var(--tile); border: 1px solid var(--line); border-radius: .5rem;
  padding: .75rem; overflow-x: auto; font-size: .85rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }
figure { margin: .75rem 0; width: 100%; position: relative; overflow-x: auto; }
figure form.vega-bindings { margin-top: .25rem; font-size: .9rem; color: var(--faint); }
figure select, figure input { font: inherit; color: var(--ink); background: var(--tile);
  border: 1px solid var(--line); border-radius: .3rem; padding: .15rem .3rem; margin-left: .4rem; }
figure .vega-bind-radio label { margin-right: .75rem; }
@media (max-width: 32rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .4rem; } }
"""

_DRAW = """
const charts = JSON.parse(document.getElementById("charts").textContent);
const dark = window.matchMedia("(prefers-color-scheme: dark)");
function draw() {
  const style = getComputedStyle(document.documentElement);
  const ink = style.getPropertyValue("--ink"), faint = style.getPropertyValue("--faint");
  const line = style.getPropertyValue("--line");
  const config = {
    background: "transparent", font: "system-ui, sans-serif",
    view: {stroke: null}, text: {color: ink, fontSize: 12}, rule: {color: faint},
    axis: {labelColor: faint, titleColor: faint, domainColor: line, tickColor: line,
           gridColor: line, labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal"},
    legend: {labelColor: ink, titleColor: faint, orient: "bottom", labelFontSize: 12,
             labelLimit: 320, columns: window.innerWidth < 640 ? 1 : 2},
    title: {color: ink, anchor: "start"},
  };
  charts.forEach((chart, i) => {
    const spec = {width: "container", autosize: {type: "fit-x", contains: "padding"}, ...chart};
    const tooltip = {theme: dark.matches ? "dark" : "light"};
    vegaEmbed("#chart-" + i, spec, {config, actions: false, renderer: "svg", tooltip})
      .catch((error) => { console.error("chart " + i, error); });
  });
}
draw();
dark.addEventListener("change", draw);
"""
