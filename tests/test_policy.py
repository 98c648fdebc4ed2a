"""policy.py against transformers' own forward and generate, which know no shared prompts and no trimmed audio."""

import copy
import math
import re
import shutil
from collections import Counter

import numpy as np
import pytest
import soundfile
import torch
import transformers
from safetensors.torch import load, save
from torch.testing import assert_close
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

import policy
import preflight
import toy
from answering import answer_questions
from audio import SAMPLE_RATE, load_audio
from checkpoint import save_checkpoint
from data import Question, build_prompt
from errors import InputError
from policy import completion_logprobs, encode_prompts, load_policy, sample_group, slice_prompt

transformers.utils.logging.disable_progress_bar()
NO_STOP = [-1]  # no token ends a completion
CPU = torch.device("cpu")
PYTORCH = {"format": "pt"}  # what transformers wants a safetensors file to say of itself


@pytest.fixture(scope="module")
def peaked(tiny):
    """The tiny model in float32 with larger logits: some tokens are common, and temperature matters."""
    model, processor = copy.deepcopy(tiny[0]).float(), tiny[1]
    model.lm_head.weight.data *= 2.5
    return model, processor


def seeded(seed=0):
    """A generator in a known state."""
    return torch.Generator().manual_seed(seed)


# ---- the plain way ----


def full_prompt(processor, questions):
    """encode_prompts with the processor's own full-length mel frames, as transformers' own forward takes them."""
    settings = dict(sampling_rate=SAMPLE_RATE, return_attention_mask=True, return_tensors="pt")
    mel = processor.feature_extractor([load_audio(q.audio) for q in questions], **settings)
    prompt = encode_prompts(processor, questions, "answer")
    return prompt | {"input_features": mel["input_features"], "feature_attention_mask": mel["attention_mask"]}


def merged_embeds(model, prompt):
    """What transformers' own forward feeds its language model: words and audio tokens, [B, P, H]."""
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    model.model(**prompt)
    hook.remove()
    return seen[0]


def plain_logits(model, prompt, completions, mask):
    """The logits of completion tokens [N, T, vocabulary] by one forward over whole sequences, prompt and all."""
    owner = torch.arange(len(completions)) // (len(completions) // len(prompt["input_ids"]))
    inputs = {name: tensor[owner] for name, tensor in prompt.items()}
    attention_mask = torch.cat([inputs["attention_mask"], mask.long()], dim=1)
    if (completions == model.config.audio_token_id).any():  # the forward would take this word for a piece of audio
        words = model.get_input_embeddings()(completions)
        inputs = {"inputs_embeds": torch.cat([merged_embeds(model, inputs), words], dim=1)}
    else:
        inputs["input_ids"] = torch.cat([inputs["input_ids"], completions], dim=1)
    inputs |= {"attention_mask": attention_mask, "position_ids": (attention_mask.cumsum(-1) - 1).clamp(min=0)}
    return model(**inputs, use_cache=False).logits[:, -completions.shape[1] - 1 : -1]


