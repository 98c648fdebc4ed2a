"""Qwen2-Audio as GRPO needs it: load it, compute a prompt once per group, sample the group, score completions.

Shapes: B prompts, G completions each, N = B * G, P prompt tokens, T completion tokens, F mel frames, H hidden size.
Prompts are padded on the left and completions on the right, so the two meet without a gap. The completions of a
prompt are consecutive rows: row b * G + g is completion g of prompt b.

Everything here rests on one idea. A prompt is mostly audio and hundreds of tokens long, a completion a dozen, and
the G completions of a group share their prompt. So the prompt goes through the model once, and only the completions
run on its keys and values: in sampling, in the reference pass and, because sharing them is differentiable, in the
training pass.
"""

import copy
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration
from transformers.masking_utils import create_bidirectional_mask
from transformers.utils import logging

from audio import SAMPLE_RATE, load_audio
from data import Question, build_prompt
from decoding import GroupDecoder
from errors import InputError
from lora import adapter_base, dropout_is_on, is_adapter, merge_adapter
from preflight import check_model, loading_errors

Prompt = dict[str, Tensor]  # what encode_prompts returns, and what listen adds to it
PROMPT = ("input_ids", "attention_mask", "input_features", "feature_attention_mask")
LOGITS_CHUNK = 512  # tokens whose logits are held at once: 156,032 words in float32 are 0.3 GB
ASK_EVERY = 4  # tokens from one look at whether all completions have ended, for which a GPU has to stop, to the next
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_policy(name_or_path: str, dtype: torch.dtype, device: torch.device):
    """Load a Qwen2-Audio model and its processor by Hugging Face name or folder. Raises InputError.

    The folder of a LoRA adapter gives its base, loaded in `dtype`, with the adapter merged into it. The model is in
    eval mode, and stays there in training: the same tokens must have the same log-probs each time.
    """
    check_model(name_or_path)
    if is_adapter(name_or_path):
        model, _ = load_policy(adapter_base(name_or_path), dtype, torch.device("cpu"))  # merged alike everywhere
        with loading_errors(name_or_path, "a LoRA adapter"):
            processor = AutoProcessor.from_pretrained(name_or_path, trust_remote_code=False)
            merge_adapter(model, name_or_path)
    else:
        with loading_errors(name_or_path):
            processor = AutoProcessor.from_pretrained(name_or_path, trust_remote_code=False)
            with _no_warnings():  # what does not fit, transformers says in a table, and load_policy in a line
                both: Any = Qwen2AudioForConditionalGeneration.from_pretrained(
                    name_or_path, dtype=dtype, output_loading_info=True, use_safetensors=True
                )
            model, loaded = both
            if loaded["missing_keys"]:  # transformers would go on with random weights in their place
                raise ValueError(f"weights are missing: {', '.join(sorted(loaded['missing_keys'])[:3])}, ...")
    processor.tokenizer.padding_side = "left"
    model.model.audio_tower.embed_positions.requires_grad_(False)  # fixed by design; loading forgets it
    return model.to(device).eval(), processor


