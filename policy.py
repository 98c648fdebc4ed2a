"""What GRPO does with Qwen2-Audio: encode prompts, sample groups of completions, compute log-probs on all ranks.

Shapes: B prompts, G completions each, N = B * G, P prompt tokens, T completion tokens, F mel frames, H hidden size.
Prompts are padded on the left and completions on the right, so the two meet without a gap. The completions of a
prompt are consecutive rows: row b * G + g is completion g of prompt b.

One idea makes this fast. A prompt is mostly audio and has hundreds of tokens, a completion has about a dozen, and the
G completions of a group share their prompt. So in each pass a prompt goes through the model once, and only the
completions run on its keys and values. That holds for sampling, the reference pass and the training pass, because
shared keys and values pass gradients on.
"""

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data import Question, build_prompt
from infra.audio import SAMPLE_RATE, load_audio
from infra.errors import InputError
from model.checkpoints import load_policy as load_policy  # part of this file's interface
from model.decoding import GroupDecoder
from model.qwen2_audio import (
    Prompt,
    audio_tower_is_frozen,
    causal_attention,
    embed_prompt,
    language_model,
    layer_runner,
    positions_and_mask,
    rms_norm,
    rotary_tables,
    run_audio_tower,
    run_layer,
    slice_prompt,
)

LOGITS_CHUNK = 1024  # tokens whose logits are in memory at once: with 156,032 words in float32, 0.6 GB
STOP_CHECK_EVERY = 4  # tokens between checks for ended completions: at each check the CPU waits for the GPU


# ---- prompts ----


class BadClip(InputError):
    """The clip of a question cannot be used."""

    def __init__(self, question: Question, fault: str):
        super().__init__(f"{question.place}: {fault}" if question.place else fault)
        self.question, self.fault = question, fault


def encode_prompts(processor, questions: list[Question], template: str, silence: bool = False) -> Prompt:
    """Encode questions and their clips as left-padded model inputs on the CPU.

    Returns input_ids and attention_mask [B, P], input_features [B, mels, F] and feature_attention_mask [B, F]. The
    processor pads clips to 30 s; here F is only the longest clip's frames plus two (see run_audio_tower). With
    `silence`, zeros replace the samples of each clip. Raises BadClip.
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
    """Yield each batch with its encoded prompts. A thread encodes the next batch while the caller uses this one.

    If a clip is bad, replace(batch, BadClip) must return the batch with another question instead. It is called again
    until all clips are good. Without `replace`, raises BadClip when the batch is due.
    """
    processor = copy.deepcopy(processor)  # for the thread alone: tokenizers are not thread-safe

    def encode(batch: list[Question]) -> tuple[list[Question], Prompt]:
        while True:
            try:
                return batch, encode_prompts(processor, batch, template, silence)
            except BadClip as error:
                if replace is None:
                    raise
                batch = replace(batch, error)

    with ThreadPoolExecutor(max_workers=1) as thread:
        due = None
        for batch in batches:
            following = thread.submit(encode, batch)
            if due:
                yield due.result()
            due = following
        if due:
            yield due.result()


def to_device(prompt: Prompt, device: torch.device) -> Prompt:
    """Copy the tensors of a prompt to a device."""
    return {name: tensor.to(device) for name, tensor in prompt.items()}


@torch.no_grad()
def listen(model, prompt: Prompt) -> Prompt:
    """Run the frozen audio tower once and store its output as `heard`, [B, audio tokens, audio hidden].

    Sampling, the reference pass (its tower is the same one) and training reuse `heard` instead of running the tower.
    """
    assert audio_tower_is_frozen(model), "the tower is not frozen"
    return prompt | {"heard": run_audio_tower(model, prompt)}


# ---- sampling ----


def prefill(model, prompt: Prompt) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Run each prompt through the model once.

    Returns the hidden state that predicts the first completion token, [B, H], and the keys and values of each layer,
    [B, P, key-value heads, head size] each.
    """
    embedded, cache = embed_prompt(model, prompt), []
    positions, causal = positions_and_mask(prompt["attention_mask"], embedded.shape[1], embedded.dtype)
    rotary = rotary_tables(model, positions.flatten(), embedded.dtype)

    def attend(*tensors: Tensor) -> Tensor:
        queries, keys, values = (tensor.unflatten(0, positions.shape) for tensor in tensors)
        cache.append((keys.contiguous(), values))  # a copy of the keys: they are a part of one tensor with the queries
        return causal_attention(queries, keys, values, causal)

    hidden = embedded.flatten(0, 1)  # [B * P, H]
    for layer in language_model(model).layers:
        hidden = run_layer(layer, hidden, rotary, attend)
    return rms_norm(language_model(model).norm, hidden.unflatten(0, positions.shape)[:, -1]), cache


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample `group_size` completions of each prompt from the full distribution: no top-k, no top-p, no penalties.

    Temperature 0 takes the most likely token. A `decoder` of the same model and sizes keeps its memory from call to
    call; without one, this call allocates its own. Returns completions, mask and log-probs, [N, T] with
    T <= max_new_tokens. The mask is True up to and including the first stop token. Behind it, completions are filled
    with stop_ids[0]. The log-probs of the tokens, float32, are 0 outside the mask, and everywhere at temperature 0.
    """
    decoder = decoder or GroupDecoder(model, group_size, max_new_tokens)
    hidden, cache = prefill(model, prompt)
    decoder.start(cache, prompt["attention_mask"])
    del cache  # the decoder has copied it
    hidden = hidden.repeat_interleave(group_size, dim=0)  # [N, H]
    stop = torch.tensor(stop_ids, device=hidden.device)
    finished = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)

    columns, masks, scores = [], [], []
    while True:
        drawn, logprobs = sample_tokens(model.lm_head(hidden), temperature, generator)
        tokens = torch.where(finished, stop[0], drawn)
        columns.append(tokens)
        masks.append(~finished)
        scores.append(torch.where(finished, 0.0, logprobs))
        finished = finished | torch.isin(tokens, stop)
        if len(columns) == max_new_tokens or len(columns) % STOP_CHECK_EVERY == 0 and finished.all():
            break
        hidden = decoder.step(tokens)
    completions, mask, logprobs = (torch.stack(tensors, dim=1) for tensors in (columns, masks, scores))
    length = int(mask.any(dim=0).sum())  # of the longest completion
    return completions[:, :length], mask[:, :length], logprobs[:, :length]


def sample_tokens(logits: Tensor, temperature: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Draw a token for each row of logits [N, vocabulary] from softmax(logits / temperature) in float32.

    Returns token ids and their log-probs, [N] each. Temperature 0 takes the most likely token, with log-prob 0.
    """
    if temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, torch.zeros(tokens.shape, device=tokens.device)
    probs = torch.softmax(logits.float() / temperature, dim=-1)
    tokens = torch.multinomial(probs, num_samples=1, generator=generator)  # [N, 1]
    return tokens[:, 0], probs.gather(-1, tokens)[:, 0].log()


