"""On a tiny model: the plain way and ours do equal work, counts are right, and so are reports."""

import pytest
import torch
from torch.testing import assert_close

from benchmarks import models, speed
from benchmarks.models import lone_rank, make_prompt, make_rank
from infra.processes import Clock
from training.optimizer import trainable

CPU = torch.device("cpu")
SIZES = dict(group_size=3, max_new_tokens=5)


# ---- equal work ----


def random_prompt(model, generator):
    """Make two prompts with random words and sounds. Clips are 1 s long; the tiny model hears up to 2 s."""
    prompt = make_prompt(model, 2, clip_seconds=1.0)
    ids, mel = prompt["input_ids"], prompt["input_features"]
    words = torch.randint(200, 300, ids.shape, generator=generator)
    heard = prompt["feature_attention_mask"][:, None]
    return prompt | {
        "input_ids": torch.where(ids == model.config.audio_token_id, ids, words),
        "input_features": torch.randn(mel.shape, generator=generator, dtype=mel.dtype) * heard,
    }


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")  # only newer versions have its new name
@pytest.mark.parametrize("checkpointing", [False, True])
def test_both_ways_learn_the_same(config, exact, checkpointing):
    """The losses and gradients are equal, in any order of the two ways."""
    generator = torch.Generator().manual_seed(0)
    with lone_rank(1):
        rank = make_rank(config, torch.float64, CPU, checkpointing=checkpointing)
        for weight in rank.reference.parameters():  # so that the KL penalty matters
            weight.add_(0.02 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype))
        prompt = random_prompt(rank.policy, generator)
        padded = speed.pad_clips(rank.policy, prompt)
        assert prompt["input_features"].shape[2] == 102 and padded["input_features"].shape[2] == 200
        completions = torch.randint(200, 300, (6, 5), generator=generator)
        advantages = torch.randn(6, generator=generator)
        outcomes = []
        for learn, inputs in 2 * [(models.learn, prompt), (speed.plain_learn, padded)]:
            rank.policy.zero_grad(set_to_none=False)
            loss = learn(rank, inputs, completions, advantages, parts=2, phase=Clock(CPU))
            gradients = {name: weight.grad.clone() for name, weight in trainable(rank.policy).items()}
            outcomes.append((loss, gradients))
            assert not rank.policy.training
    for loss, gradients in outcomes[1:]:
        assert loss == pytest.approx(outcomes[0][0], rel=1e-9)
        assert_close(gradients, outcomes[0][1], rtol=1e-7, atol=1e-12)
    assert all(gradient.abs().max() > 0 for name, gradient in outcomes[0][1].items() if "k_proj.bias" not in name)


def test_both_ways_sample_the_same(config):
    """The model is so sure of each token that chance plays no part."""
    with lone_rank(1):
        rank = make_rank(config, torch.float32, CPU, checkpointing=False)
    rank.policy.lm_head.weight.data *= 1e4
    rank.policy.lm_head.weight.data[config.audio_token_id] = 0
    prompt = random_prompt(rank.policy, torch.Generator().manual_seed(0))
    ours = models.sample(rank, prompt, **SIZES)
    plain = speed.plain_sample(rank, speed.pad_clips(rank.policy, prompt), **SIZES)
    assert ours.shape == (6, 5) and torch.equal(ours, plain)
    assert len({*map(tuple, ours.tolist())}) == 2 and len(ours.unique()) > 2


# ---- counts ----