@contextmanager
def _no_warnings():
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that --dtype names; auto is bfloat16 on a GPU and float32 elsewhere."""
    return DTYPES[("bfloat16" if device.type == "cuda" else "float32") if name == "auto" else name]


# ---- prompts ----


class BadClip(InputError):
    """The clip of a question cannot be used."""

    def __init__(self, question: Question, fault: str):
        super().__init__(f"{question.place}: {fault}" if question.place else fault)
        self.question, self.fault = question, fault


def encode_prompts(processor, questions: list[Question], template: str, silence: bool = False) -> Prompt:
    """Questions with their clips as left-padded model inputs on the CPU.

    Returns input_ids and attention_mask [B, P], input_features [B, mels, F] and feature_attention_mask [B, F], where F
    is the longest clip's frames plus two (see run_audio_tower) instead of the 30 s that the processor pads to.
    With `silence`, each clip is replaced by zeros of its own length. Raises BadClip.
    """
    texts, clips = [], []
    for question in questions:
        text = {"type": "text", "text": build_prompt(question, template)}
        messages = [{"role": "user", "content": [{"type": "audio", "audio_url": question.audio}, text]}]
        texts.append(processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        try:
            clip = load_audio(question.audio)
        except InputError as error:
            raise BadClip(question, str(error)) from None
        clips.append(np.zeros_like(clip) if silence else clip)
    prompt = processor(text=texts, audio=clips, sampling_rate=SAMPLE_RATE, return_tensors="pt", padding=True)
    return slice_prompt(prompt, 0, len(questions))


def encode_ahead(
    processor, batches: Iterator[list[Question]], template: str, silence: bool = False, replace=None
) -> Iterator[tuple[list[Question], Prompt]]:
    """Each batch with its encode_prompts, which a thread computes while the caller is busy with the batch before.

    Where a clip turns out bad, `replace`, if given, has to give the batch with another question in its place, from the
    batch and the BadClip, until all are good.
    """
    processor = copy.deepcopy(processor)  # of the thread's own: a tokenizer serves one at a time

    def encode(batch):
        while True:
            try:
                return batch, encode_prompts(processor, batch, template, silence)
            except BadClip as error:
                if replace is None:
                    raise
                batch = replace(batch, error)

    with ThreadPoolExecutor(max_workers=1) as thread:
        pending = deque()
        for batch in batches:
            pending.append(thread.submit(encode, batch))
            if len(pending) == 2:
                yield pending.popleft().result()
        if pending:
            yield pending.pop().result()


def slice_prompt(prompt: Prompt, start: int, stop: int) -> Prompt:
    """Prompts start to stop of a batch, without padding that only longer ones beside them needed."""
    ids, mask, mel, mel_mask = (prompt[name][start:stop] for name in PROMPT)
    tokens, frames = int(mask.sum(-1).max()), int(mel_mask.sum(-1).max())
    mel, mel_mask = mel[:, :, : frames + 2], mel_mask[:, : frames + 2]
    part = dict(zip(PROMPT, (ids[:, -tokens:], mask[:, -tokens:], mel, mel_mask)))
    if "heard" in prompt:
        part["heard"] = prompt["heard"][start:stop, : (frames + 1) // 4]  # two strides of 2: four frames a token
    return part


def freeze_audio_tower(model) -> None:
    """Let the audio tower stay as it is. The projector behind it, which meets the language model, still learns."""
    model.model.audio_tower.requires_grad_(False)


@torch.no_grad()
def listen(model, prompt: Prompt) -> Prompt:
    """The prompts with what a frozen audio tower makes of them: `heard`, [B, audio tokens, audio hidden].

    All that takes such a prompt does not run the tower again: sampling, the reference pass, whose tower is the same
    one, and training.
    """
    assert not any(weight.requires_grad for weight in model.model.audio_tower.parameters()), "the tower is not frozen"
    return prompt | {"heard": run_audio_tower(model, prompt)}


def run_audio_tower(model, prompt: Prompt, checkpointing: bool = False) -> Tensor:
    """The audio tower's output for each clip, [B, audio tokens, audio hidden], padded on the right to the longest's.

    The model's own encoder takes 30 s of mel frames, 3,000, whatever a clip's length. Here the convolutions (kernel 3,
    the second with stride 2) run over the longest clip's frames plus two: so far they look past a clip's end, where
    the full-length spectrogram holds padding. Further padding is masked in attention and reaches no audio token. Where
    all clips are equally long nothing is left to mask, and attention takes a faster kernel.

    Of a prompt from `listen`, that is known already.
    """
    if "heard" in prompt:
        return prompt["heard"]
    tower, mel_mask = model.model.audio_tower, prompt["feature_attention_mask"]
    longest = mel_mask.shape[1]
    if longest < 2 * tower.config.max_source_positions:
        longest -= 2
    hidden = F.gelu(tower.conv1(prompt["input_features"].to(tower.conv1.weight.dtype)))
    hidden = F.gelu(tower.conv2(hidden)).transpose(1, 2)  # [B, encoder frames, audio hidden]
    encoder_frames, _ = tower._get_feat_extract_output_lengths(mel_mask.sum(-1))
    hidden = hidden[:, : tower._get_feat_extract_output_lengths(longest)[0]]
    hidden = hidden + tower.embed_positions.weight[: hidden.shape[1]]
    within = torch.arange(hidden.shape[1], device=hidden.device) < encoder_frames[:, None]
    mask = create_bidirectional_mask(config=tower.config, inputs_embeds=hidden, attention_mask=within)
    again = dict(checkpointing=checkpointing, random=dropout_is_on(model))
    for layer in tower.layers:
        hidden = _run(layer, hidden, mask, **again)
    return tower.layer_norm(tower.avg_pooler(hidden.transpose(1, 2)).transpose(1, 2))


def audio_features(model, prompt: Prompt, heard: Tensor) -> Tensor:
    """The audio tokens of all clips, one clip after the other, [audio tokens of the batch, H]. heard: the tower's."""
    frames = prompt["feature_attention_mask"].sum(-1)
    _, audio_tokens = model.model.audio_tower._get_feat_extract_output_lengths(frames)
    valid = torch.arange(heard.shape[1], device=heard.device) < audio_tokens[:, None]
    return model.model.multi_modal_projector(heard[valid])


# ---- prefill and sample ----


