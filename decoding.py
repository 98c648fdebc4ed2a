"""Decoding: a new token of every completion of every group, with each prompt's keys and values held and read once.

Shapes: B prompts of P tokens, G completions each, N = B * G, D the size of an attention head, S the slots for keys that
a step attends to. Heads that share keys and values (grouped-query attention) are handled as more queries of a group.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

PROMPT_SLOTS, COMPLETION_SLOTS = 128, 64  # a step attends to multiples of these; what is not filled yet is masked


class GroupDecoder:
    """Runs the language model over completions token by token, after their prompts were prefilled.

    A group's G queries attend to their prompt's keys together, in one matrix product. The usual cache would hold G
    copies of a prompt's keys and values, and read all of them for each token.

    What changes from token to token stands in tensors that stay where they are. With `cuda_graph`, the kernels of a
    step are therefore recorded on a GPU, once for each number of slots, and then replayed, for this rollout and the
    next ones: launching a thousand kernels from Python for each token would take longer than running them.
    """

    def __init__(self, model, group_size: int, max_new_tokens: int, cuda_graph: bool = False):
        self.model, self.group_size, self.room = model, group_size, max_new_tokens
        self.cuda_graph = cuda_graph and model.device.type == "cuda"
        self.is_prompt = torch.empty(0, 0)  # [B, slots], False for padding; the memory below is for so many
        self.prompt_cache: list[tuple[Tensor, Tensor]] = []  # of each layer, keys and values
        self.completion_cache: list[tuple[Tensor, Tensor]] = []
        self.graphs: dict[tuple[int, int], Callable[[], Tensor]] = {}  # replayable steps by slots

    def start(self, cache: list[tuple[Tensor, Tensor]], prompt_mask: Tensor) -> None:
        """Begin the completions of prompts. cache: each layer's keys and values, [B, key-value heads, P, D] each;
        prompt_mask: [B, P], 0 for padding, which stands on the left."""
        prompts, tokens = prompt_mask.shape
        self.prompt_slots, self.decoded = _round_up(tokens, PROMPT_SLOTS), 0
        if prompts != len(self.is_prompt) or self.prompt_slots > self.is_prompt.shape[1]:
            self._allocate(cache, prompts)
        for stored, new in zip(self.prompt_cache, cache):
            for to, tensor in zip(stored, new):
                to[:, :, :-tokens] = 0  # what is masked counts 0 times, and 0 times an earlier NaN would be NaN
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
        self.prompt_cache, self.completion_cache, self.graphs = [], [], {}  # what was allocated before goes first

        def empty(rows: int, slots: int) -> list[tuple[Tensor, Tensor]]:
            shape = (rows, like.shape[1], slots, like.shape[3])
            return [(like.new_empty(shape), like.new_empty(shape)) for _ in cache]

        self.prompt_cache, self.completion_cache = empty(prompts, self.prompt_slots), empty(rows, self.room)
        self.is_prompt = like.new_zeros(prompts, self.prompt_slots, dtype=torch.bool)
        self.prompt_lengths, self.tokens = like.new_zeros(2, rows, dtype=torch.long)
        self.length = like.new_zeros(1, dtype=torch.long)  # tokens in the completion cache
        self.graph_pool = torch.cuda.graph_pool_handle() if self.cuda_graph else None  # all graphs work in it

    def step(self, tokens: Tensor) -> Tensor:
        """Add a token to each completion, [N]. Returns the hidden states that predict the next one, [N, H], in memory
        that the next step may use again."""
        self.tokens.copy_(tokens)
        slots = self.prompt_slots, min(_round_up(self.decoded + 1, COMPLETION_SLOTS), self.room)
        if self.cuda_graph and slots not in self.graphs:
            self.graphs[slots] = record(partial(self._forward, *slots), self.graph_pool)
        hidden = self.graphs[slots]() if self.cuda_graph else self._forward(*slots)
        self.length += 1
        self.decoded += 1
        return hidden

    def _forward(self, prompt_slots: int, completion_slots: int) -> Tensor:
        """The step itself: no number in it depends on a tensor's content, and running it twice changes nothing."""
        language_model = self.model.model.language_model
        # A completion has no audio of its own: a sampled <|AUDIO|> is embedded as the word that it is.
        hidden = self.model.get_input_embeddings()(self.tokens)
        cos, sin = language_model.rotary_emb(hidden[:, None], (self.prompt_lengths + self.length)[:, None])
        first, second = sin.chunk(2, dim=-1)
        rotary = cos, torch.cat([-first, second], dim=-1)

        empty = torch.arange(completion_slots, device=hidden.device) > self.length
        empty = torch.cat([~self.is_prompt[:, -prompt_slots:], empty.expand(len(self.is_prompt), -1)], dim=1)
        bias = torch.zeros(empty.shape, device=hidden.device).masked_fill(empty, -torch.inf)[:, None, None, None, :]

        for layer, stored, own in zip(language_model.layers, self.prompt_cache, self.completion_cache):
            prompt = [tensor[:, :, -prompt_slots:] for tensor in stored]
            hidden = hidden + self._attend(
                layer.self_attn, _rms_norm(layer.input_layernorm, hidden), rotary, bias, prompt, own, completion_slots
            )
            hidden = hidden + layer.mlp(_rms_norm(layer.post_attention_layernorm, hidden))
        return _rms_norm(language_model.norm, hidden)

    def _attend(self, attention, hidden: Tensor, rotary, bias: Tensor, prompt, own, own_slots: int) -> Tensor:
        """One layer's attention, [N, H] -> [N, H], over its keys and values of prompts and completions."""
        (cos, sin), groups, size = rotary, (-1, self.group_size), attention.head_dim
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        queries, keys, values = (project(hidden).unflatten(-1, (-1, size)) for project in projections)
        heads = keys.shape[1]
        both = torch.cat([queries, keys], dim=1)
        both = torch.addcmul(both * cos, both.roll(size // 2, dims=-1), sin)  # the rotary embedding
        queries, keys = both[:, :-heads].unflatten(1, (heads, -1)), both[:, -heads:]  # queries: [N, heads, of each, D]
        for cached, added in zip(own, (keys, values)):
            cached.index_copy_(2, self.length, added[:, :, None])
        own_keys, own_values = (cached[:, :, :own_slots] for cached in own)

        # Scores and weights: [B, heads, G, queries of each, S], the slots of the prompt before the completion's own.
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
    """A function that replays the kernels of `forward`, as a CUDA graph, and returns the tensor that it returned."""
    forward()  # libraries set themselves up at their first call, which cannot be recorded
    graph = torch.cuda.CUDAGraph()
    # Other threads, such as NCCL's, may go on talking to the GPU meanwhile.
    with torch.cuda.graph(graph, pool, capture_error_mode="thread_local"):
        output = forward()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


def _rms_norm(norm, hidden: Tensor) -> Tensor:
    """A Qwen2RMSNorm in one kernel instead of seven."""
    return F.rms_norm(hidden, (hidden.shape[-1],), norm.weight, norm.variance_epsilon)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
