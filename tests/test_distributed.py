"""The same rollouts give the same parameters on one, two and four ranks, in one part and in several."""

import copy

import pytest
import torch
import torch.distributed as dist
from forked import run_processes

from grpo_aqa import accumulate_gradients, loss_length, make_rollouts
from policy import data_parallel, encode_prompts
from training import toy_model
from training.optimizer import ShardedAdamW, clip_scale, trainable

GROUP_SIZE, STEPS = 3, 10
LOSS = dict(temperature=0.9, clip_low=0.2, clip_high=0.2)


def fixed_completions(step, index, vocabulary):
    """Return a question's group in a step, the same on all ranks: random tokens [G, 5], mask [G, 5], advantages [G]."""
    g = torch.Generator().manual_seed(100 * step + index)
    lengths = torch.randint(1, 6, (GROUP_SIZE, 1), generator=g)
    tokens = torch.randint(vocabulary, (GROUP_SIZE, 5), generator=g)
    return tokens, torch.arange(5) < lengths, torch.randn(GROUP_SIZE, generator=g)


def train(rank, world_size, parts, dtype, questions, folder):
    """Take ten AdamW steps on four questions, shared by the ranks and split into parts. Each rank saves its outcome.

    Every third step has beta 0, and advantages for one question alone: the others are left out of the training pass.
    """
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    model, processor = toy_model.make_model(questions, seconds=2, seed=0)
    model.to(dtype)
    reference = copy.deepcopy(model)
    ddp_policy = data_parallel(model, encode_prompts(processor, questions[:1], "answer"), checkpointing=parts > 1)
    optimizer = ShardedAdamW(trainable(model))
    gradient_bytes = {p.grad.untyped_storage().data_ptr(): p.grad.untyped_storage().nbytes() for p in trained(model)}
    indices = range(len(questions))[rank::world_size]
    prompt = encode_prompts(processor, [questions[index] for index in indices], "answer")
    grad_norms = []  # AdamW hides a gradient of the wrong size
    for step in range(STEPS):
        groups = [fixed_completions(step, index, model.config.text_config.vocab_size) for index in indices]
        completions, mask, advantages = (torch.cat(tensors) for tensors in zip(*groups))
        beta = 0.04 if step % 3 else 0.0
        if beta == 0:
            advantages *= torch.tensor([index == step % 4 for index in indices]).repeat_interleave(GROUP_SIZE)
        rollouts = make_rollouts(
            model, reference if beta else None, prompt, completions, mask, advantages,
            parts=parts, temperature=LOSS["temperature"], keep_old=False,
        )  # fmt: skip
        average = ("completion", "token")[step % 2]  # the second needs the lengths of all ranks and parts
        length = loss_length(mask, average, max_new_tokens=5)
        accumulate_gradients(ddp_policy, rollouts, **LOSS, beta=beta, length=length)
        assert {p.grad.untyped_storage().data_ptr() for p in trained(model)} == gradient_bytes.keys()  # no second copy
        grad_norms.append(optimizer.grad_norm())
        optimizer.step(1e-4, clip_scale(grad_norms[-1], 1.0))
    outcome = {"weights": model.state_dict(), "grad_norms": grad_norms, "gradient_bytes": sum(gradient_bytes.values())}
    torch.save(outcome | {"optimizer": optimizer.state}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def run(world_size, parts, dtype, questions, folder):
    """Train on `world_size` ranks. Returns what each rank saved."""
    run_processes(train, (world_size, parts, dtype, questions, str(folder)), nprocs=world_size)
    return [torch.load(folder / f"{rank}.pt") for rank in range(world_size)]


@pytest.fixture(scope="module")
def alone(questions, tmp_path_factory):
    """The outcome of a single rank in one part, in float32."""
    return run(1, 1, torch.float32, questions, tmp_path_factory.mktemp("one"))[0]


@pytest.mark.parametrize("world_size, parts", [(1, 2), (2, 1), (2, 2), (4, 1)])
def test_ranks_and_parts_do_not_change_the_result(questions, alone, tmp_path, world_size, parts):
    ranks = run(world_size, parts, torch.float32, questions, tmp_path)
    start = toy_model.make_model(questions, seconds=2, seed=0)[0].state_dict()
    assert ranks[0]["grad_norms"] == pytest.approx(alone["grad_norms"], rel=1e-5)
    for name, weight in alone["weights"].items():
        assert all(torch.equal(rank["weights"][name], ranks[0]["weights"][name]) for rank in ranks), name
        off = (ranks[0]["weights"][name] - weight).abs()  # the weights moved by up to 10 steps x 1e-4
        assert off.max() < 2e-5 and off.mean() < 1e-8, name
        if not name.endswith("embed_positions.weight"):  # the audio tower's fixed sinusoids
            assert (weight - start[name]).abs().max() > 1e-4, f"{name} was not trained"


def test_optimizer_state_is_sharded(questions, tmp_path):
    """Each parameter's state is on one of four ranks, each rank has a fourth of all bytes, and gradients exist once."""
    ranks = run(4, 1, torch.float32, questions, tmp_path)
    trainable = {n: p for n, p in toy_model.make_model(questions, 2, 0)[0].named_parameters() if p.requires_grad}
    names = [name for rank in ranks for name in rank["optimizer"]]
    assert sorted(names) == sorted(trainable)
    weights = sum(p.numel() for p in trainable.values())
    for rank in ranks:
        held = sum(tensor.nbytes for state in rank["optimizer"].values() for tensor in state.values())
        assert held == pytest.approx(12 * weights / 4, rel=0.1)
        assert rank["gradient_bytes"] == pytest.approx(4 * weights, rel=0.001)
