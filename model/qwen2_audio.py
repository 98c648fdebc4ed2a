"""The inside of Qwen2-Audio: its prompts as tensors, its audio tower, and the layers of its language model.

One second of sound is 100 mel frames, 50 encoder frames and 25 audio tokens. Prompts are padded on the left, clips on
the right. Shapes: B prompts, P prompt tokens, F mel frames, H hidden size of the language model, D size of an attention
head.
"""

import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers.masking_utils import create_bidirectional_mask

# A batch of prompts: the tensors of FIELDS, and the audio tower's output as `heard` if policy.listen has added it.
Prompt = dict[str, Tensor]
FIELDS = ("input_ids", "attention_mask", "input_features", "feature_attention_mask")
AUDIO_TOWER = "model.audio_tower"  # name of the module in the model
TOKENS_PER_SECOND = 25  # of sound
PAD_FRAMES = 2  # mel frames behind the end of a clip that the convolutions read


# ---- prompts ----


def slice_prompt(prompt: Prompt, start: int, stop: int) -> Prompt:
    """Return prompts start to stop of a batch, without the padding that only longer prompts needed."""
    return pick_prompts(prompt, slice(start, stop))


def pick_prompts(prompt: Prompt, rows: slice | list[int]) -> Prompt:
    """Return some prompts of a batch, without the padding that only longer prompts needed."""
    ids, mask, mel, mel_mask = (prompt[name][rows] for name in FIELDS)
    tokens, frames = int(mask.sum(-1).max()), int(mel_mask.sum(-1).max())
    mel, mel_mask = mel[:, :, : frames + PAD_FRAMES], mel_mask[:, : frames + PAD_FRAMES]
    part = dict(zip(FIELDS, (ids[:, -tokens:], mask[:, -tokens:], mel, mel_mask)))
    if "heard" in prompt:
        part["heard"] = prompt["heard"][rows, : audio_tokens(frames)]
    return part


def join_prompts(prompts: list[Prompt]) -> Prompt:
    """Join batches of prompts into one batch. A shorter clip gets zeros behind the frames that the tower reads."""
    rows = {name: [row for prompt in prompts for row in prompt[name]] for name in prompts[0]}
    left, right = (partial(pad_sequence, batch_first=True, padding_side=side) for side in ("left", "right"))
    joined = {
        "input_ids": left(rows["input_ids"], padding_value=int(rows["input_ids"][0][-1])),  # any token but <|AUDIO|>
        "attention_mask": left(rows["attention_mask"]),
        "input_features": right([mel.T for mel in rows["input_features"]]).mT,
        "feature_attention_mask": right(rows["feature_attention_mask"]),
    }
    return joined | ({"heard": right(rows["heard"])} if "heard" in rows else {})


def audio_tokens(frames):
    """Return how many audio tokens `frames` mel frames become. Takes an int or a tensor."""
    return encoder_frames(frames) // 2  # the pooler has stride 2


def encoder_frames(frames):
    """Return how many encoder frames `frames` mel frames become. Takes an int or a tensor."""
    return (frames + 1) // 2  # the second convolution has stride 2


# ---- the audio tower ----


def freeze_audio_tower(model) -> None:
    """Stop the audio tower from learning. The projector between tower and language model still learns."""
    model.model.audio_tower.requires_grad_(False)


def audio_tower_is_frozen(model) -> bool:
    """Return whether no weight of the audio tower learns."""
    return not any(weight.requires_grad for weight in model.model.audio_tower.parameters())


def frozen_copy(model, share_audio_tower: bool):
    """Return a copy of the model that never learns. share_audio_tower: the copy uses the model's own, frozen tower."""
    tower = model.model.audio_tower
    return copy.deepcopy(model, {id(tower): tower} if share_audio_tower else {}).requires_grad_(False)


def freeze_position_table(model) -> None:
    """Stop the audio tower's sinusoids from learning. They are fixed by design, but loading a model forgets that."""
    model.model.audio_tower.embed_positions.requires_grad_(False)


def run_audio_tower(model, prompt: Prompt, checkpointing: bool = False) -> Tensor:
    """Run the audio tower on each clip, or return its stored output if the prompt has one (`heard`).

    Returns [B, audio tokens, audio hidden], padded on the right to the longest clip.

    The encoder in transformers takes 3,000 mel frames (30 s), however short the clip. Here the convolutions (kernel 3,
    the second with stride 2) take the longest clip's frames plus PAD_FRAMES: they read no further behind the end of a
    clip, and the full-length spectrogram has the same padding there. Attention masks the padding, so it reaches no
    audio token. If all clips have the same length, there is nothing to mask, and attention uses a faster kernel.
    """
    if "heard" in prompt:
        return prompt["heard"]
    tower, mel_mask = model.model.audio_tower, prompt["feature_attention_mask"]
    longest = mel_mask.shape[1]
    if longest < 2 * tower.config.max_source_positions:  # a clip of full length has no padding frames
        longest -= PAD_FRAMES
    hidden = F.gelu(tower.conv1(prompt["input_features"].to(tower.conv1.weight.dtype)))
    hidden = F.gelu(tower.conv2(hidden)).transpose(1, 2)  # [B, encoder frames, audio hidden]
    hidden = hidden[:, : encoder_frames(longest)]
    hidden = hidden + tower.embed_positions.weight[: hidden.shape[1]]
    within = torch.arange(hidden.shape[1], device=hidden.device) < encoder_frames(mel_mask.sum(-1))[:, None]
    mask = create_bidirectional_mask(config=tower.config, inputs_embeds=hidden, attention_mask=within)
    run = layer_runner(model, checkpointing)
    for layer in tower.layers:
        hidden = run(layer, hidden, mask)
    return tower.layer_norm(tower.avg_pooler(hidden.transpose(1, 2)).transpose(1, 2))


