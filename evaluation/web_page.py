"""Make self-contained web pages: frame, shared style sheet, escaped text, players."""

import html
import os
from pathlib import Path
from urllib.parse import quote


def escape(value) -> str:
    """Escape a value's text for a page, in attributes too."""
    return html.escape(str(value), quote=True)


def player(clip: str, page: str) -> str:
    """Return an audio player. It links the clip relative to the page's file. Both paths start from the current folder.

    So the page works on another machine if clips and page lie in the same folders relative to each other.
    """
    path = Path(os.path.relpath(os.path.abspath(clip), os.path.dirname(os.path.abspath(page)))).as_posix()
    try:
        address = quote(path, errors="surrogateescape")
    except UnicodeEncodeError:  # no file can have such a name
        address = quote(path, errors="replace")
    return f'<audio controls preload="none" src="{address}"></audio>'


def web_page(title: str, style: str, body: str) -> str:
    """Return a page that loads nothing else. title: any text; style: the page's own CSS; body: HTML inside <body>."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}{style}</style>
</head>
<body>
{body}</body>
</html>
"""


# Every page's style: colors in light and dark, text, tables, filter, players. A page's own style comes after and may
# override these.
_STYLE = """
:root { color-scheme: light dark; --back: #fff; --panel: #f6f7f9; --text: #1c1e21; --dim: #63676e; --line: #dcdfe4; }
@media (prefers-color-scheme: dark) {
  :root { --back: #16181b; --panel: #1f2226; --text: #e4e6ea; --dim: #9aa0a8; --line: #363a41; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 0 1rem; background: var(--back); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 1.5rem 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; white-space: nowrap; }
th { font-weight: 600; color: var(--dim); font-size: .85rem; }
pre { white-space: pre-wrap; border: 1px solid var(--line); border-radius: 4px;
  font: .85rem/1.5 ui-monospace, monospace; }
[hidden] { display: none !important; }
#filter { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: .4rem 1.5rem; align-items: center;
  margin: 1.5rem -1rem 1rem; padding: .6rem 1rem; background: var(--back); border-bottom: 1px solid var(--line); }
#filter select { font: inherit; max-width: 14rem; }
#shown { margin-left: auto; color: var(--dim); font-variant-numeric: tabular-nums; }
article { margin: 0 0 1rem; padding: .8rem 1rem; background: var(--panel); border: 1px solid var(--line);
  border-left: 4px solid var(--dim); border-radius: 4px; content-visibility: auto; contain-intrinsic-size: auto 20rem; }
audio { width: 100%; max-width: 32rem; height: 2.5rem; display: block; }
.labels { margin: .2rem 0 .6rem; font-size: .85rem; color: var(--dim); }
"""
