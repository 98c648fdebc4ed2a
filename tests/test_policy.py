"""policy.py against transformers' own forward and generate, which neither share prompts nor trim audio."""

import copy
import math
from collections import Counter

import pytest
import torch
import transformers
from plain_way import full_prompt, plain_logits
from torch.testing import assert_close

import policy
from data import Question, build_prompt
from evaluation.answering import answer_questions
from infra.errors import InputError
from policy import completion_logprobs, encode_prompts, sample_group

transformers.utils.logging.disable_progress_bar()
NO_STOP = [-1]  # no token ends a completion


@pytest.fixture(scope="module")
def peaked(tiny):
    """The tiny model in float32 with larger logits: some tokens are common, and temperature matters."""
    model, processor = copy.deepcopy(tiny[0]).float(), tiny[1]
    model.lm_head.weight.data *= 2.5
    return model, processor


def seeded(seed=0):
    """Return a generator in a known state."""
    return torch.Generator().manual_seed(seed)


def random_completions(model, lengths, audio_word=False):
    """Return random words, also outside the mask. With `audio_word`, the second word is <|AUDIO|>."""
    completions = torch.randint(model.config.audio_token_id, (len(lengths), max(lengths)), generator=seeded())
    if audio_word:
        completions[0, 1] = model.config.audio_token_id
    return completions, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


# ---- log-probs ----