# ---- the language model ----


def language_model(model):
    """Return the text decoder. It has `layers`, a final `norm` and the rotary embedding `rotary_emb`."""
    return model.model.language_model


def embed_prompt(model, prompt: Prompt, checkpointing: bool = False) -> Tensor:
    """Embed the tokens of prompts, [B, P, H]. The projected output of the audio tower replaces <|AUDIO|> tokens."""
    heard = run_audio_tower(model, prompt, checkpointing)
    tokens = audio_tokens(prompt["feature_attention_mask"].sum(-1))
    within = torch.arange(heard.shape[1], device=heard.device) < tokens[:, None]
    features = model.model.multi_modal_projector(heard[within])  # [audio tokens of all clips, H], clip after clip
    embeds = model.get_input_embeddings()(prompt["input_ids"])
    is_audio = (prompt["input_ids"] == model.config.audio_token_id)[:, :, None]
    return embeds.masked_scatter(is_audio, features.to(embeds.dtype))


def positions_and_mask(attention_mask: Tensor, new: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Return positions and causal mask of the last `new` tokens of each row. Padding takes up no positions.

    attention_mask: [rows, tokens], over all tokens so far; 0 for padding. Returns positions [rows, new], and a mask
    [rows, 1, new, tokens] of `dtype` to add to the attention scores: 0 or -inf. The mask is None if nothing is masked
    but later tokens of the same row: attention then needs no mask to be causal, and uses a faster kernel.
    """
    total = attention_mask.shape[1]
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, total - new :]
    if new == total and attention_mask.all():
        return positions, None
    causal = torch.ones(new, total, dtype=torch.bool, device=attention_mask.device).tril(total - new)
    # A padding token attends to itself, so that no row of the softmax is empty.
    allowed = causal & (attention_mask[:, None, None, :].bool() | causal.triu(total - new))
    return positions, torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, -torch.inf)


def rotary_tables(model, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosines and signed sines of the rotary embedding for run_layer. positions: [tokens]. [tokens, 1, D] each.

    The rotary embedding of x is x * cos + (-second half of x, first half of x) * sin. With the sign in the table, the
    second term is x, rolled by half its size, times the signed sine.
    """
    like = torch.empty(0, dtype=dtype, device=positions.device)
    cos, sin = (table[0, :, None] for table in language_model(model).rotary_emb(like, positions[None]))
    first, second = sin.chunk(2, dim=-1)
    return cos, torch.cat([-first, second], dim=-1)


def run_layer(layer, hidden: Tensor, rotary: tuple[Tensor, Tensor], attend) -> Tensor:
    """Run a layer of the language model over tokens of any number of sequences, [tokens, H] -> [tokens, H].

    attend(queries, keys, values) returns the attention outputs, [tokens, heads * D]. It gets [tokens, heads, D] each,
    with the rotary embedding of rotary_tables.

    Sampling, reference pass and training pass all use this function, so that all three round alike. In bfloat16, other
    kernels would make the sampler differ from the trained policy. It also launches fewer kernels than the layer's own
    forward: most GPU time of a short step is launching.
    """
    attention, normed = layer.self_attn, rms_norm(layer.input_layernorm, hidden)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    queries, keys, values = (project(normed).unflatten(-1, (-1, attention.head_dim)) for project in projections)
    both, (cos, sin) = torch.cat([queries, keys], dim=1), rotary
    both = torch.addcmul(both * cos, both.roll(attention.head_dim // 2, dims=-1), sin)
    queries, keys = both.split([queries.shape[1], keys.shape[1]], dim=1)
    hidden = hidden + attention.o_proj(attend(queries, keys, values))
    return hidden + layer.mlp(rms_norm(layer.post_attention_layernorm, hidden))


def rms_norm(norm, hidden: Tensor) -> Tensor:
    """Apply a Qwen2RMSNorm in one kernel instead of seven, and round once instead of twice."""
    return F.rms_norm(hidden, (hidden.shape[-1],), norm.weight, norm.variance_epsilon)


def causal_attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Let the tokens of each row attend to the row's keys.

    queries: [rows, new tokens, heads, D]. keys, values: [rows, tokens, key-value heads, D]. mask: see
    positions_and_mask. Returns [rows * new tokens, heads * D].
    """
    grouped = queries.shape[2] != keys.shape[2]
    queries, keys, values = (tensor.transpose(1, 2) for tensor in (queries, keys, values))
    attended = F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
    )
    return attended.transpose(1, 2).flatten(0, 1).flatten(1)


# ---- gradient checkpointing ----


def layer_runner(model, checkpointing: bool):
    """Return run(function, *inputs), which calls function(*inputs), with or without gradient checkpointing.

    With `checkpointing`, `run` keeps only the inputs for the backward pass, which calls the function again: with the
    same random numbers if the model draws any, as an adapter's dropout does.
    """
    if not (checkpointing and torch.is_grad_enabled()):
        return lambda function, *inputs: function(*inputs)
    draws_numbers = any(module.training for module in model.modules())
    return partial(checkpoint, use_reentrant=False, preserve_rng_state=draws_numbers)
