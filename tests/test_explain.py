"""--explain: the tokens' terms against grpo_loss and autograd, its step against plain torch, its text and page."""

import copy
import dataclasses
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch.testing import assert_close

import explain
import explain_step
import grpo_aqa
import runtime
from checkpoint import save_checkpoint
from explain_page import Colored, Table, num, to_html, to_text
from explain_step import Token, check_sums, take_apart, take_step
from grpo_aqa import grpo_loss
from lora import add_lora
from policy import completion_logprobs, freeze_audio_tower

CPU = torch.device("cpu")
VARIANTS = [
    {},
    {"ratio": "sequence"},
    {"beta": 0.0},
    {"beta": 0.0, "ratio": "sequence", "loss_average": "token"},
    {"loss_average": "token", "clip_high": 0.28},
    {"loss_average": "constant", "normalize_std": "off"},
]


def settings(**changed):
    """The command line's settings, a group of 6 and at most 7 tokens."""
    changed = {"group_size": 6, "max_new_tokens": 7, "model": "M", "data": "D", "lr": 1e-3} | changed
    return grpo_aqa.parse_args([word for name, value in changed.items() for word in (f"--{name}", str(value))])


# ---- the tokens' terms ----


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_tokens_add_up_to_the_loss_and_have_its_gradient(seed, variant):
    args, g = settings(**variant), torch.Generator().manual_seed(seed)
    logprobs = (-3 * torch.rand(6, 7, generator=g)).requires_grad_()
    old, ref = (logprobs.detach() + 0.4 * torch.randn(6, 7, generator=g) for _ in range(2))
    advantages = torch.randn(6, generator=g)
    mask = torch.arange(7) < torch.randint(1, 8, (6, 1), generator=g)
    length = {"completion": None, "token": mask.sum().item() / 6, "constant": 7.0}[args.loss_average]
    ref = ref if args.beta else None
    limits = args.clip_low, args.clip_high, args.beta, length, args.ratio
    loss, stats = grpo_loss(logprobs, old, ref, advantages, mask, *limits)
    loss.backward()
    words = [["word"] * n for n in mask.sum(dim=1).tolist()]
    completions = take_apart(args, words, logprobs.detach(), old, ref, advantages, length)
    check_sums(completions, {name: value.item() for name, value in (stats | {"loss": loss}).items()}, length)
    gradients = torch.zeros(6, 7)
    for i, tokens in enumerate(completions):
        gradients[i, : len(tokens)] = torch.tensor([token.gradient for token in tokens])
        total = sum(token.loss for token in tokens) / (length or len(tokens))
        alone = grpo_loss(*(x if x is None else x[i : i + 1] for x in (logprobs, old, ref, advantages, mask)), *limits)
        assert total == pytest.approx(alone[0].item(), abs=1e-5)
    assert_close(gradients, logprobs.grad, rtol=1e-4, atol=1e-6)
    assert any(token.clipped for tokens in completions for token in tokens) and "clip_fraction" in stats


@pytest.mark.parametrize("name", ["loss", "kl", "clip_fraction"])
@pytest.mark.parametrize("wrong", [0.001, math.nan])
def test_a_difference_from_the_training_loop_is_an_error(name, wrong):
    tokens = [
        [Token("a", -1.0, -1.2, -1.1, 1.2, True, 0.3, 0.5, 0.0), Token("b", -1.0, -1, -1, 1.0, False, 0.1, 0.7, 0)]
    ]
    stats = {"loss": 0.6, "kl": 0.2, "clip_fraction": 0.5}
    check_sums(tokens, stats, None)
    with pytest.raises(RuntimeError, match=f"{name}: the tokens add up to"):
        check_sums(tokens, stats | {name: stats[name] + wrong}, None)


# ---- the step ----


@pytest.fixture
def rewarded(monkeypatch):
    """A model with random weights is never right: here, a completion is by its text's length."""
    monkeypatch.setattr(grpo_aqa, "accuracy_reward", lambda text, answer: float(len(text) % 2))