@pytest.mark.parametrize("seconds, frames, encoder_frames, audio_tokens", [(1.0, 102, 50, 25), (2.0, 200, 100, 50)])
def test_flops_by_hand(config, seconds, frames, encoder_frames, audio_tokens):
    counted = speed.count_flops(config, seconds, prompts=2, **SIZES)
    audio, text = config.audio_config, config.text_config
    d, hidden, n = audio.d_model, text.hidden_size, encoder_frames
    conv1 = 2 * 3 * audio.num_mel_bins * d * frames
    layer = 2 * n * (4 * d * d + 2 * d * audio.encoder_ffn_dim) + 2 * 2 * n * n * d
    tower = conv1 + 2 * 3 * d * d * ((frames + 1) // 2) + audio.encoder_layers * layer + 2 * d * hidden * audio_tokens

    keys = hidden // text.num_attention_heads * text.num_key_value_heads
    weights = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * text.intermediate_size
    prompt, completion = 80 + audio_tokens, 4  # the last of 5 tokens predicts nothing
    linear = 2 * weights * (2 * prompt + 6 * completion)
    attention = 2 * 2 * hidden * (2 * prompt * prompt + 6 * completion * (prompt + completion))
    head = 2 * hidden * text.vocab_size * 6 * 5
    forward = 2 * tower + text.num_hidden_layers * (linear + attention) + head
    # In the backward pass, each product has two gradients; the input of the first convolution needs none.
    expected = {"sample": forward, "reference": forward, "train": 3 * forward - 2 * conv1}
    assert counted == pytest.approx(expected, rel=5e-5)  # transformers 5.17 computes rotary angles by a product


def test_decode_bytes_by_hand(config):
    text = config.text_config
    model = models.build_model(config, torch.bfloat16, CPU)
    weights, cache = speed.decode_bytes(model, prompts=2, prompt_tokens=105, completions=6, completion_tokens=30)
    hidden, keys = text.hidden_size, 2 * 32  # two key-value heads
    attention = 2 * hidden * hidden + 2 * hidden * keys + hidden + 2 * keys  # its output has no bias
    layer = attention + 3 * hidden * text.intermediate_size + 2 * hidden
    assert weights == 2 * (2 * layer + hidden + text.vocab_size * hidden)
    assert cache == 2 * 2 * 2 * keys * (2 * 105 + 6 * 30)  # bytes, keys and values, layers


def test_held_bytes(config):
    """Weights, gradients, reference and two moments, 4 bytes each; in bfloat16 3 x 2 bytes and 12 of the optimizer."""
    for dtype, nbytes in ((torch.float32, 20), (torch.bfloat16, 18)):
        with lone_rank(1):
            rank = make_rank(config, dtype, CPU, checkpointing=False)
        weights = sum(weight.numel() for weight in trainable(rank.policy).values())
        assert speed.held_bytes(rank) == pytest.approx(nbytes * weights, rel=0.02)


# ---- reports ----


def test_step_report():
    """The step's ratio is the median of the rounds' ratios."""

    def rounds(*totals):
        return [dict(zip(speed.PHASES, (0.5, 0.25, total - 1, 0.25))) for total in totals]

    found = {
        "rounds": {"plain": rounds(10, 30, 12), "ours": rounds(2, 3, 4)},  # 5, 10 and 3 times
        "beside_gb": {"plain": 6.0, "ours": 1.5},
        "flops": {"sample": 1e9, "reference": 1e9, "train": 4e9},
    }
    lines = speed.step_report(found, held_gb=1.0, rate=4e9).splitlines()
    assert lines[1].split() == "plain 0.500 0.250 11.000 0.250 12.000 6.000".split()
    assert lines[2].split() == "ours 0.500 0.250 2.000 0.250 3.000 1.500".split()
    assert lines[3].split() == "plain / ours 1.00 1.00 5.50 1.00 5.00 4.00".split()
    assert lines[4].split() == "floor 0.250 0.250 1.000 1.500".split()
    assert "ours takes 2.00 times as long" in lines[5]
    assert "7.00 GB for the plain step and 2.50 GB for ours" in lines[7]


def test_sample_report():
    found = {"lengths": [1, 10, 50], "rounds": [[0.5, 1.0, 5.0]], "weight_bytes": 3e7, "cache_bytes": 1e7}
    report = speed.sample_report(found, bandwidth=1e9, sequences=16)
    for expected in ("0.5000 s", "100.000 ms         160 tokens/s", "40.000 ms         40% of", "0.030 GB of weights"):
        assert expected in report
    assert "all 50   tokens of each                        5.0000 s          160 tokens/s" in report


def test_train_report():
    found = {"rounds": [{"reference": 1.0, "train": 4.0}], "flops": {"sample": 1, "reference": 5e11, "train": 1e12}}
    _, train, reference, _ = speed.train_report(found, rate=1e12).splitlines()
    assert train.split()[-4:] == "4.000 1.000 0.250 25.0%".split()
    assert reference.split()[-4:] == "1.000 0.500 0.500 50.0%".split()
