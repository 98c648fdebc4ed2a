"""Evaluations for people: all checkpoints of a run as a table and a picture, one checkpoint as a page to listen to."""

import csv
import io
import os
from itertools import groupby
from pathlib import Path
from urllib.parse import quote

from data import Question
from errors import InputError
from files import replacing, write_text
from reward import guessing
from scores import (
    FIELDS,
    Score,
    accuracy_by,
    accuracy_rows,
    align,
    discordant,
    in_order,
    is_right,
    mcnemar_exact,
    p_text,
    percent,
    read_predictions,
    require_same_questions,
    score_cells,
    visible,
    wilson_interval,
)
from web_page import escape as _e
from web_page import web_page

TASKS = ("sound", "music", "speech")  # MMAU's, a column each whether or not the questions have them

# ---- the checkpoints of a run ----


def run_report(folder: str, results: list[tuple[int, str]], caption: str) -> str:
    """Write folder/mmau_scores.md, .csv and .png about a run's checkpoints. Returns the table and what to make of it.

    results: (step, its predictions file), steps ascending; caption: what was evaluated, and how. Questions without an
    answer are left out; if none has one, what was written before is removed. Raises InputError where two files do not
    hold the same questions.
    """
    first_path = results[0][1]
    first, _ = read_predictions(first_path)
    scored = [i for i, question in enumerate(first) if question.answer is not None]
    if not scored:
        for extension in ("md", "csv", "png"):  # of other questions
            Path(folder, f"mmau_scores.{extension}").unlink(missing_ok=True)
        return f"{first_path}: no question has an answer, so there are no scores to report"
    questions = [first[i] for i in scored]
    correct = {}
    for step, path in results:
        own, said = read_predictions(path)
        try:
            require_same_questions(first_path, first, path, own)
        except InputError as error:
            raise InputError(f"{error}; remove the one that is out of date, and evaluate again") from None
        correct[step] = [is_right(first[i], said[i]) for i in scored]

    caption = visible(caption)
    tasks = [*TASKS, *in_order({q.task for q in questions if q.task is not None} - set(TASKS))]
    rows = [("checkpoint", *tasks, "average", "95% interval", "right")]
    for step, rights in correct.items():
        by_task = accuracy_by(questions, rights, "task")
        average, interval, counts = score_cells(Score(sum(rights), len(rights)))
        cells = [percent(*by_task.get(task, Score(0, 0))) for task in tasks]
        rows.append((_name(step), *cells, average, interval, counts))
    chance = guessing([question.choices for question in questions])
    verdict = [*_best(correct), f"guessing would score {percent(chance, 1)}"]

    write_text(Path(folder, "mmau_scores.md"), _markdown(caption, rows, verdict))
    write_text(Path(folder, "mmau_scores.csv"), _csv(questions, correct, tasks))
    _draw(Path(folder, "mmau_scores.png"), caption, questions, correct, chance)
    return "\n".join([caption, align(rows, right=range(1, len(rows[0]))), *verdict])


def _name(step: int) -> str:
    return f"step_{step:06d}"


def _best(correct: dict[int, list[bool]]) -> list[str]:
    """A line that names the best checkpoint, and a warning if some others cannot be told from it."""
    best = max(correct, key=lambda step: (sum(correct[step]), -step))  # of equally good ones, the earliest
    rights = correct[best]
    lines = [f"best: {_name(best)} with {percent(sum(rights), len(rights))}"]
    ps = {}
    for step in correct:
        if step != best:
            ps[step] = mcnemar_exact(*discordant(rights, correct[step]))
    close = [f"{_name(step)} (p = {p_text(p)})" for step, p in ps.items() if p >= 0.05]
    if close:
        lines.append(
            f"warning: its lead, if any, may be luck; {len(close)} of the {len(ps)} other checkpoints cannot be told "
            f"from it on these {len(rights)} questions (McNemar's exact test, p >= 0.05): {', '.join(close)}"
        )
    return lines


def escape_markdown(text: str) -> str:
    """Text in which Markdown sees no markup: a file's name or a task is any text."""
    return "".join("\\" + c if c in "\\`*_[]<>|&~$" else c for c in visible(text))