@pytest.mark.parametrize(
    "variant",
    [{}, {"updates_per_rollout": 3, "loss_average": "token", "ratio": "sequence", "max_grad_norm": 0.01}],
    ids=str,
)
def test_the_step_is_plain_torchs(tiny, questions, one_process, exact, rewarded, variant):
    """Loss, gradient norm, and the completions' log-probs before and after, by autograd and torch's own AdamW."""
    args, (model, processor) = settings(**variant), tiny
    mine, theirs = copy.deepcopy(model), copy.deepcopy(model)
    step = take_step(args, mine, processor, questions, CPU)
    inputs = step.group.prompt, step.group.completions, step.group.mask, args.temperature
    rewards = [float(len(text) % 2) + float(good) for text, good in zip(step.group.texts, step.group.format_[0])]
    mean = sum(rewards) / 6
    deviation = math.sqrt(sum((r - mean) ** 2 for r in rewards) / 5)
    assert step.advantages == pytest.approx([(r - mean) / (deviation + 1e-4) for r in rewards])
    length = step.group.mask.sum().item() / 6 if args.loss_average == "token" else None
    assert step.length == (None if length is None else pytest.approx(length))

    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=args.lr, weight_decay=0)
    start, _ = completion_logprobs(model, *inputs)
    assert step.before == pytest.approx(start.sum(dim=1).tolist())
    assert len(step.updates) == args.updates_per_rollout
    for update in step.updates:
        logprobs, _ = completion_logprobs(theirs, *inputs)
        limits = args.clip_low, args.clip_high, args.beta, length, args.ratio
        advantages = torch.tensor(step.advantages, dtype=torch.float64)
        loss, _ = grpo_loss(logprobs, start.detach(), start.detach(), advantages, step.group.mask, *limits)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), args.max_grad_norm)
        optimizer.step()
        assert update.stats["loss"] == pytest.approx(loss.item(), abs=1e-9)
        assert update.grad_norm == pytest.approx(norm.item(), rel=1e-6)
        found = [token.policy for tokens in update.tokens for token in tokens]
        assert found == pytest.approx(logprobs[step.group.mask].tolist(), rel=1e-6)
    end, _ = completion_logprobs(theirs, *inputs)
    assert step.after == pytest.approx(end.sum(dim=1).tolist(), rel=1e-6)
    assert step.after != pytest.approx(step.before, rel=1e-4)


def test_questions_with_equal_rewards_are_passed_over(tiny, questions, one_process, monkeypatch):
    """The first two of the order of training have equal rewards; then, all have."""
    args, (model, processor) = settings(steps=5), tiny
    order = [questions[i].id for i in explain_step.step_indices(4, 0, 4, 0, args.seed)]
    calls = []

    def reward(text, answer):
        calls.append(text)
        return float(len(calls) == 2 * 6 + 3)  # one completion of the third question

    monkeypatch.setattr(grpo_aqa, "accuracy_reward", reward)
    step = take_step(args, copy.deepcopy(model), processor, questions, CPU)
    assert step.looked_at == 3 and step.group.question.id == order[2] and len(calls) == 3 * 6
    assert step.advantages[2] == pytest.approx((1 - 1 / 6) / (1 / 6**0.5 + 1e-4)) == max(step.advantages)
    assert "Those before, 2, are passed over" in " ".join(to_text(explain.tell(step, args)).split())

    monkeypatch.setattr(grpo_aqa, "accuracy_reward", lambda text, answer: 1.0)
    step = take_step(args, copy.deepcopy(model), processor, questions, CPU)
    assert step.group.question.id == order[0] and not any(step.advantages)
    text = " ".join(to_text(explain.tell(step, args)).split())
    assert "each of the first 4 questions have equal rewards" in text
    assert "Of 0 with a positive advantage, 0 became likelier; of 0" in text


def test_a_bad_clip_makes_way_for_the_next(tiny, questions, one_process, rewarded, tmp_path, capsys):
    """With --skip_bad_audio; it is named."""
    soundfile.write(tmp_path / "silent.wav", np.zeros(8_000), 16_000)
    bad = [dataclasses.replace(q, audio=str(tmp_path / "silent.wav"), place=f"line {q.id}") for q in questions]
    args, (model, processor) = settings(), tiny
    args.skip_bad_audio = True
    first = explain_step.step_indices(4, 0, 1, 0, args.seed)[0]
    some = [bad[i] if i == first else question for i, question in enumerate(questions)]
    step = take_step(args, copy.deepcopy(model), processor, some, CPU)
    assert step.group.question.id != bad[first].id
    assert f"line {first}: " in (said := capsys.readouterr().out) and "another question takes its place" in said


def test_a_frozen_tower_is_shared_with_the_reference(tiny, questions, one_process, rewarded):
    model = copy.deepcopy(tiny[0])
    freeze_audio_tower(model)
    runs = []
    model.model.audio_tower.conv1.register_forward_hook(lambda *_: runs.append(1))
    args = settings()
    args.freeze_audio_tower = True
    assert take_step(args, model, tiny[1], questions, CPU).looked_at == len(runs)  # once for each question's prompt


