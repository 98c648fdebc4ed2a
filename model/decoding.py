"""Decoding: compute the next token of all completions of all groups, with the keys of each prompt stored and read once.

Shapes: B prompts of P tokens, G completions each, N = B * G, D the size of an attention head, S the slots that a step
attends to. "heads" counts key-value heads. With grouped-query attention each of them serves `each` query heads, which
are treated as more queries of the group.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from model.qwen2_audio import language_model, rms_norm, rotary_tables, run_layer

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

    def __init__(
        self,
        model,
        group_size: int,
        max_new_tokens: int,
        cuda_graph: bool = False,
        prompts: int = 0,
        prompt_tokens: int = 0,
    ):
        """Prepare to decode max_new_tokens tokens for each completion.

        prompts, prompt_tokens: the largest numbers expected, if known. Larger ones work, but then memory is allocated
        again, and all graphs are recorded again.
        """
        self.model, self.group_size, self.max_new_tokens = model, group_size, max_new_tokens
        self.prompts, self.prompt_tokens = prompts, prompt_tokens
        self.cuda_graph = cuda_graph and model.device.type == "cuda"
        self.is_prompt = torch.empty(0, 0)  # [B, slots], False for padding; its shape is the size of the prompt cache
        self.prompt_cache: list[tuple[Tensor, Tensor]] = []  # layer -> keys and values
        self.completion_cache: list[tuple[Tensor, Tensor]] = []
        self.graphs: dict[tuple[int, int], Callable[[], Tensor]] = {}  # slots -> a step that can be replayed

    def start(self, cache: list[tuple[Tensor, Tensor]], prompt_mask: Tensor) -> None:
        """Begin the completions of new prompts.

        cache: keys and values of each layer, [B, P, key-value heads, D] each. prompt_mask: [B, P], 0 for the padding
        on the left. If memory is allocated for more prompts, the other rows are masked, and `step` drops their results.
        """
        prompts, tokens = prompt_mask.shape
        self.prompt_slots, self.decoded = _round_up(tokens, PROMPT_SLOTS), 0
        self.prompts, self.prompt_tokens = max(prompts, self.prompts), max(tokens, self.prompt_tokens)
        size = self.prompts, _round_up(self.prompt_tokens, PROMPT_SLOTS)
        if self.is_prompt.shape != size:
            self._allocate(cache, *size)
        for stored, new in zip(self.prompt_cache, cache):
            for to, tensor in zip(stored, new):
                to[:, :, :-tokens] = 0  # masked slots have weight 0, and 0 times an earlier NaN would be NaN
                to[:prompts, :, -tokens:] = tensor.transpose(1, 2)
        for stored in self.completion_cache:
            for to in stored:
                to.zero_()
        self.is_prompt.zero_()
        self.is_prompt[:prompts, -tokens:] = prompt_mask.bool()
        self.prompt_lengths.copy_(self.is_prompt.sum(dim=1).repeat_interleave(self.group_size))
        self.tokens.zero_()
        self.length.zero_()

    def _allocate(self, cache: list[tuple[Tensor, Tensor]], prompts: int, prompt_slots: int) -> None:
        (like, _), rows = cache[0], prompts * self.group_size
        self.prompt_cache, self.completion_cache, self.graphs = [], [], {}  # free the old memory first

        def empty(rows: int, slots: int) -> list[tuple[Tensor, Tensor]]:
            shape = (rows, like.shape[2], slots, like.shape[3])
            return [(like.new_empty(shape), like.new_empty(shape)) for _ in cache]

        self.prompt_cache = empty(prompts, prompt_slots)
        self.completion_cache = empty(rows, self.max_new_tokens)
        self.is_prompt = like.new_zeros(prompts, prompt_slots, dtype=torch.bool)
        self.prompt_lengths, self.tokens = like.new_zeros(2, rows, dtype=torch.long)
        self.length = like.new_zeros(1, dtype=torch.long)  # tokens in the completion cache
        self.graph_pool = torch.cuda.graph_pool_handle() if self.cuda_graph else None  # all graphs share this memory

    def step(self, tokens: Tensor) -> Tensor:
        """Append one token [N] to each completion.

        Returns the hidden states [N, H] that predict the next token. The next step may overwrite them.
        """
        self.tokens[: len(tokens)] = tokens
        slots = self.prompt_slots, min(_round_up(self.decoded + 1, COMPLETION_SLOTS), self.max_new_tokens)
        if self.cuda_graph and slots not in self.graphs:
            self.graphs[slots] = record(partial(self._forward, *slots), self.graph_pool)
        hidden = self.graphs[slots]() if self.cuda_graph else self._forward(*slots)
        self.length += 1
        self.decoded += 1
        return hidden[: len(tokens)]

    def _forward(self, prompt_slots: int, completion_slots: int) -> Tensor:
        """Run the layers. For CUDA graphs, the same kernels run whatever the tensors hold, and a second run is safe."""
        decoder = language_model(self.model)
        # A sampled <|AUDIO|> is embedded as an ordinary word: a completion has no audio of its own.
        hidden = self.model.get_input_embeddings()(self.tokens)
        rotary = rotary_tables(self.model, self.prompt_lengths + self.length, hidden.dtype)

        empty = torch.arange(completion_slots, device=hidden.device) > self.length
        empty = torch.cat([~self.is_prompt[:, -prompt_slots:], empty.expand(len(self.is_prompt), -1)], dim=1)
        bias = torch.zeros(empty.shape, device=hidden.device).masked_fill(empty, -torch.inf)[:, None, None, None, :]

        for layer, stored, own in zip(decoder.layers, self.prompt_cache, self.completion_cache):
            prompt = [tensor[:, :, -prompt_slots:] for tensor in stored]
            attend = partial(self._attend, bias, prompt, own, completion_slots)
            hidden = run_layer(layer, hidden, rotary, attend)
        return rms_norm(decoder.norm, hidden)

    def _attend(self, bias: Tensor, prompt, own, own_slots: int, queries: Tensor, keys: Tensor, values: Tensor):
        """Let the new token of each completion attend to prompt and completion, [N, heads, D] each -> [N, heads * D].

        prompt: keys and values of the prompts, [B, key-value heads, slots, D] each. own: those of the completions,
        [N, ...], of which the first own_slots count. As in the other passes' kernels, scores and sums are float32.
        """
        for cached, added in zip(own, (keys, values)):
            cached.index_copy_(2, self.length, added[:, :, None])
        own_keys, own_values = (cached[:, :, :own_slots] for cached in own)
        queries, groups = queries.unflatten(1, (keys.shape[1], -1)), (-1, self.group_size)  # [N, heads, each, D]

        # Scores and weights: [B, heads, G, each, S]. Prompt slots come before the completion's own slots.
        to_own = product(queries, own_keys.mT).unflatten(0, groups).transpose(1, 2)
        together = queries.unflatten(0, groups).transpose(1, 2).flatten(2, 3)  # a group's, [B, heads, G * each, D]
        to_prompt = product(together, prompt[0].mT).unflatten(2, (self.group_size, -1))
        scores = torch.cat([to_prompt, to_own], dim=-1)
        weights = torch.add(bias, scores, alpha=queries.shape[-1] ** -0.5).softmax(dim=-1).to(queries.dtype)
        from_prompt, from_own = weights.split([to_prompt.shape[-1], own_slots], dim=-1)
        # Weighted sums of the values: [B, G, heads, each, D] each.
        attended = product(from_own.transpose(1, 2).flatten(0, 1), own_values).unflatten(0, groups)
        shared = product(from_prompt.flatten(2, 3), prompt[1]).unflatten(2, (self.group_size, -1)).transpose(1, 2)
        return (attended + shared).to(queries.dtype).flatten(2).flatten(0, 1)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply matrices, [X, Y, ...] each, in at least float32. A product in bfloat16 would round its result to 8 bits.

    Rounded scores would change attention weights by up to 4% at scores of 60, and the sampler would differ from the
    trained policy: the kernels of the other passes keep their scores in float32.
    """
    if a.is_cuda and a.dtype == torch.bfloat16:
        return torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out_dtype=torch.float32).unflatten(0, a.shape[:2])
    wide = torch.promote_types(a.dtype, torch.float32)
    return a.to(wide) @ b.to(wide)  # the CPU's bmm has no out_dtype


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


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