class GroupCache:
    """Keys and values of B prompts, each held once, for their N = B * G completions to attend to.

    The model's attention layers call `update` with the keys and values of their tokens [rows, key-value heads, tokens,
    head size] and attend to what it returns: to their own while rows are prompts and, once `group_size` is set and
    rows are completions, to their prompt's and their own.
    """

    def __init__(self):
        self.prompt: dict[int, tuple[Tensor, Tensor]] = {}  # by layer
        self.group_size: int | None = None

    def update(self, keys: Tensor, values: Tensor, layer: int, *_) -> tuple[Tensor, Tensor]:
        if self.group_size is None:
            self.prompt[layer] = keys.contiguous(), values.contiguous()
            return self.prompt[layer]
        prompt_keys, prompt_values = self.prompt[layer]
        keys = torch.cat([prompt_keys.repeat_interleave(self.group_size, dim=0), keys], dim=2)
        return keys, torch.cat([prompt_values.repeat_interleave(self.group_size, dim=0), values], dim=2)


def embed_prompt(model, prompt: Prompt, heard: Tensor) -> Tensor:
    """The prompt's token embeddings with the audio's features in the place of its <|AUDIO|> tokens, [B, P, H]."""
    features = audio_features(model, prompt, heard)
    embeds = model.get_input_embeddings()(prompt["input_ids"])
    is_audio = (prompt["input_ids"] == model.config.audio_token_id)[:, :, None]
    return embeds.masked_scatter(is_audio, features.to(embeds.dtype))


def attention_inputs(model, embeds: Tensor, attention_mask: Tensor) -> dict:
    """What the decoder layers need beside the hidden states of t new tokens: causal mask and rotary positions.

    `attention_mask` [rows, tokens] covers what stands before the new tokens and themselves; where it is 0, there is
    padding, which takes no positions.
    """
    new, total = embeds.shape[1], attention_mask.shape[1]
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -new:]
    inputs = {"position_embeddings": model.model.language_model.rotary_emb(embeds, position_ids)}
    if new == total and attention_mask.all():  # attention is causal by itself, and faster than by a mask
        return inputs | {"attention_mask": None}
    causal = torch.ones(new, total, dtype=torch.bool, device=embeds.device).tril(total - new)
    # A padding token attends to itself, so that no row of the softmax is empty.
    return inputs | {"attention_mask": causal & (attention_mask[:, None, None, :].bool() | causal.triu(total - new))}


def prefill(model, prompt: Prompt) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Run each prompt through the model once.

    Returns the last hidden state [B, H] and each layer's keys and values, [B, key-value heads, P, head size] each.
    """
    hidden, cache = embed_prompt(model, prompt, run_audio_tower(model, prompt)), GroupCache()
    inputs = attention_inputs(model, hidden, prompt["attention_mask"])
    for layer in model.model.language_model.layers:
        hidden = layer(hidden, past_key_values=cache, **inputs)
    return model.model.language_model.norm(hidden)[:, -1], list(cache.prompt.values())


@torch.no_grad()
def sample_group(
    model,
    prompt: Prompt,
    group_size: int,
    max_new_tokens: int,
    temperature: float,
    stop_ids: list[int],
    generator: torch.Generator | None = None,
    decoder: GroupDecoder | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample `group_size` completions of each prompt from the full distribution: no top-k, no top-p, no penalties.

    Temperature 0 takes the most likely token. `decoder` is one for the same model and sizes, kept over many calls;
    without one, this call allocates memory for keys and values of its own. Returns completions [N, T], T <=
    max_new_tokens, filled up with stop_ids[0] after their end, and their mask [N, T]: True up to and including the
    first stop token.
    """
    decoder = decoder or GroupDecoder(model, group_size, max_new_tokens)
    hidden, cache = prefill(model, prompt)
    decoder.start(cache, prompt["attention_mask"])
    del cache  # the decoder has its own
    hidden = hidden.repeat_interleave(group_size, dim=0)
    stop = torch.tensor(stop_ids, device=hidden.device)
    finished = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)

    columns, masks = [], []
    while True:
        tokens = torch.where(finished, stop[0], sample_tokens(model.lm_head(hidden), temperature, generator))
        columns.append(tokens)
        masks.append(~finished)
        finished = finished | torch.isin(tokens, stop)
        if len(columns) == max_new_tokens or len(columns) % ASK_EVERY == 0 and finished.all():
            break
        hidden = decoder.step(tokens)
    completions, mask = torch.stack(columns, dim=1), torch.stack(masks, dim=1)
    length = int(mask.any(dim=0).sum())  # up to where the last one finished
    return completions[:, :length], mask[:, :length]


