"""The same rollouts give the same parameters on one process and on two, in one part and in several."""

import copy
from argparse import Namespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

import toy
from grpo_aqa import CompletionLogprobs, Rollout, accumulate_gradients
from optimizer import MasterAdamW
from policy import completion_logprobs, encode_prompts

GROUP_SIZE, STEPS = 3, 3
SETTINGS = Namespace(temperature=0.9, clip_low=0.2, clip_high=0.2, beta=0.04)


def fixed_completions(step, index, vocabulary):
    """The group of question `index` in a step: [G, 5] random tokens, mask and advantages, the same everywhere."""
    g = torch.Generator().manual_seed(100 * step + index)
    lengths = torch.randint(1, 6, (GROUP_SIZE, 1), generator=g)
    tokens = torch.randint(vocabulary, (GROUP_SIZE, 5), generator=g)
    return tokens, torch.arange(5) < lengths, torch.randn(GROUP_SIZE, generator=g)


def train(rank, world_size, parts, questions, folder):
    """Three AdamW steps on four questions, shared by the processes and split into parts; rank 0 saves the outcome."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    model, processor = toy.make_model(questions, seconds=2, seed=0)
    model.double()
    reference = copy.deepcopy(model)
    ddp_policy = DistributedDataParallel(CompletionLogprobs(model), gradient_as_bucket_view=True)
    optimizer = MasterAdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    share = len(questions) // (world_size * parts)
    grad_norms = []  # AdamW forgives a gradient of the wrong size, its norm does not
    for step in range(STEPS):
        rollouts = []
        for part in range(parts):
            start = (rank * parts + part) * share
            indices = range(start, start + share)
            groups = [fixed_completions(step, index, model.config.text_config.vocab_size) for index in indices]
            completions, mask, advantages = (torch.cat(tensors) for tensors in zip(*groups))
            prompt = encode_prompts(processor, [questions[i] for i in indices], "answer")
            with torch.no_grad():
                ref_logprobs, _ = completion_logprobs(reference, prompt, completions, mask, SETTINGS.temperature)
            rollouts.append(Rollout(prompt, completions, mask, advantages, ref_logprobs, None))
        accumulate_gradients(ddp_policy, rollouts, SETTINGS)
        grad_norms.append(optimizer.step(lr=1e-3, max_grad_norm=1.0))
    if rank == 0:
        torch.save((model.state_dict(), grad_norms), f"{folder}/trained.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def one_process(questions, tmp_path_factory):
    return run(1, 1, questions, tmp_path_factory.mktemp("one"))


def run(world_size, parts, questions, folder):
    mp.spawn(train, (world_size, parts, questions, str(folder)), nprocs=world_size)
    return torch.load(folder / "trained.pt")


@pytest.mark.parametrize("world_size, parts", [(1, 2), (2, 1), (2, 2)])
def test_processes_and_parts_do_not_change_the_result(questions, one_process, tmp_path, world_size, parts):
    (weights, grad_norms), (expected, expected_norms) = run(world_size, parts, questions, tmp_path), one_process
    assert grad_norms == pytest.approx(expected_norms, rel=1e-6)
    start, _ = toy.make_model(questions, seconds=2, seed=0)
    for name, initial in start.state_dict().items():
        torch.testing.assert_close(weights[name], expected[name], rtol=0, atol=1e-6, msg=name)  # a step moves 1e-3
        if not name.endswith("embed_positions.weight"):  # the audio tower's fixed sinusoids
            assert (weights[name] - initial).abs().max() > 1e-4, f"{name} was not trained"
