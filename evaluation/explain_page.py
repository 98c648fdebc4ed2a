"""Show the story of explain.py as text in a terminal, or as a web page.

A story is a list of parts. Each part is a title and its blocks: paragraphs (str), Verbatim, Table and Colored.
"""

import textwrap
from dataclasses import dataclass

from evaluation.scores import align
from evaluation.web_page import escape as _e
from evaluation.web_page import web_page

WIDTH = 110  # characters in a printed line of a paragraph
CELL = 60  # characters in a printed cell
PRINTED_ROWS = 30  # printed rows of a table with `cut`; the page shows all rows


@dataclass
class Verbatim:
    """Text that keeps its line ends."""

    text: str


@dataclass
class Table:
    """Rows of cells, the headings first."""

    rows: list[tuple[str, ...]]
    left: tuple[int, ...] = (0,)  # columns of text, left-aligned; the others hold numbers
    cut: bool = False  # print at most PRINTED_ROWS


@dataclass
class Colored:
    """The tokens of all completions, colored by advantage, each with its numbers. Only the page shows this block."""

    headings: tuple[str, ...]
    completions: list[list[tuple[str, bool, tuple[str, ...]]]]  # for each token: text, whether clipped, cells
    advantages: list[float]


def num(value: float, digits: int = 4, signed: bool = False) -> str:
    """Format a number with `digits` decimals. A zero has no sign."""
    text = f"{value:{'+' if signed else ''}.{digits}f}"
    return text if float(text) else f"{0:.{digits}f}"


# ---- text ----


def to_text(parts: list[tuple[str, list]]) -> str:
    """Format a story for a terminal."""
    lines = []
    for title, blocks in parts:
        lines += ["", title, "-" * len(title), ""]
        for block in blocks:
            if isinstance(block, Colored):
                continue
            if isinstance(block, str):
                text = textwrap.fill(block, WIDTH)
            elif isinstance(block, Verbatim):
                wrapped = (textwrap.fill(line, WIDTH) for line in block.text.split("\n"))
                text = textwrap.indent("\n".join(wrapped), "    ")
            else:
                text = _table_as_text(block)
            lines += [text, ""]
    return "\n".join(lines).strip("\n")


def _table_as_text(table: Table) -> str:
    rows = [tuple(cell if len(cell) <= CELL else cell[: CELL - 1] + "…" for cell in row) for row in table.rows]
    note = ""
    if table.cut and len(rows) > PRINTED_ROWS + 1:
        left_out = len(rows) - 1 - PRINTED_ROWS
        rows = [*rows[: PRINTED_ROWS - 9], ("...",), *rows[-10:]]
        note = f"\n({left_out} tokens are left out here; python explain.py --html FILE shows all)"
    return align(rows, right=[c for c in range(len(rows[0])) if c not in table.left]) + note


# ---- page ----


def to_html(parts: list[tuple[str, list]], title: str) -> str:
    """Format a story as one page, without scripts or links to other files."""
    sections = "".join(
        f"<section>\n<h2>{_e(heading)}</h2>\n{''.join(map(_block_as_html, blocks))}</section>\n"
        for heading, blocks in parts
    )
    return web_page(title, _STYLE, f"<h1>{_e(title)}</h1>\n{sections}")


def _block_as_html(block) -> str:
    if isinstance(block, str):
        return f"<p>{_e(block)}</p>\n"
    if isinstance(block, Verbatim):
        return f"<pre>\n{_e(block.text)}</pre>\n"
    if isinstance(block, Colored):
        return _colored_as_html(block)
    lines = []
    for row in block.rows:
        kind = "td" if lines else "th"
        cells = (f"<{kind}{' class=text' * (c in block.left)}>{_e(cell)}</{kind}>" for c, cell in enumerate(row))
        lines.append(f"<tr>{''.join(cells)}</tr>\n")
    return f'<div class="wide"><table>\n{"".join(lines)}</table></div>\n'


