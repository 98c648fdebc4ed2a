"""The decoder against transformers' forward, kept for many rollouts, with its steps recorded and replayed."""

import copy
import gc
import weakref

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from model import decoding
from model.decoding import GroupDecoder
from policy import completion_logprobs, encode_prompts, prefill, sample_group, slice_prompt

NO_STOP = [-1]


@pytest.fixture(autouse=True)
def few_slots(monkeypatch):
    """Use so few slots that a dozen tokens fill several multiples."""
    monkeypatch.setattr(decoding, "PROMPT_SLOTS", 8)
    monkeypatch.setattr(decoding, "COMPLETION_SLOTS", 4)


@pytest.fixture
def recordings(monkeypatch):
    """Make the CPU record steps as a GPU does, with all numbers fixed. Returns the list of recordings."""
    made = []

    def record(forward, pool):
        forward()
        made.append(make_fx(forward)())
        return made[-1]

    monkeypatch.setattr(decoding, "record", record)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    return made


def test_hidden_states_are_those_of_the_plain_forward(tiny, questions):
    """For every token of two completions each of four prompts of different lengths."""
    model, processor = tiny
    prompt = encode_prompts(processor, questions, "answer")
    tokens = torch.randint(4, 60, (8, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden, cache = prefill(model, prompt)
        decoder = GroupDecoder(model, group_size=2, max_new_tokens=11)
        decoder.start(cache, prompt["attention_mask"])
        found = torch.stack([decoder.step(column) for column in tokens.T], dim=1)
        for row, completion in enumerate(tokens):
            # One question at a time, without padding: nothing in common with the batch above.
            plain = encode_prompts(processor, questions[row // 2 : row // 2 + 1], "answer")
            full = processor.feature_extractor.nb_max_frames - plain["input_features"].shape[2]
            plain["input_features"] = torch.nn.functional.pad(plain["input_features"], (0, full), value=-1.0)
            plain["feature_attention_mask"] = torch.nn.functional.pad(plain["feature_attention_mask"], (0, full))
            plain["input_ids"] = torch.cat([plain["input_ids"], completion[None]], dim=1)
            plain["attention_mask"] = torch.ones_like(plain["input_ids"])
            expected = model.model(**plain).last_hidden_state[0, -11:]
            assert_close(found[row], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prompt_slots", [8, 128])
def test_a_kept_decoder_samples_what_a_new_one_does(tiny, questions, monkeypatch, prompt_slots):
    """For longer and shorter prompts than before, the same and other slots, more and fewer prompts."""
    monkeypatch.setattr(decoding, "PROMPT_SLOTS", prompt_slots)
    model, processor = tiny
    kept = GroupDecoder(model, group_size=3, max_new_tokens=10)
    prompt = encode_prompts(processor, questions, "answer")
    for start, stop in ((0, 2), (2, 4), (0, 2), (3, 4), (0, 1), (0, 4)):
        inputs = model, slice_prompt(prompt, start, stop), 3, 10, 1.0, NO_STOP
        drawn = [sample_group(*inputs, torch.Generator().manual_seed(stop), decoder)[0] for decoder in (kept, None)]
        assert torch.equal(*drawn)


def test_replayed_steps_sample_what_fresh_ones_do(tiny, questions, recordings):
    """Each number of slots is recorded once, and is right for other tokens, prompts and rollouts."""
    model, processor = tiny
    prompt = encode_prompts(processor, questions[:2], "answer")
    decoder, counts = GroupDecoder(model, group_size=3, max_new_tokens=10), []
    decoder.cuda_graph = True  # as on a GPU
    for start, stop, seed in ((0, 2, 0), (0, 2, 1), (1, 2, 2), (1, 2, 3), (0, 1, 4)):
        inputs = model, slice_prompt(prompt, start, stop), 3, 10, 1.0, NO_STOP
        replayed, fresh = (
            sample_group(*inputs, torch.Generator().manual_seed(seed), kept)[0] for kept in (decoder, None)
        )
        assert torch.equal(replayed, fresh)
        counts.append(len(recordings))
    # 9 tokens are decoded, in 4, 8 and 10 slots. One prompt uses the memory and recordings of two. The last prompt is
    # shorter and takes fewer slots.
    assert counts == [3, 3, 3, 3, 6]


def test_memory_for_the_longest_prompt_from_the_start(tiny, questions, recordings):
    """With the sizes known, longer prompts and more of them need no new memory, so no recording is lost."""
    model, processor = tiny
    prompt = encode_prompts(processor, questions, "answer")
    decoder = GroupDecoder(model, 2, 10, prompts=4, prompt_tokens=prompt["input_ids"].shape[1])
    decoder.cuda_graph = True  # as on a GPU
    allocated, recorded = set(), []
    for start, stop in ((0, 1), (0, 4), (3, 4), (0, 1), (0, 4)):
        inputs = model, slice_prompt(prompt, start, stop), 2, 10, 1.0, NO_STOP
        kept, fresh = (sample_group(*inputs, torch.Generator().manual_seed(0), d)[0] for d in (decoder, None))
        assert torch.equal(kept, fresh)
        allocated.add(decoder.prompt_cache[0][0].data_ptr())
        recorded.append(len(recordings))
    assert len(allocated) == 1 and recorded[2:] == recorded[2:3] * 3


@pytest.mark.parametrize("batches", [((2, 4), (0, 1)), ((0, 4), (0, 4))])
def test_an_overflow_stays_in_its_rollout(tiny, questions, batches):
    """An earlier rollout's values in slots that are masked now do not matter, not even inf and NaN."""
    model, prompt = tiny[0], encode_prompts(tiny[1], questions, "answer")
    before, now = (slice_prompt(prompt, *batch) for batch in batches)
    decoder = GroupDecoder(model, group_size=2, max_new_tokens=8)
    sample_group(model, slice_prompt(before, 0, len(now["input_ids"])), 2, 8, 0.0, NO_STOP, None, decoder)
    for keys, values in decoder.prompt_cache + decoder.completion_cache:
        keys.fill_(torch.inf)
        values.fill_(torch.nan)
    tokens, _, _ = sample_group(model, now, 2, 8, 0.0, NO_STOP, None, decoder)
    assert torch.equal(tokens, sample_group(model, now, 2, 8, 0.0, NO_STOP)[0])


def test_memory_is_free_once_a_decoder_is_gone(tiny, questions):
    """At once, not at the next garbage collection: it is gigabytes of a GPU."""
    prompt = encode_prompts(tiny[1], questions[:1], "answer")
    decoder = GroupDecoder(tiny[0], group_size=2, max_new_tokens=8)
    gc.disable()
    try:
        sample_group(tiny[0], prompt, 2, 8, 0.0, NO_STOP, None, decoder)
        keys = weakref.ref(decoder.completion_cache[0][0])
        del decoder
        assert keys() is None
    finally:
        gc.enable()


def test_recorded_steps_use_updated_weights(tiny, questions, recordings):
    """A recorded step sees updates in place, as the optimizer makes them."""
    model, processor = tiny
    prompt = encode_prompts(processor, questions[:1], "answer")
    decoder = GroupDecoder(model, group_size=2, max_new_tokens=8)
    decoder.cuda_graph = True  # as on a GPU
    inputs = model, prompt, 2, 8, 0.0, NO_STOP, None
    before, _, _ = sample_group(*inputs, decoder)
    weight = model.model.language_model.layers[0].mlp.down_proj.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(-3)
    after, fresh = sample_group(*inputs, decoder)[0], sample_group(*inputs)[0]
    with torch.no_grad():
        weight.copy_(kept)
    assert torch.equal(after, fresh) and not torch.equal(before, after)


def test_in_bfloat16_the_sampler_is_the_policy_that_learns(tiny, questions, monkeypatch):
    """Scores in float32 shrink the gap between the sampler's log-probs and those of the training pass."""
    model = copy.deepcopy(tiny[0])
    for layer in model.model.language_model.layers:  # sharp attention: scores of several dozens
        layer.self_attn.q_proj.weight.data *= 10
    model, prompt = model.bfloat16(), encode_prompts(tiny[1], questions, "answer")
    generator, gaps = torch.Generator(), []
    for multiply in (decoding.product, torch.matmul):  # matmul rounds its result to bfloat16
        monkeypatch.setattr(decoding, "product", multiply)
        drawn = sample_group(model, prompt, 16, 12, 1.0, NO_STOP, generator.manual_seed(0))
        with torch.no_grad():
            logprobs, _ = completion_logprobs(model, prompt, *drawn[:2], 1.0)
        gaps.append((drawn[2] - logprobs).abs().mean())
    assert gaps[0] < 0.75 * gaps[1]
