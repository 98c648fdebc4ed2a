"""Show the completions that a training run has logged as a web page: by step, colored by advantage, with players."""

import math
import os
from itertools import groupby
from statistics import fmean

from evaluation.explain_page import num
from evaluation.web_page import escape as _e
from evaluation.web_page import player, web_page

LARGEST = 16_000  # completions on a page: a browser opens it within seconds and filters it in one
TEXTS = ("id", "prompt", "answer")
LISTS = ("rewards", "advantages")


def is_group(record: dict) -> bool:
    """Tell whether a record has the fields that training.metrics.log_completions writes. `audio` may be missing."""
    completions = record.get("completions")
    return (
        isinstance(completions, list)
        and completions != []
        and all(isinstance(text, str) for text in [*completions, *map(record.get, TEXTS), record.get("audio", "")])
        and all(_is_column(record.get(name), len(completions)) for name in LISTS)
    )


def _is_column(values, size: int) -> bool:
    """Tell whether these are `size` numbers, one for each completion."""
    numbers = isinstance(values, list) and all(isinstance(v, int | float) and abs(v) < 1e30 for v in values)
    return numbers and len(values) == size


def completions_html(groups: list[dict], page: str, title: str, damaged: int = 0) -> tuple[str, list[str]]:
    """Format the groups of completions.jsonl as a page. Return it and the notes that are on it.

    groups: records for which is_group is true, at least one. page: the file to which the page will be written; it links
    clips relative to itself. Paths of clips start from the current folder, as they did in training. damaged: number of
    lines that were left out. The page shows evenly spaced steps, with the last one, if there are more than LARGEST
    completions.

    The page needs no network, and JavaScript only for its filter, which is part of its address:
    completions.html#step=100&score=accuracy&to=0&text=dog.
    """
    names = [name for group in groups for name, own in group.items() if _is_column(own, len(group["completions"]))]
    names = [name for name in dict.fromkeys(names) if name not in LISTS]  # each reward; "rewards" are the sums
    largest = max(abs(advantage) for group in groups for advantage in group["advantages"]) or 1.0
    steps = [list(own) for _, own in groupby(groups, key=lambda group: group["step"])]
    every = math.ceil(sum(len(group["completions"]) for group in groups) / LARGEST)
    shown = steps[::-1][::every][::-1]

    clips = {group["audio"] for group in groups if group.get("audio")}
    missing = sum(not os.path.exists(clip) for clip in clips)
    notes = []
    if damaged:
        notes.append(f"{damaged} damaged lines are left out")
    if missing:
        notes.append(f"{missing} of {len(clips)} clips are not found; start from the folder in which training started")
    if len(shown) < len(steps):
        notes.append(f"{len(shown)} of {len(steps)} logged steps are shown: a page has at most {LARGEST:,} completions")
    sections = "".join(_section(own, names, largest, page) for own in shown)
    options = "".join(f"<option>{own[0]['step']}</option>" for own in shown)
    scores = "".join(f"<option{' selected' * (name == 'reward')}>{_e(name)}</option>" for name in _headings(names))
    body = f"""<h1>{_e(title)}</h1>
{"".join(f"<p>{_e(note)}</p>" for note in notes)}
<form id="filter">
<label>step <select name="step"><option value="">all</option>{options}</select></label>
<label>text <input type="search" name="text"></label>
<label><select name="score">{scores}</select></label>
<label>from <input type="number" step="any" name="from"></label>
<label>to <input type="number" step="any" name="to"></label>
<output id="shown"></output>
</form>
<main>
{sections}</main>
<script>{_SCRIPT}</script>
"""
    return web_page(title, _STYLE, body), notes


def _headings(names: list[str]) -> list[str]:
    return [*names, "reward", "advantage"]


def _section(groups: list[dict], names: list[str], largest: float, page: str) -> str:
    """Format the groups of one step."""
    reward = num(fmean(reward for group in groups for reward in group["rewards"]))
    articles = "".join(_article(group, names, largest, page) for group in groups)
    step = groups[0]["step"]
    return f"""<section data-step="{step}">
<h2>step {step}</h2>
<p>{len(groups)} questions, mean reward {reward}</p>
{articles}</section>
"""


