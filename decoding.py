"""Decoding: a new token of every completion of every group, with each prompt's keys and values held and read once.

Shapes: B prompts of P tokens, G completions each, N = B * G, D the size of an attention head. Heads that share keys
and values (grouped-query attention) are handled as more queries of a group.
"""

import torch
from torch import Tensor
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb


class GroupDecoder:
    """Runs the language model over completions token by token, after its prompts were prefilled.

    A group's G queries attend to their prompt's keys together, in one matrix product. The usual cache would hold G
    copies of a prompt's keys and values, and read all of them for each token.
    """

    def __init__(self, model, prompt_cache: list, prompt_mask: Tensor, group_size: int, room: int):
        """
        prompt_cache: keys and values of each layer, [B, key-value heads, P, D] each; prompt_mask: [B, P], 0 for
        padding; room: the most tokens that a completion will be given.
        """
        self.model, self.prompt_cache, self.group_size = model, prompt_cache, group_size
        self.padding = (prompt_mask == 0)[:, None, None, :]
        self.positions = prompt_mask.sum(dim=1).repeat_interleave(group_size)  # of the next token, [N]
        _, heads, _, size = prompt_cache[0][0].shape
        shape = (len(self.positions), heads, room, size)
        self.completion_cache = [(keys.new_empty(shape), keys.new_empty(shape)) for keys, _ in prompt_cache]
        self.length = 0  # tokens in the completion cache

    def step(self, tokens: Tensor) -> Tensor:
        """Add a token to each completion, [N]. Returns the hidden states that predict the next one, [N, H]."""
        language_model = self.model.model.language_model
        # A completion has no audio of its own: a sampled <|AUDIO|> is embedded as the word that it is.
        hidden = self.model.get_input_embeddings()(tokens)
        rotary = language_model.rotary_emb(hidden[:, None], self.positions[:, None])
        for layer, prompt, completions in zip(language_model.layers, self.prompt_cache, self.completion_cache):
            hidden = hidden + self._attend(layer.self_attn, layer.input_layernorm(hidden), rotary, prompt, completions)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        self.length += 1
        self.positions += 1
        return language_model.norm(hidden)

    def _attend(self, attention, hidden: Tensor, rotary, prompt, completions) -> Tensor:
        """One layer's attention, [N, H] -> [N, H], over its keys and values of prompts and completions."""
        size, new = attention.head_dim, self.length + 1
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        queries, keys, values = (project(hidden).view(len(hidden), -1, 1, size) for project in projections)
        queries, keys = apply_rotary_pos_emb(queries, keys, *rotary)
        for cached, added in zip(completions, (keys, values)):
            cached[:, :, self.length] = added[:, :, 0]

        heads = keys.shape[1]
        queries = queries.view(len(hidden), heads, -1, size)  # [N, key-value heads, queries of each, D]
        to_prompt = self._join_group(queries) @ prompt[0].mT  # [B, heads, G * queries, P]
        to_own = self._join_group(queries @ completions[0][:, :, :new].mT)  # [B, heads, G * queries, new]
        scores = torch.cat([to_prompt.masked_fill(self.padding, -torch.inf), to_own], dim=-1)
        weights = (scores.float() * attention.scaling).softmax(dim=-1).to(hidden.dtype)
        from_prompt, from_own = weights.split([to_prompt.shape[-1], new], dim=-1)
        attended = self._split_group(from_prompt @ prompt[1]) + self._split_group(from_own) @ completions[1][:, :, :new]
        return attention.o_proj(attended.reshape(len(hidden), -1))

    def _join_group(self, x: Tensor) -> Tensor:
        """[N, heads, queries, ...] -> [B, heads, G * queries, ...]"""
        return x.unflatten(0, (-1, self.group_size)).transpose(1, 2).flatten(2, 3)

    def _split_group(self, x: Tensor) -> Tensor:
        """[B, heads, G * queries, ...] -> [N, heads, queries, ...]"""
        return x.unflatten(2, (self.group_size, -1)).transpose(1, 2).flatten(0, 1)