def sample_tokens(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """A token id for each row of logits [N, vocabulary], drawn from softmax(logits / temperature) in float32."""
    if temperature == 0:
        return logits.argmax(-1)
    probs = torch.softmax(logits.float() / temperature, dim=-1)
    return torch.multinomial(probs, num_samples=1, generator=generator)[:, 0]


# ---- log-probs ----


def completion_logprobs(
    model, prompt: Prompt, completions: Tensor, mask: Tensor, temperature: float, checkpointing: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probs of sampled completions, with gradient unless under no_grad. One path for policy and reference.

    prompt: B prompts; completions, mask: [N, T] with N = B * G as sample_group returns them. Returns the tokens'
    log-probs under softmax(logits / temperature) and, without gradient, that distribution's entropy in nats, both
    [N, T] float32 and 0 where the mask is False. Logits are computed for completion tokens only.

    Prompts and completions go through the layers side by side, so that a layer's keys and values are gone once it is
    done. With `checkpointing`, only what passes between layers is kept for the backward pass, which computes the
    inside of each layer a second time: a third more arithmetic for, in the real model, a 25th of what is kept.
    """
    decoder, group_size = model.model.language_model, len(completions) // len(prompt["input_ids"])
    prompt_hidden = embed_prompt(model, prompt, run_audio_tower(model, prompt, checkpointing))
    hidden = model.get_input_embeddings()(completions[:, :-1])  # the last token predicts nothing
    prompt_mask = prompt["attention_mask"].repeat_interleave(group_size, dim=0)
    attention_mask = torch.cat([prompt_mask, mask[:, :-1].to(prompt_mask.dtype)], dim=1)
    prompt_inputs = attention_inputs(model, prompt_hidden, prompt["attention_mask"])
    inputs = attention_inputs(model, hidden, attention_mask)

    def run(layer, prompt_hidden, hidden):
        cache = GroupCache()
        prompt_hidden = layer(prompt_hidden, past_key_values=cache, **prompt_inputs)
        if hidden.shape[1] == 0:
            return prompt_hidden, hidden  # completions of a single token
        cache.group_size = group_size
        return prompt_hidden, layer(hidden, past_key_values=cache, **inputs)

    again = dict(checkpointing=checkpointing, random=dropout_is_on(model))
    for layer in decoder.layers:
        prompt_hidden, hidden = _run(run, layer, prompt_hidden, hidden, **again)
    first = prompt_hidden[:, -1:].repeat_interleave(group_size, dim=0)  # predicts the first completion token
    hidden = decoder.norm(torch.cat([first, hidden], dim=1))[mask]  # [completion tokens, H]

    scores = [
        _run(token_scores, model.lm_head, *chunk, temperature, **again)
        for chunk in zip(hidden.split(LOGITS_CHUNK), completions[mask].split(LOGITS_CHUNK))
    ]
    zeros = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    logprobs, entropy = (zeros.masked_scatter(mask, torch.cat(tensors)) for tensors in zip(*scores))
    return logprobs, entropy


def token_scores(lm_head, hidden: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs of `tokens` [n] and entropy of their distribution, from what predicts them [n, H], in float32."""
    all_logprobs = (lm_head(hidden).float() / temperature).log_softmax(dim=-1)  # [n, vocabulary]
    with torch.no_grad():
        entropy = -(all_logprobs.exp() * all_logprobs).sum(-1)
    return all_logprobs.gather(-1, tokens[:, None])[:, 0], entropy


def _run(function, *inputs, checkpointing: bool, random: bool):
    """function(*inputs); with `checkpointing`, what is inside is computed again in the backward pass, with the same
    random numbers if it draws some."""
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=random)
    return function(*inputs)


# ---- text ----


def stop_token_ids(model, processor) -> list[int]:
    """The tokens that end a completion: the tokenizer's end of turn first, then what the checkpoint adds to it."""
    configured = model.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [] if configured is None else [configured]
    return list(dict.fromkeys([processor.tokenizer.eos_token_id, *configured]))


def encode_targets(processor, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Texts that a supervised policy is to say, each with the end of its turn. Returns completions and mask, [N, T],
    as sample_group does."""
    tokenizer = processor.tokenizer
    encoded = tokenizer(
        [text + tokenizer.eos_token for text in texts], padding=True, padding_side="right", return_tensors="pt"
    )
    return encoded["input_ids"], encoded["attention_mask"].bool()


def decode_text(processor, completions: Tensor, mask: Tensor) -> list[str]:
    """The texts of completions [N, T] without special tokens, as the rewards see them."""
    rows = [tokens[valid].tolist() for tokens, valid in zip(completions.cpu(), mask.cpu())]
    return processor.tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def to_device(prompt: Prompt, device: torch.device) -> Prompt:
    return {name: tensor.to(device) for name, tensor in prompt.items()}
