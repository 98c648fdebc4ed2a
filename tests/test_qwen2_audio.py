"""The audio tower, the embedded prompt and slices of a batch, against transformers' own forward."""

import math

import numpy as np
import pytest
import soundfile
import torch
from plain_way import full_prompt, merged_embeds
from torch.testing import assert_close

from data import Question
from infra.audio import SAMPLE_RATE
from model.qwen2_audio import audio_tokens, embed_prompt, encoder_frames, slice_prompt
from policy import encode_prompts
from training import toy_model

# ---- the trimmed audio tower ----

SECONDS = [0.05, 0.1, 0.333, 1, 1.01, 2.5, 7.77, 10, 29.98, 29.99, 30, 31]  # odd and even numbers of frames


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """(model, processor, questions): a model for 30 s, and clips of SECONDS, of which the last is cut to 30 s."""
    folder, rng, made = tmp_path_factory.mktemp("long"), np.random.default_rng(0), []
    for seconds in SECONDS:
        path = str(folder / f"{seconds}.wav")
        soundfile.write(path, 0.1 * rng.normal(size=round(seconds * SAMPLE_RATE)), SAMPLE_RATE)
        made.append(Question(str(seconds), path, "What is it?", ["rain", "wind"], "rain"))
    model, processor = toy_model.make_model(made, seconds=30, seed=0)
    return model.double(), processor, made


@torch.no_grad()
@pytest.mark.parametrize("seconds", [[s] for s in SECONDS] + [[0.333, 0.05, 7.77, 1], [1.01, 30, 0.1, 29.99]], ids=str)
def test_trimmed_audio_has_the_audio_tokens_of_the_full_30_seconds(long, seconds):
    """The frames of the longest clip plus 2 are enough, for one clip and for several in a batch."""
    model, processor, made = long
    batch = [made[SECONDS.index(s)] for s in seconds]
    prompt, full = encode_prompts(processor, batch, "answer"), full_prompt(processor, batch)
    frames = [min(math.ceil(round(s * SAMPLE_RATE) / 160), 3000) for s in seconds]
    trimmed = min(max(frames) + 2, 3000)
    assert full["input_features"].shape[-1] == 3000
    assert torch.equal(prompt["input_features"], full["input_features"][:, :, :trimmed])
    assert torch.equal(prompt["feature_attention_mask"], full["feature_attention_mask"][:, :trimmed])
    assert prompt["feature_attention_mask"].sum(-1).tolist() == frames

    is_audio = prompt["input_ids"] == model.config.audio_token_id
    assert audio_tokens(prompt["feature_attention_mask"].sum(-1)).tolist() == is_audio.sum(-1).tolist()
    assert_close(embed_prompt(model, prompt)[is_audio], merged_embeds(model, full)[is_audio], rtol=0, atol=1e-11)


def test_lengths_are_those_of_transformers(tiny):
    frames = torch.arange(3, 3001)
    ours = encoder_frames(frames), audio_tokens(frames)
    for own, theirs in zip(ours, tiny[0].model.audio_tower._get_feat_extract_output_lengths(frames)):
        assert torch.equal(own, theirs)


# ---- slices ----


def test_a_slice_of_a_batch_is_the_batch_of_those_questions(tiny, questions):
    """It has no padding that only the other questions needed."""
    batch = encode_prompts(tiny[1], questions, "answer")
    for start, stop in ((0, 1), (1, 3), (0, 4)):
        expected = encode_prompts(tiny[1], questions[start:stop], "answer")
        found = slice_prompt(batch, start, stop)
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert slice_prompt(batch, 0, 1)["input_ids"].shape[1] < batch["input_ids"].shape[1]