def _colored_as_html(block: Colored) -> str:
    largest = max(map(abs, block.advantages)) or 1.0
    rows = []
    for number, (tokens, advantage) in enumerate(zip(block.completions, block.advantages), start=1):
        label = f"completion {number}, advantage {num(advantage, signed=True)}"
        color = f"--with: var(--{'up' if advantage > 0 else 'down'}); --share: {70 * abs(advantage) / largest:.0f}%"
        spans = []
        for text, clipped, cells in tokens:
            numbers = "".join(
                f"<div><dt>{_e(name)}</dt><dd>{_e(cell)}</dd></div>" for name, cell in zip(block.headings, cells)
            )
            shown = _e(text).replace("\n", "↵\n")
            spans.append(
                f'<span class="token{" clipped" * clipped}" tabindex="0">{shown}'
                f'<span class="numbers"><b>{label}</b><dl>{numbers}</dl></span></span>'
            )
        heading = f'<span class="number">{number}</span><span class="advantage">{num(advantage, 2, signed=True)}</span>'
        rows.append(f'<div class="completion" style="{color}">{heading}<div>{"".join(spans)}</div></div>\n')
    return (
        '<p class="legend">All completions, with their advantage: <span class="up">likelier</span> '
        '<span class="down">less likely</span> <span class="clipped">clipped</span>. '
        "Point at a token, or tap it, for its numbers.</p>\n" + "".join(rows)
    )


_STYLE = """
:root { --up: #57b873; --down: #ee8378; }
@media (prefers-color-scheme: dark) { :root { --up: #2f8f4e; --down: #b8433a; } }
body { max-width: 62rem; padding-bottom: 9rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .8rem; padding-top: .8rem; border-top: 1px solid var(--line); }
p { max-width: 46rem; margin: .7rem 0; }
pre { margin: .8rem 0; padding: .7rem .9rem; background: var(--panel); }
.wide { overflow-x: auto; }
table { font-size: .9rem; }
th, td { padding: .15rem .7rem; }
.text { text-align: left; }
th { border-bottom: 1px solid var(--line); }
td.text { font-family: ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: break-word; }
td.text:first-child:not(:empty) { min-width: 8rem; }
.legend span { padding: .1rem .4rem; border-radius: 3px; }
.legend .up { background: color-mix(in srgb, var(--up) 70%, transparent); }
.legend .down { background: color-mix(in srgb, var(--down) 70%, transparent); }
.completion { display: flex; gap: .8rem; margin: .35rem 0; font: .9rem/1.7 ui-monospace, monospace; }
.completion > span { flex: none; text-align: right; color: var(--dim); }
.number { width: 1.5rem; }
.advantage { width: 3.5rem; }
.token { white-space: pre-wrap; padding: .1rem 0; border-radius: 2px; border-right: 1px solid var(--back);
  background: color-mix(in srgb, var(--with) var(--share), transparent); }
.clipped { text-decoration: underline 2px; text-underline-offset: 3px;
  background: color-mix(in srgb, var(--with, var(--line)) 15%, transparent); }
.token:hover, .token:focus { outline: 2px solid var(--text); outline-offset: -1px; }
.numbers { display: none; position: fixed; z-index: 1; left: 0; right: 0; bottom: 0; padding: .6rem 1rem .8rem;
  background: var(--panel); border-top: 2px solid var(--line); font: .9rem/1.4 system-ui, sans-serif; }
.token:hover > .numbers, .token:focus > .numbers { display: block; }
.token:hover > .numbers { z-index: 2; }
.numbers b { font-weight: 600; }
dl { display: flex; flex-wrap: wrap; gap: .3rem 1.6rem; margin: .3rem 0 0; font-variant-numeric: tabular-nums; }
dl div { white-space: pre; }
dt, dd { display: inline; margin: 0; }
dt { color: var(--dim); margin-right: .5rem; }
"""
