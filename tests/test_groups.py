"""Dynamic sampling: which questions are used when, against a simulation on paper, for one rank and for two."""

import copy
import json
import random

import pytest
import torch
import torch.distributed as dist
from forked import run_processes
from training_runs import BATCH, QUESTIONS, lines, metrics

from data import step_indices
from model.qwen2_audio import FIELDS, freeze_audio_tower
from policy import completion_logprobs, encode_prompts, listen, sample_group
from training.groups import Groups, equal_rewards, needs_sampling, replace_equal


def differ(rank, step, number, question):
    """Tell whether the rewards of a group differ: a fixed random choice, seldom true."""
    return random.Random(f"{rank} {step} {number} {question}").random() < 0.4


def simulate(ranks, batch, steps, more, questions):
    """Simulate the steps on paper. Returns the questions that each rank trains on in each step, and all positions.

    The stream of questions is dealt out in batches, to rank 0, 1, 2, ... and so on.
    """
    stream = [q for epoch in range(99) for q in step_indices(questions, epoch * questions, questions, 0, seed=3)]
    position, trained, positions = 0, [], []
    for step in range(steps):
        kept = [[] for _ in range(ranks)]  # (question, useful) of each rank
        for number in range(1 + more):
            for rank in range(ranks):
                fresh = [(q, differ(rank, step, number, q)) for q in stream[position : position + batch]]
                position += batch
                if number == 0:
                    kept[rank], fresh = fresh, []
                for slot in range(batch):
                    while not kept[rank][slot][1] and fresh:
                        candidate = fresh.pop(0)
                        if candidate[1]:
                            kept[rank][slot] = candidate
            if all(useful for own in kept for _, useful in own):
                break
        trained.append([[q for q, _ in own] for own in kept])
        positions.append(position)
    return trained, positions


def sample(rank, step, number, asked):
    """Make the groups of a round of sampling, without a model."""
    rewards = torch.tensor([[1.0, 1.0 + differ(rank, step, number, q)] for q in asked])
    prompt = {name: torch.ones(len(asked), 1) for name in FIELDS}
    prompt["input_features"] = torch.tensor(asked)[:, None, None].float()
    tokens = torch.tensor(asked).repeat_interleave(2)[:, None]
    return Groups(asked, prompt, tokens, tokens, tokens, [""] * len(tokens), {"a": rewards}, rewards)