def random_completions(model, lengths, audio_word=False):
    """Random words, also where the mask is False; with `audio_word`, <|AUDIO|> stands early in the first row."""
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
    """They are those of the plain way, and every parameter gets a gradient, as DistributedDataParallel needs."""
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
    """The gradients are equal to the last bit; what waits for the backward pass is a tenth or less."""
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
    """float32 whatever the model's dtype, 0 outside the mask, no gradient under no_grad and never to the entropy."""
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
    """For left-padded prompts that end at their own places or not at all; row b * G + g belongs to prompt b."""
    model, processor = copy.deepcopy(tiny[0]), tiny[1]
    prompt, pad = encode_prompts(processor, questions, "answer"), processor.tokenizer.pad_token_id
    free, _ = sample_group(model, prompt, 1, 12, 0.0, NO_STOP)
    stop_ids = [int(free[2, 3]), int(free[0, 0])]
    settings = dict(do_sample=False, max_new_tokens=12, eos_token_id=stop_ids, pad_token_id=pad)
    generated = model.generate(**full_prompt(processor, questions), **settings)[:, prompt["input_ids"].shape[1] :]

    tokens, mask = sample_group(model, prompt, 3, 12, 0.0, stop_ids)
    assert torch.equal(torch.where(mask, tokens, pad), generated[torch.arange(12) // 3])
    assert len(generated.unique(dim=0)) == len(questions) and len(mask.sum(-1).unique()) >= 3

    texts = processor.tokenizer.batch_decode(generated, skip_special_tokens=True)
    model.generation_config.eos_token_id = stop_ids
    answers = answer_questions(model, processor, questions, "answer", 12, batch_size=4)
    assert [text for (text,) in answers] == texts


def fits(draws, probs):
    """Pearson's chi-square: draws [n] of outcomes with probs [k]; all outcomes expected less than 5 times are one."""
    expected, counts = probs * len(draws), torch.bincount(draws, minlength=len(probs)).double()
    common = expected >= 5
    expected, counts = (torch.cat([x[common], len(draws) - x[common].sum()[None]]) for x in (expected, counts))
    assert len(expected) > 10 and expected[-1] >= 5
    freedom = len(expected) - 1
    return ((counts - expected) ** 2 / expected).sum() < freedom + 5 * math.sqrt(2 * freedom)


@torch.no_grad()
def test_draws_have_the_probabilities_of_the_model(peaked, questions):
    """First tokens and pairs of first and second token fit their own prompt and temperature, and no other."""
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
    """The mask counts the first stop token and nothing after it, where stop_ids[0] stands; other rows run on."""
    prompt, generator = encode_prompts(peaked[1], questions[:2], "answer"), seeded()
    free, mask = sample_group(peaked[0], prompt, 100, 8, 1.0, NO_STOP, generator)
    assert free.shape == (200, 8) and mask.all()

    stop_ids = torch.bincount(free.flatten()).topk(2).indices.tolist()
    tokens, mask = sample_group(peaked[0], prompt, 100, 8, 1.0, stop_ids, generator)
    last = Counter()
    for row, valid in zip(tokens.tolist(), mask.tolist()):
        length = next((i + 1 for i, token in enumerate(row) if token in stop_ids), 8)
        assert valid == [True] * length + [False] * (8 - length)
        assert row[length:] == [stop_ids[0]] * (8 - length)
        last[row[length - 1]] += 1
    first, second = (last.pop(token) for token in stop_ids)
    assert min(first, second, last.total()) > 10  # both stop tokens and the limit


def test_sampling_stops_early_and_is_repeatable(peaked, questions):
    """No step is computed once every row has ended; a generator's state decides the draws."""
    prompt, size = encode_prompts(peaked[1], questions[:1], "answer"), peaked[0].config.text_config.vocab_size
    tokens, mask = sample_group(peaked[0], prompt, 8, 100, 1.0, list(range(0, size, 3)), seeded())
    assert tokens.shape == mask.shape == (8, mask.sum(-1).max()) and mask.shape[1] < 100
    tokens, mask = sample_group(peaked[0], prompt, 8, 100, 1.0, list(range(size)), seeded())
    assert tokens.shape == (8, 1) and mask.all()

    one, two, other = (sample_group(peaked[0], prompt, 8, 6, 1.0, NO_STOP, seeded(s))[0] for s in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, other)


# ---- the trimmed audio tower ----

SECONDS = [0.05, 0.1, 0.333, 1, 1.01, 2.5, 7.77, 10, 29.98, 29.99, 30, 31]  # odd and even numbers of frames


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """(model, processor, questions): Qwen2-Audio's 30 s, and clips of SECONDS, of which the last is cut to 30 s."""
    folder, rng, made = tmp_path_factory.mktemp("long"), np.random.default_rng(0), []
    for seconds in SECONDS:
        path = str(folder / f"{seconds}.wav")
        soundfile.write(path, 0.1 * rng.normal(size=round(seconds * SAMPLE_RATE)), SAMPLE_RATE)
        made.append(Question(str(seconds), path, "What is it?", ["rain", "wind"], "rain"))
    model, processor = toy.make_model(made, seconds=30, seed=0)
    return model.double(), processor, made


@torch.no_grad()
@pytest.mark.parametrize("seconds", [[s] for s in SECONDS] + [[0.333, 0.05, 7.77, 1], [1.01, 30, 0.1, 29.99]], ids=str)
def test_trimmed_audio_has_the_audio_tokens_of_the_full_30_seconds(long, seconds):
    """The processor's frames up to the longest clip's plus 2 are enough, for clips alone and mixed in one batch."""
    model, processor, made = long
    batch = [made[SECONDS.index(s)] for s in seconds]
    prompt, full = encode_prompts(processor, batch, "answer"), full_prompt(processor, batch)
    frames = [min(math.ceil(round(s * SAMPLE_RATE) / 160), 3000) for s in seconds]
    trimmed = min(max(frames) + 2, 3000)
    assert full["input_features"].shape[-1] == 3000
    assert torch.equal(prompt["input_features"], full["input_features"][:, :, :trimmed])
    assert torch.equal(prompt["feature_attention_mask"], full["feature_attention_mask"][:, :trimmed])
    assert prompt["feature_attention_mask"].sum(-1).tolist() == frames

    features = policy.audio_features(model, prompt, policy.run_audio_tower(model, prompt))
    is_audio = prompt["input_ids"] == model.config.audio_token_id
    assert len(features) == is_audio.sum()
    assert_close(features, merged_embeds(model, full)[is_audio], rtol=0, atol=1e-11)


# ---- prompts ----


def test_batches_encoded_ahead_are_those_encoded_on_the_spot(tiny, questions):
    """In order, none left out; what cannot be read raises where it is due, not before."""
    processor, shares = tiny[1], [questions[:2], questions[1:3], questions[3:]]
    for share, (batch, prompt) in zip(shares, policy.encode_ahead(processor, iter(shares), "answer"), strict=True):
        assert batch == share
        assert_close(prompt, encode_prompts(processor, share, "answer"), rtol=0, atol=0)
    missing = [Question("x", "no.wav", "What?", ["a", "b"], "a")]
    ahead = policy.encode_ahead(processor, iter([questions[:1], missing]), "answer")
    assert next(ahead)[0] == questions[:1]
    with pytest.raises(InputError, match="no.wav"):
        next(ahead)


def test_a_slice_of_a_batch_is_the_batch_of_those_questions(tiny, questions):
    """No padding is left in it that only the others needed."""
    batch = encode_prompts(tiny[1], questions, "answer")
    for start, stop in ((0, 1), (1, 3), (0, 4)):
        expected = encode_prompts(tiny[1], questions[start:stop], "answer")
        found = slice_prompt(batch, start, stop)
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert slice_prompt(batch, 0, 1)["input_ids"].shape[1] < batch["input_ids"].shape[1]


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


def test_silence_changes_only_what_is_heard(tiny, questions):
    """The same prompt with the mel frames of zeros."""
    heard, silent = (encode_prompts(tiny[1], questions, "answer", silence) for silence in (False, True))
    sound, zeros = heard.pop("input_features"), silent.pop("input_features")
    assert_close(heard, silent, rtol=0, atol=0)
    assert sound.shape == zeros.shape and sound.std() > 0.1 and zeros.unique().numel() == 1


# ---- loading ----


@pytest.fixture(scope="module")
def saved(tiny, questions, tmp_path_factory):
    """The folder of a checkpoint of the tiny model, with a tokenizer that pads on the right."""
    folder, (_, processor) = tmp_path_factory.mktemp("saved") / "step_000001", toy.make_model(questions, 2, seed=0)
    processor.tokenizer.padding_side = "right"
    save_checkpoint(folder, tiny[0], processor)
    return folder


def test_a_checkpoint_loads_back_equal(tiny, saved):
    """With load_policy, in eval mode and padding on the left, and plainly with transformers."""
    model, processor = load_policy(str(saved), torch.float64, CPU)
    assert not model.training and processor.tokenizer.padding_side == "left"
    for loaded in (model, Qwen2AudioForConditionalGeneration.from_pretrained(saved, dtype=torch.float64)):
        assert_close(loaded.state_dict(), tiny[0].state_dict(), rtol=0, atol=0)
    for loaded in (processor, AutoProcessor.from_pretrained(saved)):
        text = "<|im_start|>user\n<|AUDIO|> rain<|im_end|>"
        assert loaded.tokenizer(text)["input_ids"] == tiny[1].tokenizer(text)["input_ids"]
        assert loaded.chat_template == tiny[1].chat_template
    assert load_policy(str(saved), torch.bfloat16, CPU)[0].dtype == torch.bfloat16


def changed(name, change):
    """A function that changes the bytes of a folder's file."""
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


BAD_CONFIGS = {
    "no folder": shutil.rmtree,
    "no config": lambda folder: (folder / "config.json").unlink(),
    "another model": changed("config.json", lambda old: b'{"model_type": "qwen2"}'),
    "unknown model": changed("config.json", lambda old: b'{"model_type": "none_of_these"}'),
    "not a model": changed("config.json", lambda old: b"{}"),
    "corrupt config": changed("config.json", lambda old: old[:100]),
}
BAD_FILES = {
    "no processor": lambda folder: (folder / "processor_config.json").unlink(),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "truncated weights": changed("model.safetensors", lambda old: old[:100_000]),
    "empty weights": changed("model.safetensors", lambda old: b""),
    "half the weights": changed("model.safetensors", lambda old: save(dict([*load(old).items()][::2]), PYTORCH)),
    "cut tensors": changed("model.safetensors", lambda old: save({n: w[:1] for n, w in load(old).items()}, PYTORCH)),
}


@pytest.mark.parametrize("damage", BAD_CONFIGS | BAD_FILES)
def test_what_cannot_be_loaded_is_an_input_error(saved, tmp_path, damage):
    """In one line that names the folder; check_model needs no weights to tell what is wrong with a config."""
    folder = str(shutil.copytree(saved, tmp_path / "model"))
    preflight.check_model(folder)
    (BAD_CONFIGS | BAD_FILES)[damage](tmp_path / "model")
    one_line = rf"\A{re.escape(folder)}: .{{1,400}}\Z"
    if damage in BAD_CONFIGS:
        with pytest.raises(InputError, match=one_line):
            preflight.check_model(folder)
    with pytest.raises(InputError, match=one_line):
        load_policy(folder, torch.float32, CPU)


# ---- text ----


def test_stop_token_ids(tiny, monkeypatch):
    """The tokenizer's end of turn stands first, then the checkpoint's others; none twice."""
    eos = tiny[1].tokenizer.eos_token_id
    for configured, added in ((None, []), (eos, []), (7, [7]), ([9, eos, 7, 9], [9, 7])):
        monkeypatch.setattr(tiny[0].generation_config, "eos_token_id", configured)
        assert policy.stop_token_ids(*tiny) == [eos, *added]


def test_decode_text(tiny):
    """Neither special tokens nor what the mask excludes; spaces stay as they were sampled."""
    tokenizer, texts = tiny[1].tokenizer, ["<answer>a bell , or rain .</answer>", "wind"]
    batch = tokenizer([text + "<|im_end|>" for text in texts], padding=True, padding_side="right", return_tensors="pt")
    mask = batch["attention_mask"].bool()
    completions = torch.where(mask, batch["input_ids"], tokenizer("rain")["input_ids"][0])
    assert policy.decode_text(tiny[1], completions, mask) == texts
