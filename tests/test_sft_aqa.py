"""Supervised fine-tuning: its targets; loss and gradient against transformers; parts and ranks; the command."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forked import run_processes

import sft_aqa
from data import build_prompt, target_text
from infra.audio import load_audio
from infra.errors import InputError
from infra.processes import mean_over_ranks
from policy import data_parallel, encode_prompts, encode_targets, slice_prompt
from reward import accuracy_reward, format_reward
from training import toy_model

ROOT = Path(__file__).resolve().parents[1]
ANSWERS = ["rain", "a bell", "the wind in the trees", "wind"]  # targets of different lengths


# ---- targets ----


@pytest.mark.parametrize("template", ["direct", "answer"])
def test_a_target_earns_both_rewards(template):
    text = target_text("a bell", template)
    assert accuracy_reward(text, "a bell") == format_reward(text, template) == 1.0
    assert ("<answer>" in text) == (template == "answer")


def test_think_has_no_target(capsys):
    with pytest.raises(InputError, match="think"):
        target_text("a bell", "think")
    with pytest.raises(SystemExit):
        sft_aqa.parse_args(["--template", "think"])
    assert "--template think" in capsys.readouterr().err


def test_targets_end_the_turn(tiny):
    tokenizer = tiny[1].tokenizer
    tokens, mask = encode_targets(tiny[1], ["rain", "the wind in the trees"])
    assert mask.sum(dim=1).tolist() == [len(tokenizer(text + "<|im_end|>")["input_ids"])
                                        for text in ("rain", "the wind in the trees")]  # fmt: skip
    for row, valid, text in zip(tokens, mask, ("rain", "the wind in the trees")):
        assert valid.tolist() == sorted(valid.tolist(), reverse=True)  # padding on the right
        assert row[valid][-1] == tokenizer.eos_token_id and tokenizer.decode(row[valid][:-1]) == text


# ---- the loss ----


def transformers_loss(model, processor, questions, template):
    """Return transformers' own loss: the sum over all questions, one at a time, divided by the number of target tokens.

    The answer is the assistant's turn of a chat. All other labels are -100. The processor pads the audio.
    """
    total, tokens = 0.0, 0
    for question, answer in zip(questions, ANSWERS):
        content = [{"type": "audio", "audio_url": question.audio}]
        content.append({"type": "text", "text": build_prompt(question, template)})
        prompt = processor.apply_chat_template([{"role": "user", "content": content}],
                                               add_generation_prompt=True, tokenize=False)  # fmt: skip
        target = {"direct": answer, "answer": f"<answer>{answer}</answer>"}[template] + "<|im_end|>"
        clip = load_audio(question.audio)
        inputs = processor(text=[prompt + target], audio=[clip], sampling_rate=16_000, return_tensors="pt")
        labels = inputs["input_ids"].clone()
        labels[:, : -len(processor.tokenizer(target)["input_ids"])] = -100
        inputs["input_features"] = inputs["input_features"].to(model.dtype)
        count = (labels != -100).sum().item()
        total, tokens = total + model(**inputs, labels=labels).loss * count, tokens + count
    return total / tokens


def test_loss_counts_target_tokens_alone():
    logprobs = torch.tensor([[-1.0, -2.0, float("nan")], [-4.0, 9.0, -torch.inf]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert sft_aqa.sft_loss(logprobs, mask, length=1.5).item() == pytest.approx((1 + 2 + 4) / 3)


@pytest.mark.parametrize("template", ["direct", "answer"])
@pytest.mark.parametrize("parts", [1, 2])
def test_loss_and_gradient_are_those_of_transformers(tiny, questions, one_rank, template, parts):
    model, processor = tiny
    model.zero_grad(set_to_none=True)
    transformers_loss(model, processor, questions, template).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    expected_loss = transformers_loss(model, processor, questions, template).item()

    prompt = encode_prompts(processor, questions, template)
    targets, mask = encode_targets(processor, [target_text(answer, template) for answer in ANSWERS])
    size = len(questions) // parts
    inputs = [(slice_prompt(prompt, i, i + size), targets[i : i + size], mask[i : i + size])
              for i in range(0, len(questions), size)]  # fmt: skip
    ddp_policy = data_parallel(model, slice_prompt(prompt, 0, 1), checkpointing=False)
    metrics = sft_aqa.accumulate_gradients(ddp_policy, inputs, mask.sum().item() / len(questions))
    assert metrics["loss"] == pytest.approx(expected_loss, rel=1e-6)
    assert 0 < metrics["entropy"] <= torch.tensor(float(model.config.text_config.vocab_size)).log()
    assert len(expected) > 50
    for name, gradient in expected.items():
        ours = dict(model.named_parameters())[name].grad
        assert (ours - gradient).norm() <= 1e-5 * gradient.norm() + 1e-8, name
    model.zero_grad(set_to_none=True)


def shared_gradient(rank, world_size, parts, questions, folder):
    """Save the loss and gradient of four questions, shared by the ranks and split into parts."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    model, processor = toy_model.make_model(questions, seconds=2, seed=0)
    ddp_policy = data_parallel(model, encode_prompts(processor, questions[:1], "answer"), checkpointing=False)
    size = len(questions) // (world_size * parts)
    inputs, count = [], 0
    for part in range(parts):
        rows = slice((rank * parts + part) * size, (rank * parts + part + 1) * size)
        inputs.append((encode_prompts(processor, questions[rows], "answer"), *encode_targets(processor, ANSWERS[rows])))
        count += inputs[-1][-1].sum().item()
    length = mean_over_ranks({"tokens": count / (size * parts)}, torch.device("cpu"))["tokens"]
    loss = sft_aqa.accumulate_gradients(ddp_policy, inputs, length)["loss"]
    loss = mean_over_ranks({"loss": loss}, torch.device("cpu"))["loss"]
    gradient = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    torch.save({"loss": loss, "gradient": gradient}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_parts_and_ranks_do_not_change_the_gradient(questions, tmp_path):
    """The targets differ in length: the mean of the parts' own means would be another number."""
    outcomes = []
    for world_size, parts in ((1, 1), (1, 4), (2, 2)):
        folder = tmp_path / f"{world_size}_{parts}"
        folder.mkdir()
        run_processes(shared_gradient, (world_size, parts, questions, str(folder)), nprocs=world_size)
        outcomes.append(torch.load(folder / "0.pt"))
    for outcome in outcomes[1:]:
        assert outcome["loss"] == pytest.approx(outcomes[0]["loss"], rel=1e-5)
        for name, gradient in outcomes[0]["gradient"].items():
            assert (outcome["gradient"][name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name


# ---- the command ----


def test_a_run_on_two_ranks(tmp_path, questions, tiny):
    tiny[0].float().save_pretrained(tmp_path / "base")
    tiny[0].double()  # other tests expect float64
    tiny[1].save_pretrained(tmp_path / "base")
    records = [{"audio": q.audio, "question": q.question, "choices": q.choices, "answer": q.answer} for q in questions]
    (tmp_path / "questions.json").write_text(json.dumps(records))
    flags = {"model": "base", "data": "questions.json", "heldout": "questions.json", "steps": 12, "save_every": 6,
             "prompts_per_rank": 2, "accumulation_steps": 2, "lr": 3e-3, "max_new_tokens": 12}  # fmt: skip
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, str(ROOT / "sft_aqa.py"), *(f"--{name}={value}" for name, value in flags.items())]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "before SFT" in done.stdout and "after SFT" in done.stdout
    out = tmp_path / "runs" / "base_sft"
    assert sorted(path.name for path in out.glob("step_*")) == ["step_000006", "step_000012"]
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == list(range(1, 13)) and None not in metrics[0].values()
    expected = {"loss", "entropy", "grad_norm", "lr", "completion_tokens", "seconds_data", "seconds_train", "seconds"}
    assert expected <= set(metrics[0])
    assert [m["lr"] for m in metrics] == pytest.approx([3e-3 * (12 - i) / 12 for i in range(12)])
    assert metrics[-1]["loss"] < 0.5 * metrics[0]["loss"]  # four questions with the same answer
    assert json.loads((out / "config.json").read_text())["method"] == "SFT"
    assert (out / "curves.png").stat().st_size > 10_000
