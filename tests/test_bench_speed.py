"""The benchmarks' both ways do equal work, and what they count is right, on a tiny model."""

from argparse import Namespace

import pytest
import torch
from torch.testing import assert_close

import bench_models
import bench_speed
from bench_models import lone_rank, make_prompt, make_rank
from runtime import Clock

CPU = torch.device("cpu")
ARGS = Namespace(cuda_graph="on", prompts_per_rank=2, group_size=3, max_new_tokens=5, accumulation_steps=2)


# ---- equal work ----


def random_prompt(model, generator):
    """Two prompts of different words and sounds; clips of 1 s, of up to 2 s that the tiny model can hear."""
    prompt = make_prompt(model, 2, clip_seconds=1.0)
    ids, mel = prompt["input_ids"], prompt["input_features"]
    words = torch.randint(200, 300, ids.shape, generator=generator)
    heard = prompt["feature_attention_mask"][:, None]
    return prompt | {
        "input_ids": torch.where(ids == model.config.audio_token_id, ids, words),
        "input_features": torch.randn(mel.shape, generator=generator, dtype=mel.dtype) * heard,
    }


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")  # by its new name only in newer versions
@pytest.mark.parametrize("checkpointing", [False, True])
def test_both_ways_learn_the_same(config, exact, checkpointing):
    """Equal losses and gradients, in any order of the two ways."""
    generator = torch.Generator().manual_seed(0)
    with lone_rank(1):
        rank = make_rank(config, torch.float64, CPU, checkpointing)
        for weight in rank.reference.parameters():  # so that the KL penalty matters
            weight.add_(0.02 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype))
        prompt = random_prompt(rank.policy, generator)
        padded = bench_speed.pad_clips(rank.policy, prompt)
        assert prompt["input_features"].shape[2] == 102 and padded["input_features"].shape[2] == 200
        completions = torch.randint(200, 300, (6, 5), generator=generator)
        advantages = torch.randn(6, generator=generator)
        outcomes = []
        for learn, inputs in 2 * [(bench_models.learn, prompt), (bench_speed.plain_learn, padded)]:
            rank.policy.zero_grad(set_to_none=False)
            loss = learn(rank, inputs, completions, advantages, ARGS, Clock(CPU))
            gradients = {name: weight.grad.clone() for name, weight in bench_models.trainable(rank.policy).items()}
            outcomes.append((loss, gradients))
            assert not rank.policy.training
    for loss, gradients in outcomes[1:]:
        assert loss == pytest.approx(outcomes[0][0], rel=1e-9)
        assert_close(gradients, outcomes[0][1], rtol=1e-7, atol=1e-12)
    assert all(gradient.abs().max() > 0 for name, gradient in outcomes[0][1].items() if "k_proj.bias" not in name)


def test_both_ways_sample_the_same(config):
    """From a model so sure of each token that chance plays no part."""
    with lone_rank(1):
        rank = make_rank(config, torch.float32, CPU, checkpointing=False)
    rank.policy.lm_head.weight.data *= 1e4
    rank.policy.lm_head.weight.data[config.audio_token_id] = 0
    prompt = random_prompt(rank.policy, torch.Generator().manual_seed(0))
    ours = bench_models.sample(rank, prompt, ARGS)
    plain = bench_speed.plain_sample(rank, bench_speed.pad_clips(rank.policy, prompt), ARGS)
    assert ours.shape == (6, 5) and torch.equal(ours, plain)
    assert len({*map(tuple, ours.tolist())}) == 2 and len(ours.unique()) > 2


# ---- counts ----


@pytest.mark.parametrize("seconds, frames, encoder_frames, audio_tokens", [(1.0, 102, 50, 25), (2.0, 200, 100, 50)])
def test_flops_by_hand(config, seconds, frames, encoder_frames, audio_tokens):
    counted = bench_speed.count_flops(config, seconds, ARGS)
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
    # Backward, each product has two gradients; the first convolution's input needs none.
    assert counted == {"sample": forward, "reference": forward, "train": 3 * forward - 2 * conv1}


def test_decode_bytes_by_hand(config):
    text = config.text_config
    model = bench_models.build_model(config, torch.bfloat16, CPU)
    args = Namespace(prompts_per_rank=2, group_size=3, max_new_tokens=50)
    weights, cache = bench_speed.decode_bytes(model, 105, args)
    hidden, keys = text.hidden_size, 2 * 32  # two key-value heads
    attention = 2 * hidden * hidden + 2 * hidden * keys + hidden + 2 * keys  # with biases but for its output
    layer = attention + 3 * hidden * text.intermediate_size + 2 * hidden
    assert weights == 2 * (2 * layer + hidden + text.vocab_size * hidden)
    assert cache == 2 * 2 * 2 * keys * (2 * 105 + 6 * 30)  # bytes, keys and values, layers; from 10 to 50 tokens


def test_held_bytes(config):
    """Weights, gradients and reference once each and two moments; in bfloat16 six bytes and twelve of the optimizer."""
    for dtype, nbytes in ((torch.float32, 20), (torch.bfloat16, 18)):
        with lone_rank(1):
            rank = make_rank(config, dtype, CPU, checkpointing=False)
        weights = sum(weight.numel() for weight in bench_models.trainable(rank.policy).values())
        assert bench_speed.held_bytes(rank) == pytest.approx(nbytes * weights, rel=0.02)


# ---- reports ----


def test_step_report():
    """The step's ratio is the median of the rounds' ratios."""

    def rounds(*totals):
        return [dict(zip(bench_speed.PHASES, (0.5, 0.25, total - 1, 0.25))) for total in totals]

    found = {
        "rounds": {"plain": rounds(10, 30, 12), "ours": rounds(2, 3, 4)},  # 5, 10 and 3 times
        "beside_gb": {"plain": 6.0, "ours": 1.5},
        "flops": {"sample": 1e9, "reference": 1e9, "train": 4e9},
    }
    lines = bench_speed.step_report(found, held_gb=1.0, rate=4e9).splitlines()
    assert lines[1].split() == "plain 0.500 0.250 11.000 0.250 12.000 6.000".split()
    assert lines[2].split() == "ours 0.500 0.250 2.000 0.250 3.000 1.500".split()
    assert lines[3].split() == "plain / ours 1.00 1.00 5.50 1.00 5.00 4.00".split()
    assert lines[4].split() == "floor 0.250 0.250 1.000 1.500".split()
    assert "2.00 times that" in lines[5] and "7.00 GB and ours 2.50 GB" in lines[7]