# ---- log-probs ----


def completion_logprobs(
    model, prompt: Prompt, completions: Tensor, mask: Tensor, temperature: float, checkpointing: bool = False
) -> tuple[Tensor, Tensor]:
    """Compute the log-probs of sampled completions. Policy and reference use this same function.

    prompt: B prompts. completions, mask: [N, T], as sample_group returns them. Returns log-probs and entropy, [N, T]
    float32, 0 outside the mask: the log-probs of the tokens under softmax(logits / temperature), with gradient unless
    called under no_grad, and the entropy of that distribution in nats, without gradient.

    Prompts and completions pass each layer together: each weight is read once, and a layer's keys and values are freed
    before the next layer. With `checkpointing`, only the hidden states between layers are kept for the backward pass,
    which computes each layer again: a third more arithmetic. In the real model, the pass of two prompts then takes
    5.2 GB, not 57.1 GB.
    """
    group_size, run = len(completions) // len(prompt["input_ids"]), layer_runner(model, checkpointing)
    prompt_hidden = embed_prompt(model, prompt, checkpointing)  # [B, P, H]
    own_hidden = model.get_input_embeddings()(completions[:, :-1])  # [N, T - 1, H]: the last token predicts nothing
    (shape, own_shape), dtype = (prompt_hidden.shape[:2], own_hidden.shape[:2]), prompt_hidden.dtype
    prompt_mask = prompt["attention_mask"].bool()
    whole_mask = torch.cat([prompt_mask.repeat_interleave(group_size, dim=0), mask[:, :-1]], dim=1)  # [N, P + T - 1]
    positions, causal = positions_and_mask(prompt_mask, shape[1], dtype)
    own_positions, own_causal = positions_and_mask(whole_mask, own_shape[1], dtype)
    rotary = rotary_tables(model, torch.cat([positions.flatten(), own_positions.flatten()]), dtype)

    def split(tensor: Tensor) -> tuple[Tensor, Tensor]:
        """Split [B * P + N * (T - 1), ...] into prompts [B, P, ...] and completions [N, T - 1, ...]."""
        return tensor[: shape.numel()].unflatten(0, shape), tensor[shape.numel() :].unflatten(0, own_shape)

    def attend(*tensors: Tensor) -> Tensor:
        (queries, own_queries), (keys, own_keys), (values, own_values) = map(split, tensors)
        attended = causal_attention(queries, keys, values, causal)
        if own_shape[1] == 0:  # T = 1: the prompt predicts the only token
            return attended
        keys = torch.cat([keys.repeat_interleave(group_size, dim=0), own_keys], dim=1)  # [N, P + T - 1, heads, size]
        values = torch.cat([values.repeat_interleave(group_size, dim=0), own_values], dim=1)
        return torch.cat([attended, causal_attention(own_queries, keys, values, own_causal)])

    hidden = torch.cat([prompt_hidden.flatten(0, 1), own_hidden.flatten(0, 1)])  # [B * P + N * (T - 1), H]
    for layer in language_model(model).layers:
        hidden = run(run_layer, layer, hidden, rotary, attend)
    prompt_hidden, own_hidden = split(hidden)
    first = prompt_hidden[:, -1:].repeat_interleave(group_size, dim=0)  # predicts the first completion token
    hidden = torch.cat([first, own_hidden], dim=1)[mask]  # [completion tokens, H]
    hidden = rms_norm(language_model(model).norm, hidden)

    chunks = zip(hidden.split(LOGITS_CHUNK), completions[mask].split(LOGITS_CHUNK))
    scores = [run(token_scores, model.lm_head, *chunk, temperature) for chunk in chunks]
    zeros = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    logprobs, entropy = (zeros.masked_scatter(mask, torch.cat(tensors)) for tensors in zip(*scores))
    return logprobs, entropy