# ---- the story ----


class Page(HTMLParser):
    """The page's tokens, each as (text, numbers by name), the cells of its tables, and all tags and attributes."""

    def __init__(self, page):
        super().__init__()
        self.tokens, self.cells, self.tags, self.open = [], [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "meta":
            return
        self.open.append((tag, dict(attributes).get("class") or ""))
        if self.open[-1][1].startswith("token"):
            self.tokens.append(["", {}])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, text):
        tag, kind = self.open[-1] if self.open else ("", "")
        if kind.startswith("token"):
            self.tokens[-1][0] += text
        elif tag == "dt":
            self.name = text
        elif tag == "dd":
            self.tokens[-1][1][self.name] = text
        elif tag == "td":
            self.cells.append(text)


@pytest.mark.parametrize(
    "variant, said, unsaid",
    [
        ({"updates_per_rollout": 2}, ["+ 0.04 * KL", "deviation + 0.0001", "(update 2 of 2)", "own length"], []),
        ({"ratio": "sequence"}, ["exp(mean of policy - old over the completion)"], ["= exp(policy - old)"]),
        ({"beta": 0.0}, ["without a KL term"], ["reference - policy", "* KL"]),
        (
            {"loss_average": "token", "clip_high": 0.28},
            ["divided by the step's mean length", "0.8, 1.28)"],
            ["own length"],
        ),
        ({"loss_average": "constant"}, ["divided by --max_new_tokens"], ["own length"]),
        ({"normalize_std": "off"}, ["advantage = reward - mean, without"], ["deviation +"]),
        ({"lora_rank": 2, "lora_dropout": 0.5}, ["dropout of the adapter"], []),
        ({"template": "direct"}, [], ["<answer>"]),
        ({"template": "think"}, ["<think> </think>"], []),
    ],
    ids=str,
)
def test_text_and_page_have_the_steps_numbers(tiny, questions, one_process, rewarded, variant, said, unsaid):
    args, (model, processor) = settings(**variant), tiny
    model = copy.deepcopy(model).float()
    if args.lora_rank:
        add_lora(model, "M", 2, args.lora_alpha, args.lora_dropout, ["q_proj", "v_proj"], False, 0)
    step = take_step(args, model, processor, questions, CPU)
    parts = explain.tell(step, args)
    text, html = to_text(parts), to_html(parts, "title")
    page, flat = Page(html), " ".join(text.split())
    assert [words for words in said if words not in flat] == [] == [words for words in unsaid if words in flat]
    assert max(map(len, text.splitlines())) < 200

    ids = step.group.prompt["input_ids"][0].tolist()
    audio = ids.count(model.config.audio_token_id)
    assert audio > 0 and f"{len(ids)} tokens: {audio} of audio and {len(ids) - audio} of text" in flat
    for old, new, advantage in zip(step.before, step.after, step.advantages):
        row = [f"{advantage:+.4f}", f"{old:.4f}", f"{new:.4f}", f"{math.exp(old):.4g}", f"{math.exp(new):.4g}"]
        row += [f"{math.exp(new - old):.4g}"]
        assert re.search(r" +".join(map(re.escape, row)), text)
        assert set(row) <= set(page.cells)
    for update in step.updates:
        assert f"= {num(update.stats['loss'], 6)[:-1]}" in flat and f"has norm {update.grad_norm:.4f}" in flat
    tokens = [token for update in step.updates for completion in update.tokens for token in completion]
    assert len(page.tokens) == len(tokens) == len(step.updates) * step.group.mask.sum()
    for (shown, numbers), token in zip(page.tokens, tokens):
        assert shown == token.text.replace("\n", "↵\n") and numbers["token"] == repr(token.text)
        assert numbers["clipped"] == ("yes" if token.clipped else "no")
        values = {"policy": token.policy, "old": token.old, "ratio": token.ratio, "loss term": token.loss}
        values |= {"gradient": token.gradient}
        values |= {"reference": token.reference, "KL": token.kl} if args.beta else {}
        assert {name: float(numbers[name]) for name in values} == pytest.approx(values, abs=6e-7)
        assert numbers.keys() == values.keys() | {"token", "clipped"}


