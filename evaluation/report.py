"""Report evaluations: tables for one checkpoint, table and picture for a run, a page to read and listen to."""

import csv
import io
from itertools import groupby
from pathlib import Path

from data import Question
from evaluation.ablations import SILENCE, ablation_table, orders_table
from evaluation.scores import (
    ALL_APART,
    FIELDS,
    Score,
    accuracy_by,
    accuracy_rows,
    accuracy_table,
    align,
    best_step,
    exact_figures,
    guessing,
    in_order,
    is_right,
    percent,
    read_predictions,
    require_same_questions,
    samples_table,
    score_cells,
    step_name,
    visible,
    wilson_interval,
)
from evaluation.versions import name_files
from evaluation.web_page import escape as _e
from evaluation.web_page import player, web_page
from infra.errors import InputError
from infra.files import write_text
from infra.pictures import save_picture
from reward import as_choice, prediction

TASKS = {"sound", "music", "speech"}  # MMAU's: if a question has one of them, each has a column

# ---- one checkpoint ----


def checkpoint_report(
    questions: list[Question], predicted: dict[str, list[dict]], samples: int | None, note: str
) -> list[str]:
    """Return the tables of one checkpoint's evaluations, computed from the records of its predictions files.

    predicted: the records by the evaluation's name; several are compared in one table. samples: how many completions
    each record holds, None if decoding was greedy. note: how the questions were changed.
    """
    scored = [i for i, question in enumerate(questions) if question.answer is not None]
    asked, plain, lines = [questions[i] for i in scored], predicted["plain"], []

    def right(answer):
        return [is_right(questions[i], answer(i)) for i in scored]

    correct = {name: right(lambda i: records[i]["model_prediction"]) for name, records in predicted.items()}
    if scored and SILENCE in predicted:
        lines.append(ablation_table(asked, correct))
    elif scored and len(predicted) > 1:
        answers = [[records[i]["model_prediction"] for records in predicted.values()] for i in scored]
        same = [len(set(own)) == 1 and "error" not in plain[i] for i, own in zip(scored, answers)]
        lines.append(orders_table(asked, list(correct.values()), same))
        lines.append(f"guessing would score {percent(guessing(asked), 1)}{note}")
    elif scored:
        lines += [f"majority vote of {samples} samples"] if samples else []
        lines.append(accuracy_table(asked, correct["plain"]))
        lines.append(f"guessing would score {percent(guessing(asked), 1)}{note}")
        if samples:
            texts = [record["samples"] or [""] * samples for record in plain]
            sampled = [right(lambda i: prediction(texts[i][k], questions[i].choices)) for k in range(samples)]
            lines.append(samples_table(asked, [list(own) for own in zip(*sampled)], correct["plain"]))
    said = {name: [records[i]["model_prediction"] for i in scored] for name, records in predicted.items()}
    lines += exact_figures(asked, said) or [ALL_APART] * any(q.choices for q in asked)
    if len(scored) < len(questions):
        lines.append(f"{len(questions) - len(scored)} questions have no answer and are not scored")
    unusable = sum("error" in record for record in plain)
    if unusable:
        lines.append(f"{unusable} questions without a usable clip count as wrong")
    return lines


# ---- the checkpoints of a run ----


def run_report(folder: str, results: list[tuple[int, str]], caption: str) -> str:
    """Write folder/mmau_scores.md, .csv and .png about a run's checkpoints. Returns the table and its conclusions.

    results: (step, its predictions file), steps ascending. caption: what was evaluated, and how. Questions without an
    answer are left out. If no question has an answer, earlier reports are removed. Raises InputError if two files hold
    different questions.
    """
    first_path = results[0][1]
    first, _ = read_predictions(first_path)
    scored = [i for i, question in enumerate(first) if question.answer is not None]
    if not scored:
        for extension in ("md", "csv", "png"):  # left by an evaluation of other questions
            Path(folder, f"mmau_scores.{extension}").unlink(missing_ok=True)
        return f"{first_path}: no question has an answer, so there are no scores to report"
    questions = [first[i] for i in scored]
    correct, said = {}, {}
    for step, path in results:
        own, predicted = read_predictions(path)
        try:
            require_same_questions(first_path, first, path, own)
        except InputError as error:
            raise InputError(f"{error}; remove the outdated file and evaluate again") from None
        correct[step] = [is_right(first[i], predicted[i]) for i in scored]
        said[step_name(step)] = [predicted[i] for i in scored]

    caption = visible(caption)
    found = {question.task for question in questions} - {None}
    tasks = in_order(found | TASKS if not found or found & TASKS else found)
    rows = [("checkpoint", *tasks, "average", "95% interval", "right")]
    for step, rights in correct.items():
        by_task = accuracy_by(questions, rights, "task")
        average, interval, counts = score_cells(Score(sum(rights), len(rights)))
        cells = [percent(*by_task.get(task, Score(0, 0))) for task in tasks]
        rows.append((step_name(step), *cells, average, interval, counts))
    chance = guessing(questions)
    conclusions = [*best_step(correct), f"guessing would score {percent(chance, 1)}"]
    conclusions += exact_figures(questions, said) or [ALL_APART] * any(q.choices for q in questions)
    conclusions += name_files({step_name(step): path for step, path in results})

    write_text(Path(folder, "mmau_scores.md"), _markdown(caption, rows, conclusions))
    write_text(Path(folder, "mmau_scores.csv"), _csv(questions, correct, tasks))
    _draw(Path(folder, "mmau_scores.png"), caption, questions, correct, chance)
    return "\n".join([caption, align(rows, right=range(1, len(rows[0]))), *conclusions])


