"""Decoding: compute the next token of all completions of all groups, with the keys of each prompt stored and read once.

Shapes: B prompts of P tokens, G completions each, N = B * G, D the size of an attention head, S the slots that a step
attends to. "heads" counts key-value heads. With grouped-query attention each of them serves `each` query heads, which
are treated as more queries of the group.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from model.qwen2_audio import language_model

# A step attends to multiples of these numbers of slots. Slots that are not filled yet are masked.
PROMPT_SLOTS, COMPLETION_SLOTS = 128, 64


class GroupDecoder:
    """Runs the language model over completions token by token, after policy.prefill ran their prompts.

    The G queries of a group attend to their prompt's keys together, in one matrix product. The usual cache stores G
    copies of a prompt's keys and values and reads all copies for each token.

    With `cuda_graph`, a GPU records the kernels of a step as a CUDA graph, once for each number of slots, and replays
    the graph in this rollout and the next ones: launching a thousand kernels for each token from Python would take
    longer than running them. So everything that changes from token to token is in tensors whose address is fixed.
    """

    def __init__(self, model, group_size: int, max_new_tokens: int, cuda_graph: bool = False):
        self.model, self.group_size, self.max_new_tokens = model, group_size, max_new_tokens
        self.cuda_graph = cuda_graph and model.device.type == "cuda"
        self.is_prompt = torch.empty(0, 0)  # [B, slots], False for padding; its shape is the size of the prompt cache
        self.prompt_cache: list[tuple[Tensor, Tensor]] = []  # layer -> keys and values
        self.completion_cache: list[tuple[Tensor, Tensor]] = []
        self.graphs: dict[tuple[int, int], Callable[[], Tensor]] = {}  # slots -> a step that can be replayed

    def start(self, cache: list[tuple[Tensor, Tensor]], prompt_mask: Tensor) -> None:
        """Begin the completions of new prompts.

        cache: keys and values of each layer, [B, key-value heads, P, D] each. prompt_mask: [B, P], 0 for the padding
        on the left.
        """
        prompts, tokens = prompt_mask.shape
        self.prompt_slots, self.decoded = _round_up(tokens, PROMPT_SLOTS), 0
        if prompts != len(self.is_prompt) or self.prompt_slots > self.is_prompt.shape[1]:
            self._allocate(cache, prompts)
        for stored, new in zip(self.prompt_cache, cache):
            for to, tensor in zip(stored, new):
                to[:, :, :-tokens] = 0  # masked slots have weight 0, and 0 times an earlier NaN would be NaN
                to[:, :, -tokens:] = tensor
        for stored in self.completion_cache:
            for to in stored:
                to.zero_()
        self.is_prompt.zero_()
        self.is_prompt[:, -tokens:] = prompt_mask.bool()
        self.prompt_lengths.copy_(prompt_mask.sum(dim=1).repeat_interleave(self.group_size))
        self.length.zero_()

    def _allocate(self, cache: list[tuple[Tensor, Tensor]], prompts: int) -> None:
        (like, _), rows = cache[0], prompts * self.group_size
        self.prompt_cache, self.completion_cache, self.graphs = [], [], {}  # free the old memory first

        def empty(rows: int, slots: int) -> list[tuple[Tensor, Tensor]]:
            shape = (rows, like.shape[1], slots, like.shape[3])
            return [(like.new_empty(shape), like.new_empty(shape)) for _ in cache]

        self.prompt_cache = empty(prompts, self.prompt_slots)
        self.completion_cache = empty(rows, self.max_new_tokens)
        self.is_prompt = like.new_zeros(prompts, self.prompt_slots, dtype=torch.bool)
        self.prompt_lengths, self.tokens = like.new_zeros(2, rows, dtype=torch.long)
        self.length = like.new_zeros(1, dtype=torch.long)  # tokens in the completion cache
        self.graph_pool = torch.cuda.graph_pool_handle() if self.cuda_graph else None  # all graphs share this memory

    def step(self, tokens: Tensor) -> Tensor:
        """Append one token [N] to each completion.

        Returns the hidden states [N, H] that predict the next token. The next step may overwrite them.
        """
        self.tokens.copy_(tokens)
        slots = self.prompt_slots, min(_round_up(self.decoded + 1, COMPLETION_SLOTS), self.max_new_tokens)
        if self.cuda_graph and slots not in self.graphs:
            self.graphs[slots] = record(partial(self._forward, *slots), self.graph_pool)
        hidden = self.graphs[slots]() if self.cuda_graph else self._forward(*slots)
        self.length += 1
        self.decoded += 1
        return hidden

    def _forward(self, prompt_slots: int, completion_slots: int) -> Tensor:
        """Run the layers. For CUDA graphs, the same kernels run whatever the tensors hold, and a second run is safe."""
        decoder = language_model(self.model)
        # A sampled <|AUDIO|> is embedded as an ordinary word: a completion has no audio of its own.
        hidden = self.model.get_input_embeddings()(self.tokens)
        cos, sin = decoder.rotary_emb(hidden[:, None], (self.prompt_lengths + self.length)[:, None])
        first, second = sin.chunk(2, dim=-1)
        rotary = cos, torch.cat([-first, second], dim=-1)

        empty = torch.arange(completion_slots, device=hidden.device) > self.length
        empty = torch.cat([~self.is_prompt[:, -prompt_slots:], empty.expand(len(self.is_prompt), -1)], dim=1)
        bias = torch.zeros(empty.shape, device=hidden.device).masked_fill(empty, -torch.inf)[:, None, None, None, :]

        for layer, stored, own in zip(decoder.layers, self.prompt_cache, self.completion_cache):
            prompt = [tensor[:, :, -prompt_slots:] for tensor in stored]
            hidden = hidden + self._attend(
                layer.self_attn, _rms_norm(layer.input_layernorm, hidden), rotary, bias, prompt, own, completion_slots
            )
            hidden = hidden + layer.mlp(_rms_norm(layer.post_attention_layernorm, hidden))
        return _rms_norm(decoder.norm, hidden)

    def _attend(self, attention, hidden: Tensor, rotary, bias: Tensor, prompt, own, own_slots: int) -> Tensor:
        """Run one layer's attention, [N, H] -> [N, H], over the keys and values of prompts and completions.

        prompt: keys and values of the prompts, [B, key-value heads, slots, D] each. own: those of the completions,
        [N, ...], of which the first own_slots count.
        """
        (cos, sin), groups, size = rotary, (-1, self.group_size), attention.head_dim
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        queries, keys, values = (project(hidden).unflatten(-1, (-1, size)) for project in projections)
        heads = keys.shape[1]
        both = torch.cat([queries, keys], dim=1)
        both = torch.addcmul(both * cos, both.roll(size // 2, dims=-1), sin)  # the rotary embedding
        queries, keys = both[:, :-heads].unflatten(1, (heads, -1)), both[:, -heads:]  # queries: [N, heads, each, D]
        for cached, added in zip(own, (keys, values)):
            cached.index_copy_(2, self.length, added[:, :, None])
        own_keys, own_values = (cached[:, :, :own_slots] for cached in own)

        # Scores and weights: [B, heads, G, each, S]. Prompt slots come before the completion's own slots.
        to_own = (queries @ own_keys.mT).unflatten(0, groups).transpose(1, 2)
        together = queries.unflatten(0, groups).transpose(1, 2).flatten(2, 3)  # a group's, [B, heads, G * queries, D]
        to_prompt = (together @ prompt[0].mT).unflatten(2, (self.group_size, -1))
        scores = torch.cat([to_prompt, to_own], dim=-1)
        weights = torch.add(bias, scores, alpha=attention.scaling).softmax(dim=-1).to(hidden.dtype)  # in float32
        from_prompt, from_own = weights.split([to_prompt.shape[-1], own_slots], dim=-1)
        attended = (from_own.transpose(1, 2).flatten(0, 1) @ own_values).unflatten(0, groups)  # [B, G, heads, ...]
        shared = (from_prompt.flatten(2, 3) @ prompt[1]).unflatten(2, (self.group_size, -1)).transpose(1, 2)
        return attention.o_proj((attended + shared).flatten(2).flatten(0, 1))


def record(forward: Callable[[], Tensor], pool) -> Callable[[], Tensor]:
    """Record the kernels of `forward` as a CUDA graph. Returns a function that replays them and returns the result."""
    forward()  # libraries initialize at their first call, which cannot be recorded
    graph = torch.cuda.CUDAGraph()
    # thread_local: other threads, such as NCCL's, may use the GPU while this one records.
    with torch.cuda.graph(graph, pool, capture_error_mode="thread_local"):
        output = forward()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


def _rms_norm(norm, hidden: Tensor) -> Tensor:
    """Apply a Qwen2RMSNorm in one kernel instead of seven."""
    return F.rms_norm(hidden, (hidden.shape[-1],), norm.weight, norm.variance_epsilon)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