def _article(group: dict, names: list[str], largest: float, page: str) -> str:
    texts, advantages = group["completions"], group["advantages"]
    columns = [group[name] if _is_column(group.get(name), len(texts)) else [""] * len(texts) for name in names]
    rows = []
    for text, advantage, *values in zip(texts, advantages, *columns, group["rewards"]):
        cells = "".join(f"<td>{value if value == '' else format(value, 'g')}</td>" for value in values)
        kind, share = "up" if advantage > 0 else "down", f"{70 * abs(advantage) / largest:.0f}%"
        cells += f"<td>{num(advantage, signed=True)}</td>"
        rows.append(f'<tr class="{kind}" style="--share: {share}"><td>{_e(text)}</td>{cells}</tr>\n')
    heads = "".join(f"<th>{_e(name)}</th>" for name in _headings(names))
    audio = player(group["audio"], page) if group.get("audio") else ""
    return f"""<article>
<h3>{_e(group["prompt"])}</h3>
<p class="labels">answer: {_e(group["answer"])} &middot; id {_e(group["id"])}</p>
{audio}
<table>
<thead><tr><th>completion</th>{heads}</tr></thead>
<tbody>
{"".join(rows)}</tbody>
</table>
</article>
"""


# The address holds the filter, so that a filtered page can be linked and the back button works.
_SCRIPT = """
const form = document.getElementById("filter");
function show() {
  form.reset();
  for (const [name, value] of new URLSearchParams(location.hash.slice(1))) {
    const field = form.elements.namedItem(name);
    if (field) field.value = value;
  }
  const step = form.step.value, text = form.text.value.toLowerCase(), column = 1 + form.score.selectedIndex;
  const low = form.from.value === "" ? -Infinity : Number(form.from.value);
  const high = form.to.value === "" ? Infinity : Number(form.to.value);
  let groups = 0, completions = 0;
  for (const section of document.querySelectorAll("section")) {
    section.hidden = step !== "" && section.dataset.step !== step;
    if (section.hidden) continue;
    const before = groups;
    for (const article of section.querySelectorAll("article")) {
      const asked = article.querySelector("h3").textContent + article.querySelector(".labels").textContent;
      let found = 0;
      for (const row of article.querySelectorAll("tbody tr")) {
        const value = parseFloat(row.cells[column].textContent);
        const fits = value >= low && value <= high
          && (asked + "\\n" + row.cells[0].textContent).toLowerCase().includes(text);
        row.classList.toggle("other", !fits);
        found += fits;
      }
      article.hidden = found === 0;
      groups += found > 0;
      completions += found;
    }
    section.hidden = groups === before;
  }
  document.getElementById("shown").textContent = `${completions} completions of ${groups} questions`;
}
form.addEventListener("change", () => {
  const parts = [...new FormData(form)].filter(([name, value]) => value !== "");
  location.hash = new URLSearchParams(parts);
  scrollTo(0, 0);
});
form.addEventListener("submit", event => event.preventDefault());
window.addEventListener("hashchange", show);
show();
"""

_STYLE = """
:root { --up: #57b873; --down: #ee8378; }
@media (prefers-color-scheme: dark) { :root { --up: #2f8f4e; --down: #b8433a; } }
body { max-width: 68rem; padding-bottom: 4rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 0; }
h2 + p { margin: 0 0 .6rem; color: var(--dim); }
h3 { font-size: 1rem; margin: 0; white-space: pre-line; }
#filter input { font: inherit; width: 5rem; }
#filter input[type=search] { width: 11rem; }
table { width: 100%; margin-top: .6rem; font-size: .9rem; }
th, td { padding: .1rem .6rem; vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
td:first-child { width: 99%; white-space: pre-wrap; font-family: ui-monospace, monospace; }
tr.up { --with: var(--up); }
tr.down { --with: var(--down); }
tbody tr { background: color-mix(in srgb, var(--with) var(--share), transparent);
  border-bottom: 1px solid var(--panel); }
tr.other { opacity: .3; }
@media (max-width: 40rem) { article { overflow-x: auto; } th, td { padding: .1rem .2rem; font-size: .7rem; } }
"""