def escape_markdown(text: str) -> str:
    """Escape Markdown's markup: a file's name or a task may be any text."""
    return "".join("\\" + c if c in "\\`*_[]<>|&~$" else c for c in visible(text))


def _markdown(caption: str, rows: list[tuple], conclusions: list[str]) -> str:
    heading, *others = rows
    lines = ["| " + " | ".join(row) + " |" for row in (map(escape_markdown, heading), *others)]
    lines.insert(1, "|---|" + "---:|" * (len(heading) - 1))
    lines = ["# Accuracy by checkpoint", "", escape_markdown(caption), "", *lines, ""]
    return "\n".join([*lines, *(f"- {line}" for line in conclusions), ""])


def _csv(questions: list[Question], correct: dict[int, list[bool]], tasks: list[str]) -> str:
    """Return accuracies in percent with four decimals, for other programs; a cell without questions is empty."""
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
    """Draw accuracy over steps: all questions with the 95% interval as a band, each task as a thin line."""
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
    axis.vlines(steps, lows, highs, color="C0", alpha=0.5, linewidth=0.8)  # a single checkpoint has no band
    axis.plot(steps, shares(totals), color="C0", marker="o", linewidth=2, label=f"all {len(questions)} questions")
    for i, task in enumerate(by_task[0], start=1):
        label = f"{visible(task)} ({by_task[0][task].total})".replace("$", r"\$")  # else matplotlib reads a formula
        own = shares(scores[task] for scores in by_task)
        axis.plot(steps, own, color=f"C{i}", marker=".", linewidth=0.9, label=label)
    axis.axhline(100 * chance, color="gray", linestyle=":", linewidth=1, label="guessing")
    axis.set_title(caption.replace("$", r"\$"), fontsize=9)
    axis.set_xlabel("step")
    axis.set_ylabel("accuracy (%)")
    axis.set_xticks(steps if len(steps) <= 12 else steps[:: -(-len(steps) // 12)])
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
    save_picture(figure, path, dpi=100)


# ---- a page to read and listen to ----


def write_html(path: str, questions: list[Question], records: list[dict], title: str) -> None:
    """Write a page that shows every question with its clip, the prediction and the right answer.

    questions: from data.load_questions, with audio paths relative to the current folder. records: the predictions
    file's records in the same order. The page links clips relative to itself. It needs no network, and JavaScript only
    for its filter, which is part of its address: report.html#wrong&task=music.
    """
    correct = [
        None if question.answer is None else is_right(question, record["model_prediction"])
        for question, record in zip(questions, records, strict=True)
    ]
    scored = [i for i, right in enumerate(correct) if right is not None]
    tasks = in_order({question.task for question in questions if question.task is not None})
    options = "".join(f'<option value="{_e(task)}">{_e(task)}</option>' for task in tasks)
    items = [
        _item(number, question, record, right, path)
        for number, (question, record, right) in enumerate(zip(questions, records, correct), start=1)
    ]
    body = f"""<header>
<h1>{_e(title)}</h1>
{_html_table([questions[i] for i in scored], [records[i]["model_prediction"] for i in scored])}
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


def _html_table(questions: list[Question], predicted: list[str]) -> str:
    if not questions:
        return "<p>No question has an answer, so nothing is scored.</p>"
    correct, lines = list(map(is_right, questions, predicted)), []
    for field, rows in groupby(accuracy_rows(questions, correct), key=lambda row: row[0]):
        if field in FIELDS:
            lines.append(f'<tr class="group"><th colspan="5">{field.replace("_", "-")}</th></tr>')
        for _, value, score in rows:
            cells = [_e(value) if field in FIELDS else "all questions", *score_cells(score), _bar(score)]
            lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    headings = '<th></th><th>accuracy</th><th>95% interval</th><th>right</th><th class="scale">0 to 100%</th>'
    table = "\n".join([f"<thead><tr>{headings}</tr></thead>", "<tbody>", *lines, "</tbody>"])
    notes = [f"guessing would score {percent(guessing(questions), 1)}", *exact_figures(questions, {"": predicted})]
    return f"<table>\n{table}\n</table>\n" + "\n".join(f"<p>{_e(note)}</p>" for note in notes)


def _bar(score: Score) -> str:
    """Draw a score on a scale from 0 to 100%: a block for its interval, a line for the score."""
    low, high = (100 * end for end in wilson_interval(*score))
    block = f'<i style="left:{low:.2f}%;width:{high - low:.2f}%"></i>'
    return f'<div class="bar">{block}<b style="left:{percent(*score)}"></b></div>'


def _item(number: int, question: Question, record: dict, right: bool | None, page: str) -> str:
    verdict = {True: "right", False: "wrong", None: "unscored"}[right]
    predicted = record["model_prediction"]
    if predicted in question.spelled and predicted not in question.choices:  # "(A) a dog" for "a dog"
        predicted = question.choices[question.spelled.index(predicted)]
    labels = [label for field in FIELDS if (label := getattr(question, field)) is not None]
    choices = []
    answer = question.answer and as_choice(question.answer, question.choices)  # None if withheld
    for choice in question.choices:
        marks = [mark for mark, text in (("answer", answer), ("predicted", predicted)) if choice == text]
        notes = "".join(f" <small>{mark}</small>" for mark in marks)
        choices.append(f'<li class="{" ".join(marks)}">{_e(choice)}{notes}</li>')
    error = f'<p class="error">{_e(record["error"])}</p>\n' if record.get("error") else ""
    right_answer = "withheld" if answer is None else _e(" or ".join([answer, *question.also]))
    samples = record.get("samples")
    texts = samples if isinstance(samples, list) and samples else [record.get("completion", predicted)]
    name = "whole completion" if len(texts) == 1 else f"all {len(texts)} completions"
    completions = "".join(f"<pre>\n{_e(text)}</pre>" for text in texts)
    return f"""<article class="{verdict}" data-verdict="{verdict}" data-task="{_e(question.task or "")}">
<h2><span class="verdict">{verdict}</span> <span class="number">{number}</span> {_e(question.question)}</h2>
<p class="labels">{" &middot; ".join(_e(label) for label in [*labels, f"id {question.id}"])}</p>
{player(question.audio, page)}
{error}<ol>{"".join(choices)}</ol>
<dl><dt>prediction</dt><dd>{_e(predicted) or "<em>empty</em>"}</dd><dt>right answer</dt><dd>{right_answer}</dd></dl>
<details><summary>{name}</summary>{completions}</details>
</article>
"""


# The address holds the filter, so that a filtered page can be linked and the back button works.
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
:root { --good: #1a7f37; --good-back: #e3f5e7; --bad: #b3261e; --bad-back: #fdeceb; --mark: #2f6fd0; }
@media (prefers-color-scheme: dark) {
  :root { --good: #6cc98a; --good-back: #17301f; --bad: #f28b82; --bad-back: #3a1d1b; --mark: #7fb0ff; } }
body { max-width: 54rem; padding-bottom: 4rem; }
table { width: 100%; }
th, td { padding: .2rem .6rem; }
td:first-child { text-align: left; white-space: normal; }
.group th, th.scale { text-align: left; }
.group th { padding-top: .7rem; border-bottom: 1px solid var(--line); }
td:last-child { width: 30%; }
.bar { position: relative; height: .8rem; min-width: 5rem; background: var(--panel); border: 1px solid var(--line); }
.bar i { position: absolute; top: 0; bottom: 0; background: var(--mark); opacity: .4; }
.bar b { position: absolute; top: -2px; bottom: -2px; width: 2px; margin-left: -1px; background: var(--mark); }
article.right { border-left-color: var(--good); }
article.wrong { border-left-color: var(--bad); }
h2 { font-size: 1.05rem; margin: 0; white-space: pre-line; }
.verdict { padding: .1rem .5rem; border-radius: 1rem; font-size: .8rem; background: var(--line); }
.right .verdict { background: var(--good-back); color: var(--good); }
.wrong .verdict { background: var(--bad-back); color: var(--bad); }
.number, summary, dt, small { color: var(--dim); font-weight: 400; }
.error { color: var(--bad); margin: .5rem 0; }
ol { list-style: upper-alpha; margin: .6rem 0; padding-left: 1.8rem; }
li.answer { color: var(--good); font-weight: 600; }
.wrong li.predicted:not(.answer) { color: var(--bad); font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: .6rem 0; }
dd { margin: 0; white-space: pre-wrap; }
summary { cursor: pointer; font-size: .9rem; }
pre { margin: .5rem 0 0; padding: .6rem; background: var(--back); line-height: 1.45; }
@media (max-width: 36rem) { th:nth-child(5):not([colspan]), td:nth-child(5) { display: none; }
  th, td { padding: .2rem .3rem; } }
"""