CASES = {  # questions, completion lengths, temperature, whether a completion holds <|AUDIO|>
    "one group": ([1], [3, 1, 5, 2], 1.0, False),
    "different prompts and clips": ([0, 2, 1], [1, 4, 6, 2, 2, 2, 6, 1, 3], 1.0, False),
    "temperature 0.7 and a clip of full length": ([0, 3], [1, 4, 2, 3], 0.7, False),
    "T = 1": ([0, 2], [1, 1, 1, 1, 1, 1], 1.0, False),
    "an audio token in a completion": ([0, 2], [3, 1, 5, 2], 0.7, True),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("which, lengths, temperature, audio_word", CASES.values(), ids=CASES)
def test_logprobs_entropy_and_all_gradients(
    exact, monkeypatch, tiny, questions, which, lengths, temperature, audio_word, checkpointing
):
    """They equal those of the plain way. Every parameter has a gradient, as DistributedDataParallel needs."""
    monkeypatch.setattr(policy, "LOGITS_CHUNK", 4)
    model, processor = tiny
    batch = [questions[i] for i in which]
    completions, mask = random_completions(model, lengths, audio_word)
    prompt = encode_prompts(processor, batch, "answer")
    logprobs, entropy = completion_logprobs(model, prompt, completions, mask, temperature, checkpointing)

    plain = (plain_logits(model, full_prompt(processor, batch), completions, mask) / temperature).log_softmax(-1)
    plain_logprobs = plain.gather(-1, completions[:, :, None])[:, :, 0] * mask
    assert_close(logprobs, plain_logprobs, rtol=0, atol=1e-11)
    assert_close(entropy, -(plain.exp() * plain).sum(-1).detach() * mask, rtol=0, atol=1e-11)

    weights = torch.randn(mask.shape, dtype=torch.float64, generator=seeded(1))
    names, parameters = zip(*((name, p) for name, p in model.named_parameters() if p.requires_grad))
    assert {n for n, _ in model.named_parameters()} - {*names} == {"model.audio_tower.embed_positions.weight"}
    gradients = torch.autograd.grad((weights * logprobs).sum(), parameters)  # raises if one takes no part
    plain_gradients = torch.autograd.grad((weights * plain_logprobs).sum(), parameters)
    assert_close(dict(zip(names, gradients)), dict(zip(names, plain_gradients)), rtol=1e-9, atol=1e-11)
    assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_checkpointing_keeps_a_fraction_and_changes_no_bit(tiny, questions):
    """The gradients are equal to the last bit. The memory for the backward pass is a tenth or less."""
    model, processor = copy.deepcopy(tiny[0]).float(), tiny[1]
    completions, mask = random_completions(model, [20] * 8)
    prompt, kept, gradients = encode_prompts(processor, questions[3:], "answer"), [], []
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for checkpointing in (False, True):
        saved = {}

        def keep(tensor):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logprobs, _ = completion_logprobs(model, prompt, completions, mask, 1.0, checkpointing)
        kept.append(sum(storage.nbytes() for pointer, storage in saved.items() if pointer not in weights))
        parameters = [p for p in model.parameters() if p.requires_grad]
        gradients.append(torch.autograd.grad(logprobs.sum(), parameters))
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    assert kept[1] < kept[0] / 10


def test_logprobs_are_float32_and_follow_grad_mode(tiny, questions):
    """float32 for any dtype of the model, 0 outside the mask; the entropy never has a gradient."""
    completions, mask = random_completions(tiny[0], [2, 4])
    arguments = tiny[0], encode_prompts(tiny[1], questions[:1], "answer"), completions, mask, 1.0
    logprobs, entropy = completion_logprobs(*arguments)
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert (logprobs[mask] < 0).all() and (logprobs[~mask] == 0).all() and (entropy[~mask] == 0).all()
    with torch.no_grad():
        reference, _ = completion_logprobs(*arguments)
    assert logprobs.requires_grad and not reference.requires_grad and not entropy.requires_grad
    assert torch.equal(reference, logprobs)


# ---- the sampler ----


def test_greedy_tokens_are_those_of_generate(tiny, questions):
    """Also for padded prompts whose completions end at different lengths. Row b * G + g belongs to prompt b."""
    model, processor = copy.deepcopy(tiny[0]), tiny[1]
    prompt, pad = encode_prompts(processor, questions, "answer"), processor.tokenizer.pad_token_id
    free, _, _ = sample_group(model, prompt, 1, 12, 0.0, NO_STOP)
    stop_ids = [int(free[2, 3]), int(free[0, 0])]
    settings = dict(do_sample=False, max_new_tokens=12, eos_token_id=stop_ids, pad_token_id=pad)
    generated = model.generate(**full_prompt(processor, questions), **settings)[:, prompt["input_ids"].shape[1] :]

    tokens, mask, _ = sample_group(model, prompt, 3, 12, 0.0, stop_ids)
    assert torch.equal(torch.where(mask, tokens, pad), generated[torch.arange(12) // 3])
    assert len(generated.unique(dim=0)) == len(questions) and len(mask.sum(-1).unique()) >= 3

    texts = processor.tokenizer.batch_decode(generated, skip_special_tokens=True)
    model.generation_config.eos_token_id = stop_ids
    answers = answer_questions(model, processor, questions, "answer", 12, batch_size=4)
    assert [text for (text,) in answers] == texts


def fits(draws, probs):
    """Apply Pearson's chi-square test to draws [n] of outcomes with probs [k]. Rare outcomes (below 5) count as one."""
    expected, counts = probs * len(draws), torch.bincount(draws, minlength=len(probs)).double()
    common = expected >= 5
    expected, counts = (torch.cat([x[common], len(draws) - x[common].sum()[None]]) for x in (expected, counts))
    assert len(expected) > 10 and expected[-1] >= 5
    freedom = len(expected) - 1
    return ((counts - expected) ** 2 / expected).sum() < freedom + 5 * math.sqrt(2 * freedom)


@torch.no_grad()
def test_draws_have_the_probabilities_of_the_model(peaked, questions):
    """First tokens, and pairs of first and second tokens, fit their own prompt and temperature and no other."""
    model, processor = peaked
    two, size, common, temperatures = questions[:2], model.config.text_config.vocab_size, 40, (1.0, 0.7)
    firsts, pairs = {}, {}  # probabilities by (prompt, temperature); pairs only for the most common first tokens
    for b, question in enumerate(two):
        prompt = full_prompt(processor, [question])
        top = plain_logits(model, prompt, torch.tensor([[0]]), torch.tensor([[True]]))[0, 0].topk(common).indices
        logits = plain_logits(model, prompt, torch.stack([top, top], dim=1), torch.ones(common, 2, dtype=torch.bool))
        for t in temperatures:
            firsts[b, t] = (logits[0, 0] / t).softmax(-1)
            pairs[b, t] = torch.zeros(size, size)
            pairs[b, t][top] = firsts[b, t][top, None] * (logits[:, 1] / t).softmax(-1)

    prompt, generator = encode_prompts(processor, two, "answer"), seeded()
    for t in temperatures:
        drawn = [sample_group(model, prompt, 750, 2, t, NO_STOP, generator)[0] for _ in range(4)]
        drawn = torch.cat([rows.view(2, 750, 2) for rows in drawn], dim=1)  # [prompt, draw, token]
        for b in range(2):
            for own in firsts:
                assert fits(drawn[b, :, 0], firsts[own]) == (own == (b, t))
                assert fits(drawn[b, :, 0] * size + drawn[b, :, 1], pairs[own].flatten()) == (own == (b, t))


def test_a_stop_token_ends_a_completion(peaked, questions):
    """The mask includes the first stop token. Behind it, rows are filled with stop_ids[0]. Other rows continue."""
    prompt, generator = encode_prompts(peaked[1], questions[:2], "answer"), seeded()
    free, mask, _ = sample_group(peaked[0], prompt, 100, 8, 1.0, NO_STOP, generator)
    assert free.shape == (200, 8) and mask.all()

    stop_ids = torch.bincount(free.flatten()).topk(2).indices.tolist()
    tokens, mask, _ = sample_group(peaked[0], prompt, 100, 8, 1.0, stop_ids, generator)
    last = Counter()
    for row, valid in zip(tokens.tolist(), mask.tolist()):
        length = next((i + 1 for i, token in enumerate(row) if token in stop_ids), 8)
        assert valid == [True] * length + [False] * (8 - length)
        assert row[length:] == [stop_ids[0]] * (8 - length)
        last[row[length - 1]] += 1
    first, second = (last.pop(token) for token in stop_ids)
    assert min(first, second, last.total()) > 10  # both stop tokens and the limit


def test_sampling_stops_early_and_is_repeatable(peaked, questions):
    """No step is computed once every row has ended. The state of the generator decides the draws."""
    prompt, size = encode_prompts(peaked[1], questions[:1], "answer"), peaked[0].config.text_config.vocab_size
    tokens, mask, _ = sample_group(peaked[0], prompt, 8, 100, 1.0, list(range(0, size, 3)), seeded())
    assert tokens.shape == mask.shape == (8, mask.sum(-1).max()) and mask.shape[1] < 100
    tokens, mask, _ = sample_group(peaked[0], prompt, 8, 100, 1.0, list(range(size)), seeded())
    assert tokens.shape == (8, 1) and mask.all()

    one, two, other = (sample_group(peaked[0], prompt, 8, 6, 1.0, NO_STOP, seeded(s))[0] for s in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, other)


# ---- prompts ----


def test_batches_encoded_ahead_equal_those_encoded_at_once(tiny, questions):
    """They come in order, and none is missing. A bad clip raises when its batch is due, not before."""
    processor, shares = tiny[1], [questions[:2], questions[1:3], questions[3:]]
    for share, (batch, prompt) in zip(shares, policy.encode_ahead(processor, iter(shares), "answer"), strict=True):
        assert batch == share
        assert_close(prompt, encode_prompts(processor, share, "answer"), rtol=0, atol=0)
    missing = [Question("x", "no.wav", "What?", ["a", "b"], "a")]
    ahead = policy.encode_ahead(processor, iter([questions[:1], missing]), "answer")
    assert next(ahead)[0] == questions[:1]
    with pytest.raises(InputError, match="no.wav"):
        next(ahead)


@pytest.mark.parametrize("template", ["direct", "answer", "think"])
def test_prompt_is_the_chat_markup_around_audio_and_text(tiny, questions, template):
    """Qwen2-Audio's own markup with an <|AUDIO|> for each 40 ms, padded on the left."""
    tokenizer, prompt = tiny[1].tokenizer, encode_prompts(tiny[1], questions, template)
    lengths = prompt["attention_mask"].sum(-1)
    assert len(set(lengths.tolist())) > 1
    for row, (question, audio_tokens) in enumerate(zip(questions, (10, 25, 33, 50))):
        ids, padding = prompt["input_ids"][row].tolist(), prompt["input_ids"].shape[1] - int(lengths[row])
        assert prompt["attention_mask"][row].tolist() == [0] * padding + [1] * (len(ids) - padding)
        assert ids[:padding] == [tokenizer.pad_token_id] * padding
        assert tokenizer.decode(ids[padding:]) == (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
            f"Audio 1: <|audio_bos|>{'<|AUDIO|>' * audio_tokens}<|audio_eos|>\n"
            f"{build_prompt(question, template)}<|im_end|>\n<|im_start|>assistant\n"
        )


def test_silence_changes_only_the_sound(tiny, questions):
    """The prompt is the same, with the mel frames of zeros."""
    heard, silent = (encode_prompts(tiny[1], questions, "answer", silence) for silence in (False, True))
    sound, zeros = heard.pop("input_features"), silent.pop("input_features")
    assert_close(heard, silent, rtol=0, atol=0)
    assert sound.shape == zeros.shape and sound.std() > 0.1 and zeros.unique().numel() == 1


# ---- text ----


def test_stop_token_ids(tiny, monkeypatch):
    """The tokenizer's end of turn is first, then those of the checkpoint. None is listed twice."""
    eos = tiny[1].tokenizer.eos_token_id
    for configured, added in ((None, []), (eos, []), (7, [7]), ([9, eos, 7, 9], [9, 7])):
        monkeypatch.setattr(tiny[0].generation_config, "eos_token_id", configured)
        assert policy.stop_token_ids(*tiny) == [eos, *added]


def test_decode_text(tiny):
    """Texts have no special tokens and nothing outside the mask. Spaces stay as sampled."""
    tokenizer, texts = tiny[1].tokenizer, ["<answer>a bell , or rain .</answer>", "wind"]
    batch = tokenizer([text + "<|im_end|>" for text in texts], padding=True, padding_side="right", return_tensors="pt")
    mask = batch["attention_mask"].bool()
    completions = torch.where(mask, batch["input_ids"], tokenizer("rain")["input_ids"][0])
    assert policy.decode_text(tiny[1], completions, mask) == texts