def walk(rank, ranks, batch, steps, more, folder):
    """Take the steps on one of several ranks, each a process of its own, and write what simulate returns."""
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", ranks), rank=rank, world_size=ranks)
    position, trained, positions = 0, [], []
    for step in range(steps):
        sampled = []
        while needs_sampling(sampled, more):
            asked = step_indices(7, position, batch, rank, seed=3)
            position += batch * ranks
            sampled.append(sample(rank, step, len(sampled), asked))
        groups = replace_equal(sampled)
        trained.append(groups.questions)
        positions.append(position)
        assert groups.completions[::2, 0].tolist() == groups.prompt["input_features"].flatten().tolist() == trained[-1]
        assert equal_rewards(groups.rewards).tolist() == [a == b for a, b in groups.scores["a"].tolist()]
    (folder / f"{rank}.json").write_text(json.dumps([trained, positions]))
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks, batch, more", [(1, 4, 0), (1, 3, 5), (2, 2, 2)])
def test_the_questions_are_the_ones_of_the_simulation(tmp_path, ranks, batch, more):
    """Two ranks take the same number of rounds. A rank that has enough groups drops the later ones."""
    steps = 12
    args = ranks, batch, steps, more, tmp_path
    walk(0, *args) if ranks == 1 else run_processes(walk, args, ranks)
    trained, positions = simulate(ranks, batch, steps, more, questions=7)
    for rank in range(ranks):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found == [[own[rank] for own in trained], positions]
    rounds = {(b - a) // (ranks * batch) for a, b in zip([0, *positions], positions)}
    assert max(rounds) == 1 + more if more < 5 else len(rounds) > 2


def test_a_run_takes_the_questions_in_order(runs, forker):
    """Each round takes the next batch. Groups of equal rewards are replaced by groups of the same step."""
    flags = ["--model=base", "--data=questions.jsonl", "--steps=4", f"--prompts_per_rank={BATCH}",
             "--max_new_tokens=8", "--beta=0", "--log_completions_every=1", "--dynamic_sampling=2",
             "--group_size=2", "--out=dynamic"]  # fmt: skip
    done = forker.run(runs, ["grpo_aqa.py", *flags])
    assert done.returncode == 0, done.stderr
    used, position = [json.loads(line) for line in lines(runs / "dynamic" / "completions.jsonl")], 0
    for own in metrics(runs / "dynamic"):
        taken = int(own["sampling_rounds"]) * BATCH
        stream = [f"{i}.wav" for i in step_indices(QUESTIONS, position, taken, rank=0, seed=0)]
        records, position = [record for record in used if record["step"] == own["step"]], position + taken
        useful = [len(set(record["rewards"])) > 1 for record in records]
        left = own["equal_reward_groups"] - own["replaced_groups"]
        assert useful.count(False) == left * BATCH and (left == 0 or own["sampling_rounds"] == 3)
        replaced = [new["audio"] for new, old in zip(records, stream) if new["audio"] != old]
        assert len(replaced) <= own["replaced_groups"] * BATCH and all(audio in stream[BATCH:] for audio in replaced)
    progress = runs / "dynamic" / "resume" / "step_000004" / "progress.json"
    assert json.loads(progress.read_text())["position"] == position
    assert len({own["sampling_rounds"] for own in metrics(runs / "dynamic")}) > 1


@pytest.mark.parametrize("frozen", [False, True])
def test_replaced_groups_are_whole(exact, tiny, questions, frozen):
    """Prompts of other lengths and completions of other lengths come together as if they were encoded together."""
    model, processor = copy.deepcopy(tiny[0]), tiny[1]
    generator, rounds = torch.Generator().manual_seed(0), []
    for asked in (questions[:2], questions[2:], questions[1:3]):
        prompt = encode_prompts(processor, asked, "answer")
        if frozen:
            freeze_audio_tower(model)
            prompt = listen(model, prompt)
        tokens = sample_group(model, prompt, 3, 5 + len(rounds), 1.0, list(range(0, 99, 5)), generator)
        rewards = torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, len(rounds)]])
        texts = [f"{len(rounds)} {i}" for i in range(6)]
        rounds.append(Groups(asked, prompt, *tokens, texts, {"format": rewards + 1}, rewards))
    found = replace_equal(rounds)
    assert found.questions == [questions[3], questions[1]]
    assert found.texts == [f"1 {i}" for i in (3, 4, 5)] + [f"0 {i}" for i in (3, 4, 5)]
    assert found.rewards.tolist() == [[0, 1, 1], [0, 1, 0]] == (found.scores["format"] - 1).tolist()
    expected = encode_prompts(processor, found.questions, "answer")
    expected = listen(model, expected) if frozen else expected
    for name in ("attention_mask", "feature_attention_mask"):
        assert torch.equal(found.prompt[name], expected[name])
    real = expected["attention_mask"].bool()
    assert torch.equal(found.prompt["input_ids"][real], expected["input_ids"][real])
    for mel, other, frames in zip(*(p["input_features"] for p in (found.prompt, expected)), [200, 100]):
        assert torch.equal(mel[:, : frames + 2], other[:, : frames + 2])
    logprobs, _ = completion_logprobs(model, found.prompt, found.completions, found.mask, 1.0)
    torch.testing.assert_close(logprobs, found.sampled_logprobs)
    assert not found.mask.all() and replace_equal(rounds[:1]) is rounds[0]
