"""A frozen audio tower that runs once a step gives the same results as a tower that runs in every pass."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.testing import assert_close

from model.qwen2_audio import freeze_audio_tower
from policy import completion_logprobs, data_parallel, encode_prompts, listen, sample_group, slice_prompt
from training.optimizer import ShardedAdamW, clip_scale, trainable

TOWER, GROUP_SIZE = "model.audio_tower.", 2


@pytest.fixture
def frozen(tiny):
    """(model, processor) in float64, with a frozen audio tower."""
    model = copy.deepcopy(tiny[0])
    freeze_audio_tower(model)
    return model, tiny[1]


@pytest.fixture
def runs(frozen):
    """A list that grows by one each time the audio tower of the frozen model, or of its copy, runs."""
    seen = []
    frozen[0].model.audio_tower.conv1.register_forward_hook(lambda *_: seen.append(1))
    return seen


def completions_of(prompt, seed=0):
    """Return GROUP_SIZE completions of random words for each prompt, of 1 to 5 tokens."""
    g, rows = torch.Generator().manual_seed(seed), GROUP_SIZE * len(prompt["input_ids"])
    lengths = torch.randint(1, 6, (rows, 1), generator=g)
    lengths[0] = 5
    return torch.randint(4, 60, (rows, 5), generator=g), torch.arange(5) < lengths


def learn(model, prompt, checkpointing=False, parts=2):
    """Return log-probs of random completions and the gradients of the sum of their squares, computed in parts."""
    model.zero_grad(set_to_none=True)
    (completions, mask), size, found = completions_of(prompt), len(prompt["input_ids"]) // parts, []
    for start in range(0, parts * size, size):
        rows = slice(GROUP_SIZE * start, GROUP_SIZE * (start + size))
        part = slice_prompt(prompt, start, start + size)
        logprobs, _ = completion_logprobs(model, part, completions[rows], mask[rows], 0.9, checkpointing)
        logprobs.square().sum().backward()
        found.append(logprobs.detach())
    return torch.cat(found), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_only_the_tower_is_frozen(tiny, frozen):
    """`listen` refuses an unfrozen tower, whose gradient would get lost."""
    trained = {name for name, p in tiny[0].named_parameters() if p.requires_grad}
    assert {name for name, p in frozen[0].named_parameters() if p.requires_grad} == {
        name for name in trained if not name.startswith(TOWER)
    }
    assert any(name.startswith("model.multi_modal_projector.") for name in trained)
    with pytest.raises(AssertionError, match="not frozen"):
        listen(tiny[0], {})


def test_the_tower_runs_once_a_step(frozen, questions, runs):
    """Sampling, the reference pass and two training passes share one run. Without `listen`, each runs the tower."""
    model, processor = frozen
    reference, plain = copy.deepcopy(model), encode_prompts(processor, questions, "answer")

    def step(prompt):
        sample_group(model, prompt, GROUP_SIZE, 3, 1.0, [-1])
        with torch.no_grad():
            completion_logprobs(reference, prompt, *completions_of(prompt), 1.0)
        learn(model, prompt, parts=2)

    step(plain)
    assert len(runs) == 4
    runs.clear()
    step(listen(model, plain))
    assert len(runs) == 1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_listening_changes_neither_samples_nor_gradients(exact, tiny, frozen, questions, checkpointing):
    """Nor log-probs. Except the tower's own, the gradients also equal those of a model whose tower is trained."""
    model, processor = frozen
    plain = encode_prompts(processor, questions, "answer")
    heard = listen(model, plain)
    assert heard["heard"].shape[:2] == (4, 50) and not heard["heard"].requires_grad
    drawn = [
        sample_group(model, prompt, GROUP_SIZE, 8, 1.0, [-1], torch.Generator().manual_seed(0))[0]
        for prompt in (plain, heard)
    ]
    assert torch.equal(*drawn)

    everything_learns = copy.deepcopy(tiny[0])
    logprobs, gradients = learn(model, heard, checkpointing)
    for other in (model, everything_learns):
        expected_logprobs, expected = learn(other, plain, checkpointing)
        assert_close(logprobs, expected_logprobs, rtol=0, atol=1e-12)
        expected = {name: gradient for name, gradient in expected.items() if not name.startswith(TOWER)}
        assert_close(gradients, expected, rtol=1e-10, atol=1e-12)
    assert gradients["model.multi_modal_projector.linear.weight"].abs().max() > 0


def test_a_slice_equals_the_tower_output_of_its_clips_alone(frozen):
    """Clips of 3 to 200 frames. Divided by the four frames of an audio token, they have every remainder."""
    model, generator = frozen[0], torch.Generator().manual_seed(0)
    frames = torch.tensor([3, 38, 37, 131, 4, 198, 39, 40, 200])
    within = (torch.arange(200) < frames[:, None]).long()
    batch = {
        "input_ids": torch.zeros(9, 4, dtype=torch.long),
        "attention_mask": torch.ones(9, 4, dtype=torch.long),
        "input_features": torch.randn(9, 40, 200, generator=generator, dtype=torch.float64),
        "feature_attention_mask": within,
    }
    heard = listen(model, batch)
    for start, stop in [(i, i + 1) for i in range(9)] + [(0, 3), (2, 5), (5, 9)]:
        found, part = slice_prompt(heard, start, stop), slice_prompt(batch, start, stop)
        expected = listen(model, part)
        assert found.keys() == expected.keys() and all(torch.equal(found[name], part[name]) for name in part)
        assert found["heard"].shape[1] == (frames[start:stop].max() + 1) // 4
        for i, own in enumerate(frames[start:stop].tolist()):
            tokens = (own + 1) // 4
            assert_close(found["heard"][i, :tokens], expected["heard"][i, :tokens], rtol=0, atol=1e-11)


def test_distributed_training_skips_the_frozen_tower(frozen, questions):
    """Ranks exchange no gradients of the tower, and the optimizer does not update it. All other weights are updated."""
    model, processor = frozen
    heard = listen(model, encode_prompts(processor, questions, "answer"))
    expected, before = learn(copy.deepcopy(model), heard, parts=1)[1], copy.deepcopy(model.state_dict())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        ddp_policy = data_parallel(model, encode_prompts(processor, questions[:1], "answer"), checkpointing=False)
        optimizer = ShardedAdamW(trainable(model))
        ddp_policy(heard, *completions_of(heard), 0.9)[0].square().sum().backward()
        assert_close({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, expected)
        optimizer.step(1e-3, clip_scale(optimizer.grad_norm(), 1.0))
    finally:
        dist.destroy_process_group()
    moved = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