def _markdown(caption: str, rows: list[tuple], verdict: list[str]) -> str:
    heading, *others = rows
    lines = ["| " + " | ".join(row) + " |" for row in (map(escape_markdown, heading), *others)]
    lines.insert(1, "|---|" + "---:|" * (len(heading) - 1))
    lines = ["# Accuracy by checkpoint", "", escape_markdown(caption), "", *lines, ""]
    return "\n".join([*lines, *(f"- {line}" for line in verdict), ""])


def _csv(questions: list[Question], correct: dict[int, list[bool]], tasks: list[str]) -> str:
    """Accuracies in percent to four decimals, for other programs; empty where there is no question."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["step", *tasks, "average", "low", "high", "right", "questions"])
    for step, rights in correct.items():
        by_task = accuracy_by(questions, rights, "task")
        score = Score(sum(rights), len(rights))
        shares = [own.correct / own.total if own else None for own in [*map(by_task.get, tasks), score]]
        shares += wilson_interval(*score)
        writer.writerow([step, *("" if share is None else f"{100 * share:.4f}" for share in shares), *score])
    return out.getvalue()


def _draw(path: Path, caption: str, questions: list[Question], correct: dict[int, list[bool]], chance: float) -> None:
    """Accuracy over steps: all questions with the 95% interval as a band, each task as a thin line."""
    from matplotlib.figure import Figure

    def shares(scores):
        return [100 * score.correct / score.total for score in scores]

    steps = list(correct)
    totals = [Score(sum(rights), len(rights)) for rights in correct.values()]
    lows, highs = zip(*((100 * low, 100 * high) for low, high in (wilson_interval(*score) for score in totals)))
    by_task = [accuracy_by(questions, rights, "task") for rights in correct.values()]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    axis.fill_between(steps, lows, highs, color="C0", alpha=0.15, linewidth=0, label="95% interval")
    axis.vlines(steps, lows, highs, color="C0", alpha=0.5, linewidth=0.8)  # all that is seen of a single checkpoint's
    axis.plot(steps, shares(totals), color="C0", marker="o", linewidth=2, label=f"all {len(questions)} questions")
    for i, task in enumerate(by_task[0], start=1):
        label = f"{visible(task)} ({by_task[0][task].total})".replace("$", r"\$")  # no formula
        own = shares(scores[task] for scores in by_task)
        axis.plot(steps, own, color=f"C{i}", marker=".", linewidth=0.9, label=label)
    axis.axhline(100 * chance, color="gray", linestyle=":", linewidth=1, label="guessing")
    axis.set_title(caption.replace("$", r"\$"), fontsize=9)
    axis.set_xlabel("step")
    axis.set_ylabel("accuracy (%)")
    axis.set_xticks(steps if len(steps) <= 12 else steps[:: -(-len(steps) // 12)])
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
    with replacing(path) as unfinished:
        figure.savefig(unfinished, dpi=100, format="png")


# ---- a page to read and listen to ----


def write_html(path: str, questions: list[Question], records: list[dict], title: str) -> None:
    """Write one page that shows every question with its clip, what was predicted and what is right.

    questions: as data.load_questions gives them, their audio paths from the current folder. records: the predictions
    file's, in the same order. Clips are linked, relative to the page. The page needs no network, and no JavaScript
    but for its filter, which is part of its address: report.html#wrong&task=music.
    """
    correct = [
        None if question.answer is None else is_right(question, record["model_prediction"])
        for question, record in zip(questions, records, strict=True)
    ]
    scored = [i for i, right in enumerate(correct) if right is not None]
    tasks = in_order({question.task for question in questions if question.task is not None})
    options = "".join(f'<option value="{_e(task)}">{_e(task)}</option>' for task in tasks)
    folder = os.path.dirname(os.path.abspath(path))
    items = [
        _item(number, question, record, right, folder)
        for number, (question, record, right) in enumerate(zip(questions, records, correct), start=1)
    ]
    body = f"""<header>