def token_scores(lm_head, hidden: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Compute log-probs of tokens [n] and the entropy of their distributions in float32.

    hidden: [n, H], the states that predict the tokens. The entropy has no gradient.
    """
    all_logprobs = (lm_head(hidden).float() / temperature).log_softmax(dim=-1)  # [n, vocabulary]
    with torch.no_grad():
        entropy = -(all_logprobs.exp() * all_logprobs).sum(-1)
    return all_logprobs.gather(-1, tokens[:, None])[:, 0], entropy


# ---- text ----


def stop_token_ids(model, processor) -> list[int]:
    """Return the tokens that end a completion: the tokenizer's end of turn first, then those of the checkpoint."""
    configured = model.generation_config.eos_token_id
    if not isinstance(configured, list):
        configured = [] if configured is None else [configured]
    return list(dict.fromkeys([processor.tokenizer.eos_token_id, *configured]))


def encode_targets(processor, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Encode target texts for supervised fine-tuning, each with its end of turn.

    Returns completions and mask, [N, T], in the form of sample_group's.
    """
    tokenizer = processor.tokenizer
    texts = [text + tokenizer.eos_token for text in texts]
    encoded = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    return encoded["input_ids"], encoded["attention_mask"].bool()


def decode_text(processor, completions: Tensor, mask: Tensor) -> list[str]:
    """Decode completions [N, T] to the texts that the rewards see: without special tokens."""
    rows = [tokens[valid].tolist() for tokens, valid in zip(completions.cpu(), mask.cpu())]
    return processor.tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)


# ---- data parallel ----


class CompletionLogprobs(nn.Module):
    """completion_logprobs as a module: DistributedDataParallel wraps the forward of a module."""

    def __init__(self, model, checkpointing: bool):
        super().__init__()
        self.model, self.checkpointing = model, checkpointing

    def forward(self, prompt: Prompt, completions: Tensor, mask: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        return completion_logprobs(self.model, prompt, completions, mask, temperature, self.checkpointing)


def data_parallel(model, prompt: Prompt, checkpointing: bool | None) -> DistributedDataParallel:
    """Wrap completion_logprobs in DistributedDataParallel, which averages the gradients over the ranks.

    checkpointing: see completion_logprobs; None: on a GPU.

    Two backward passes over any `prompt` bring the wrapper into its final state. In the first it records the order of
    the gradients and rebuilds its buckets. In the second the gradients become views into the new buckets.
    Without them, gradients that accumulate before the first exchange would take twice their memory, and the first step
    of a resumed run would add numbers in another order than a run without interruption.
    """
    if checkpointing is None:
        checkpointing = model.device.type == "cuda"
    ddp_model = DistributedDataParallel(CompletionLogprobs(model, checkpointing), gradient_as_bucket_view=True)
    tokens = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        ddp_model(prompt, tokens, torch.ones_like(tokens, dtype=torch.bool), 1.0)[0].sum().backward()
    model.zero_grad(set_to_none=False)
    return ddp_model