def test_the_page_needs_nothing_and_escapes_everything():
    evil = '</pre><script src="https://a.example/x.js">alert(1)</script>&amp;"\''
    row = (evil, "1")
    parts = [(evil, [evil, explain.Verbatim(evil), Table([row, row]), Colored(row, [[(evil, True, row)]], [-1.0])])]
    html = to_html(parts, evil)
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "a", "base", "object"} & {tag for tag, _ in page.tags}
    assert not {"src", "href", "onload", "srcset"} & {name for _, attributes in page.tags for name in attributes}
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style and "@import" not in style and "//" not in style
    assert page.cells == [evil, "1"] and page.tokens == [[evil, {evil: evil} | {"1": "1"}]]
    assert "color-mix" in style and "prefers-color-scheme: dark" in style and 'style="--with: var(--down)' in html


def test_long_tables_are_cut_in_print_alone():
    rows = [("token", "x"), *((f"word{i}", str(i)) for i in range(100))]
    parts = [("title", [Table(rows, cut=True)])]
    text = to_text(parts)
    assert "(70 tokens are left out here; --explain_html FILE shows all)" in text
    assert len(re.findall(r"^word\d+", text, re.MULTILINE)) == 30 and "word19 " in text and "word90 " in text
    assert sum(cell.startswith("word") for cell in Page(to_html(parts, "t")).cells) == 100


def test_num():
    assert [num(-0.00001), num(0.0, signed=True), num(1.5, 2, signed=True)] == ["0.0000", "0.0000", "+1.50"]


# ---- the command ----


@pytest.fixture(scope="module")
def saved(tiny, questions, tmp_path_factory):
    """The flags of a tiny model and a question file."""
    folder = tmp_path_factory.mktemp("saved")
    save_checkpoint(folder / "model", copy.deepcopy(tiny[0]).float(), tiny[1])
    lines = [
        f'{{"audio": "{q.audio}", "question": "{q.question}", "choices": ["rain", "wind"], "answer": "rain"}}\n'
        for q in questions
    ]
    (folder / "questions.jsonl").write_text("".join(lines))
    return ["--model", str(folder / "model"), "--data", str(folder / "questions.jsonl"), "--max_new_tokens", "5"]


@pytest.mark.parametrize("variant", [[], ["--lora_rank", "2"], ["--freeze_audio_tower"]], ids=str)
def test_command_writes_the_page_and_no_run_folder(saved, tmp_path, monkeypatch, capsys, variant):
    monkeypatch.setattr(runtime, "_patient_group", None)
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    Path("out/metrics.jsonl").write_text("an earlier run's\n")
    flags = [*saved, *variant, "--out", "out"]
    assert explain.explain(grpo_aqa.parse_args([*flags, "--explain_html", "pages/page.html"])) == 0
    printed = capsys.readouterr().out
    assert "1. The prompt" in printed and "page: pages/page.html" in printed
    assert "<h2>5. What it did</h2>" in Path("pages/page.html").read_text(encoding="utf-8")
    assert explain.explain(grpo_aqa.parse_args([*flags, "--explain"])) == 0
    assert capsys.readouterr().out in printed  # the same samples, the same numbers
    files = sorted(str(path) for path in Path().rglob("*"))
    assert files == ["out", "out/audio_headers.json", "out/metrics.jsonl", "pages", "pages/page.html"]
    assert Path("out/metrics.jsonl").read_text() == "an earlier run's\n"


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--explain", "--resume"], "--explain starts from --model"),
        (["--explain_html", "."], "--explain_html .: cannot be written"),
    ],
    ids=str,
)
def test_mistakes_end_in_one_line(saved, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.setattr(runtime, "_patient_group", None)
    monkeypatch.setattr(os, "_exit", lambda status: pytest.fail("left at once"))
    monkeypatch.chdir(tmp_path)
    assert explain.explain(grpo_aqa.parse_args([*saved, *flags])) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1 and errors[0].startswith(f"grpo_aqa.py: error: {message}")


def test_several_processes_are_refused(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runtime, "_patient_group", None)
    monkeypatch.setattr(explain.dist, "get_world_size", lambda: 2)
    assert explain.explain(grpo_aqa.parse_args([*saved, "--explain"])) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("grpo_aqa.py: error: --explain is for a single process")
    assert printed.err.count("\n") == 1


@pytest.mark.slow
def test_torchrun_with_two_processes_is_refused(saved, tmp_path):
    script = str(Path(__file__).parents[1] / "grpo_aqa.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", script, *saved, "--explain"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode != 0 and done.stderr.count("grpo_aqa.py: error: --explain is for a single process") == 1
    assert "1. The prompt" not in done.stdout and list(tmp_path.iterdir()) == []
