"""metrics.jsonl and completions.jsonl have complete lines in the order of steps, however a run ended; curves.png."""

import json
import math
import statistics
from dataclasses import replace

import matplotlib.figure
import pytest
import torch
from matplotlib.axes import Axes

from data import Question
from evaluation.scores import wilson_interval
from policy import encode_prompts, sample_group
from training.groups import Groups
from training.metrics import append_jsonl, cut_jsonl, draw_curves, log_completions, summarize

# ---- a step ----


def test_metrics_of_completions_against_loops(one_rank, tiny, questions, monkeypatch):
    """Some completions end at the limit, some before, and some are cut there. The rank is one of two."""
    model, processor = tiny
    stops = list(range(0, model.config.text_config.vocab_size, 4))
    prompt, generator = encode_prompts(processor, questions, "answer"), torch.Generator().manual_seed(2)
    completions, mask, logprobs = sample_group(model, prompt, 6, 3, 1.0, stops, generator)
    lengths = [int(row.sum()) for row in mask]
    ends = [int(row[length - 1]) in stops for row, length in zip(completions, lengths)]
    assert {(length, end) for length, end in zip(lengths, ends)} == {(1, True), (2, True), (3, True), (3, False)}
    accuracy = torch.tensor([[1.0] * 6, [0.0] * 6, [1.0] * 3 + [0.0] * 3, [0.0] * 6])
    format_ = torch.tensor([[1.0] * 6, [0.0] * 5 + [1.0], [0.0] * 3 + [1.0] * 3, [0.0] * 6])
    scores, rewards = {"accuracy": accuracy, "format": format_}, accuracy + format_
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    first = Groups(questions, prompt, completions, mask, logprobs, [], scores, rewards)
    trained = replace(first, rewards=rewards.clone())
    trained.rewards[2] = torch.arange(6)  # the others of equal rewards were not replaced
    metrics = summarize([first, trained, first], trained, stops, seconds=0.5)
    deviations = [statistics.stdev(group) for group in rewards.tolist()]
    assert metrics == pytest.approx({
        "reward": rewards.sum().item() / 24, "reward_std": sum(deviations) / 4, "accuracy": 9 / 24, "format": 10 / 24,
        "equal_reward_groups": 3 / 4, "replaced_groups": 1 / 4, "sampling_rounds": 3, "all_right_groups": 1 / 4,
        "all_wrong_groups": 2 / 4,
        "completion_tokens": sum(lengths) / 24, "truncated_completions": ends.count(False) / 24,
        "tokens_per_second": 2 * 3 * sum(lengths) / 0.5,
    })  # fmt: skip
    del scores["accuracy"]
    assert metrics.keys() - summarize([first], first, stops, seconds=0.5).keys() == {
        "accuracy", "all_right_groups", "all_wrong_groups"}  # fmt: skip


# ---- lines ----


def test_cut_jsonl_keeps_the_complete_lines_up_to_a_step(tmp_path):
    file = tmp_path / "metrics.jsonl"
    kept = '{"step": 1}\n{"step": 2, "text": "line\u2028separator, 漢字"}\n'
    file.write_text(kept + '{"step": 3}\n{"step": 4}\n{"step": 2, "te', encoding="utf-8")
    cut_jsonl(file, 2)
    assert file.read_text(encoding="utf-8") == kept
    cut_jsonl(tmp_path / "none.jsonl", 2)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_cut_jsonl_drops_a_line_that_ends_within_a_character(tmp_path):
    """A killed process may have written half of a character that takes several bytes."""
    file = tmp_path / "completions.jsonl"
    file.write_bytes(b'{"step": 1}\n{"step": 2, "text": "' + "漢".encode()[:2])
    cut_jsonl(file, 2)
    assert file.read_text() == '{"step": 1}\n'