<h1>{_e(title)}</h1>
{_html_table([questions[i] for i in scored], [bool(correct[i]) for i in scored])}
</header>
<form id="filter">
<label><input type="checkbox" name="wrong"> wrong only</label>
<label>task <select name="task"><option value="">all</option>{options}</select></label>
<output id="shown">{len(items)} of {len(items)} questions</output>
</form>
<main>
{"".join(items)}</main>
<script>{_SCRIPT}</script>
"""
    write_text(Path(path), web_page(title, _STYLE, body))


def _html_table(questions: list[Question], correct: list[bool]) -> str:
    if not questions:
        return "<p>No question has an answer; nothing is scored.</p>"
    lines = []
    for field, rows in groupby(accuracy_rows(questions, correct), key=lambda row: row[0]):
        if field in FIELDS:
            lines.append(f'<tr class="group"><th colspan="5">{field.replace("_", "-")}</th></tr>')
        for _, value, score in rows:
            cells = [_e(value) if field in FIELDS else "all questions", *score_cells(score), _bar(score)]
            lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    headings = '<th></th><th>accuracy</th><th>95% interval</th><th>right</th><th class="scale">0 to 100%</th>'
    chance = guessing([question.choices for question in questions])
    table = "\n".join([f"<thead><tr>{headings}</tr></thead>", "<tbody>", *lines, "</tbody>"])
    return f"<table>\n{table}\n</table>\n<p>Guessing would score {percent(chance, 1)}.</p>"


def _bar(score: Score) -> str:
    """A score on a scale from 0 to 100%: its interval as a block, itself as a line."""
    low, high = (100 * end for end in wilson_interval(*score))
    block = f'<i style="left:{low:.2f}%;width:{high - low:.2f}%"></i>'
    return f'<div class="bar">{block}<b style="left:{percent(*score)}"></b></div>'


def _address(path: str) -> str:
    try:
        return quote(path, errors="surrogateescape")
    except UnicodeEncodeError:  # no file has such a name
        return quote(path, errors="replace")


def _item(number: int, question: Question, record: dict, right: bool | None, folder: str) -> str:
    verdict = {True: "right", False: "wrong", None: "unscored"}[right]
    predicted = record["model_prediction"]
    labels = [label for label in (question.task, question.difficulty, question.sub_category) if label is not None]
    choices = []
    for choice in question.choices:
        marks = [mark for mark, text in (("answer", question.answer), ("predicted", predicted)) if choice == text]
        notes = "".join(f" <small>{mark}</small>" for mark in marks)
        choices.append(f'<li class="{" ".join(marks)}">{_e(choice)}{notes}</li>')
    audio = _address(Path(os.path.relpath(os.path.abspath(question.audio), folder)).as_posix())
    error = f'<p class="error">{_e(record["error"])}</p>\n' if record.get("error") else ""
    answer = "withheld" if question.answer is None else _e(question.answer)
    samples = record.get("samples")
    texts = samples if isinstance(samples, list) and samples else [record.get("completion", predicted)]
    name = "whole completion" if len(texts) == 1 else f"all {len(texts)} completions"
    completions = "".join(f"<pre>\n{_e(text)}</pre>" for text in texts)
    return f"""<article class="{verdict}" data-verdict="{verdict}" data-task="{_e(question.task or "")}">
