"""The story of a step has the step's numbers, as text and as a page, in all variants."""

import copy
import math
import re

import pytest
from test_explain import CPU, settings
from test_explain_page import Page

from evaluation.explain_page import num, to_html, to_text
from evaluation.explain_story import tell
from explain import take_step
from model.lora import add_lora
from reward import REWARDS


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
        ({"lora_rank": 2, "lora_dropout": 0.5, "updates_per_rollout": 2}, ["dropout adds noise"], []),
        ({"template": "direct"}, [], ["<answer>"]),
        ({"template": "think"}, ["<think> </think>"], []),
    ],
    ids=str,
)
def test_text_and_page_have_the_steps_numbers(tiny, questions, one_rank, monkeypatch, variant, said, unsaid):
    # A model with random weights is never right.
    monkeypatch.setitem(REWARDS, "accuracy", lambda text, question, template: float(len(text) % 2))
    args, (model, processor) = settings(**variant), tiny
    model = copy.deepcopy(model).float()
    if args.lora_rank:
        add_lora(model, "M", 2, args.lora_alpha, args.lora_dropout, ["q_proj", "v_proj"], False, 0)
    step = take_step(args, model, processor, questions, CPU)
    parts = tell(step, args)
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