def test_completions_have_one_line_a_question(tmp_path):
    """Each line has its question's group of completions, rewards and advantages."""
    asked = [Question(name, f"{name}.wav", "What?", ["x", "y"], answer) for name, answer in (("a", "x"), ("b", "y"))]
    rewards = torch.tensor([[0.0, 2.0, 1.0], [1.0, 1.0, 1.0]])
    advantages = torch.tensor([[-1.0, 1.0, 0.0], [0.0, 0.0, 1 / 3]])
    scores = {"accuracy": torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0]]), "format": torch.ones(2, 3)}
    texts = ["1", "2", "3", "4", "5", "line\n\u2028 six"]
    tokens = torch.zeros(6, 1)
    groups = Groups(asked, {}, tokens, tokens, tokens, texts, scores, rewards)
    records = log_completions(tmp_path / "c.jsonl", 7, "direct", groups, advantages)
    first, second = map(json.loads, (tmp_path / "c.jsonl").read_text(encoding="utf-8").split("\n")[:-1])
    assert records == [first, second]
    prompt = "What? Please choose the answer from the following options: ['x', 'y']."
    assert first == {"step": 7, "id": "a", "audio": "a.wav", "prompt": prompt, "answer": "x",
                     "completions": ["1", "2", "3"], "rewards": [0, 2, 1], "accuracy": [0, 1, 0],
                     "format": [1, 1, 1], "advantages": [-1, 1, 0]}  # fmt: skip
    assert second["completions"][2] == "line\n\u2028 six" and second["advantages"] == [0, 0, 0.3333]


# ---- curves ----


@pytest.fixture
def drawn(monkeypatch):
    """The curves in curves.png: title of the plot -> the points of each curve."""
    lines, original = {}, matplotlib.figure.Figure.savefig

    def savefig(figure, path, **options):
        for axis in figure.axes:
            lines[axis.get_title()] = [list(zip(*map(list, line.get_data()))) for line in axis.lines]
        original(figure, path, **options)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    return lines


def test_curves_are_the_metrics_and_their_running_mean(tmp_path, drawn):
    """A non-numeric value becomes a gap, a metric that no step has is not drawn, and a damaged line is skipped."""
    values = [3.0, 1.0, None, 5.0, 7.0, 9.0, 2.0, 4.0]
    shares = {"all_wrong_groups": 0.5, "truncated_completions": 0.25}  # but no groups that are all right
    for step, value in enumerate(values, start=1):
        append_jsonl(tmp_path / "metrics.jsonl", {"step": step, "loss": 1.0, "accuracy": value} | shares)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": "nine"}\n{"step": 9, "accu')
    draw_curves(tmp_path)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["curves.png", "metrics.jsonl"]
    accuracy, smooth = drawn.pop("sampled training accuracy")
    assert [point for point in accuracy if not math.isnan(point[1])] == [
        (step, value) for step, value in enumerate(values, start=1) if value is not None
    ]
    pairs = zip(values, values[1:])  # a window of a quarter of the steps
    expected = [(step, sum(pair) / 2) for step, pair in enumerate(pairs, start=2) if None not in pair]
    assert [point for point in smooth if not math.isnan(point[1])] == expected
    drawn_shares = [{share for _, share in line} for line in drawn.pop("shares of groups and completions")]
    assert drawn_shares == [{0.5}, {0.5}, {0.25}, {0.25}]  # a thin and a thick line of each
    assert [title for title, lines in drawn.items() if lines] == ["loss"]


def test_heldout_scores_are_drawn_at_their_steps_with_an_interval(tmp_path, drawn):
    for step, share in ((1, None), (2, 0.5), (3, None), (4, 1.0), (5, "damaged")):
        scores = {"heldout_accuracy": share, "heldout_questions": 40} if share is not None else {}
        append_jsonl(tmp_path / "metrics.jsonl", {"step": step, "loss": 1.0} | scores)
    draw_curves(tmp_path)
    assert drawn["held-out accuracy (greedy, 95% interval)"] == [[(2, 0.5), (4, 1.0)]]
    with pytest.MonkeyPatch.context() as patch:
        bands = []
        patch.setattr(Axes, "fill_between", lambda axis, *ends, **_: bands.append(ends))
        draw_curves(tmp_path)
    [(steps, lows, highs)] = bands
    assert steps == [2, 4] and list(zip(lows, highs)) == [wilson_interval(20, 40), wilson_interval(40, 40)]


def test_no_picture_without_metrics(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "seconds": 2}\n')
    draw_curves(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