<h2><span class="verdict">{verdict}</span> <span class="number">{number}</span> {_e(question.question)}</h2>
<p class="labels">{" &middot; ".join(_e(label) for label in [*labels, f"id {question.id}"])}</p>
<audio controls preload="none" src="{audio}"></audio>
{error}<ol>{"".join(choices)}</ol>
<dl><dt>prediction</dt><dd>{_e(predicted) or "<em>empty</em>"}</dd><dt>right answer</dt><dd>{answer}</dd></dl>
<details><summary>{name}</summary>{completions}</details>
</article>
"""


# The filter lives in the address, so that a filtered page can be linked and the back button works.
_SCRIPT = """
const form = document.getElementById("filter");
function show() {
  const wanted = new URLSearchParams(location.hash.slice(1));
  form.wrong.checked = wanted.has("wrong");
  form.task.value = wanted.get("task") || "";
  if (form.task.selectedIndex < 0) form.task.value = "";
  const articles = document.querySelectorAll("article");
  let shown = 0;
  for (const article of articles) {
    article.hidden = (form.wrong.checked && article.dataset.verdict !== "wrong")
      || (form.task.value !== "" && article.dataset.task !== form.task.value);
    shown += !article.hidden;
  }
  document.getElementById("shown").textContent = `${shown} of ${articles.length} questions`;
}
form.addEventListener("change", () => {
  const parts = [];
  if (form.wrong.checked) parts.push("wrong");
  if (form.task.value !== "") parts.push("task=" + encodeURIComponent(form.task.value));
  location.hash = parts.join("&") || "all";
});
form.addEventListener("submit", event => event.preventDefault());
window.addEventListener("hashchange", show);
show();
"""

_STYLE = """
:root { color-scheme: light dark; --back: #fff; --panel: #f6f7f9; --text: #1c1e21; --dim: #63676e; --line: #dcdfe4;
  --good: #1a7f37; --good-back: #e3f5e7; --bad: #b3261e; --bad-back: #fdeceb; --mark: #2f6fd0; }
@media (prefers-color-scheme: dark) { :root { --back: #16181b; --panel: #1f2226; --text: #e4e6ea; --dim: #9aa0a8;
  --line: #363a41; --good: #6cc98a; --good-back: #17301f; --bad: #f28b82; --bad-back: #3a1d1b; --mark: #7fb0ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 54rem; padding: 0 1rem 4rem; background: var(--back); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 1.5rem 0 1rem; }
[hidden] { display: none !important; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; text-align: right; white-space: nowrap; }
th { font-weight: 600; color: var(--dim); font-size: .85rem; }
td:first-child { text-align: left; white-space: normal; }
.group th, th.scale { text-align: left; }
.group th { padding-top: .7rem; border-bottom: 1px solid var(--line); }
td:last-child { width: 30%; }
.bar { position: relative; height: .8rem; min-width: 5rem; background: var(--panel); border: 1px solid var(--line); }
.bar i { position: absolute; top: 0; bottom: 0; background: var(--mark); opacity: .4; }
.bar b { position: absolute; top: -2px; bottom: -2px; width: 2px; margin-left: -1px; background: var(--mark); }
#filter { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: .4rem 1.5rem; align-items: center;
  margin: 1.5rem -1rem 1rem; padding: .6rem 1rem; background: var(--back); border-bottom: 1px solid var(--line); }
#filter select { font: inherit; max-width: 14rem; }
#shown { margin-left: auto; color: var(--dim); font-variant-numeric: tabular-nums; }
article { margin: 0 0 1rem; padding: .8rem 1rem; background: var(--panel); border: 1px solid var(--line);
  border-left: 4px solid var(--dim); border-radius: 4px; content-visibility: auto; contain-intrinsic-size: auto 20rem; }
article.right { border-left-color: var(--good); }
article.wrong { border-left-color: var(--bad); }
h2 { font-size: 1.05rem; margin: 0; white-space: pre-line; }
.verdict { padding: .1rem .5rem; border-radius: 1rem; font-size: .8rem; background: var(--line); }
.right .verdict { background: var(--good-back); color: var(--good); }
.wrong .verdict { background: var(--bad-back); color: var(--bad); }
.number, .labels, summary, dt, small { color: var(--dim); font-weight: 400; }
.labels { margin: .2rem 0 .6rem; font-size: .85rem; }
audio { width: 100%; max-width: 32rem; height: 2.5rem; display: block; }
.error { color: var(--bad); margin: .5rem 0; }
ol { list-style: upper-alpha; margin: .6rem 0; padding-left: 1.8rem; }
li.answer { color: var(--good); font-weight: 600; }
.wrong li.predicted:not(.answer) { color: var(--bad); font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: .6rem 0; }
dd { margin: 0; white-space: pre-wrap; }
summary { cursor: pointer; font-size: .9rem; }
pre { margin: .5rem 0 0; padding: .6rem; white-space: pre-wrap; background: var(--back); border: 1px solid var(--line);
  border-radius: 4px; font: .85rem/1.45 ui-monospace, monospace; }
@media (max-width: 36rem) { th:nth-child(5):not([colspan]), td:nth-child(5) { display: none; }
  th, td { padding: .2rem .3rem; } }
"""
