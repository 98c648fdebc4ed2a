"""AdamW with float32 master weights, its state sharded over the ranks (ZeRO stage 1, arXiv 1910.02054)."""

import math

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.adamw import adamw


class ShardedAdamW:
    """AdamW without weight decay whose arithmetic is float32 and whose state is split over the ranks.

    A bfloat16 weight near 0.02 moves in steps of 1e-4; at a learning rate of 1e-6 nearly every update of it would be
    rounded away. So updates add up in a float32 master copy, and the weight is that copy rounded. Weights that are
    float32 already are their own masters.

    Master, mean and mean square of the gradient are 12 bytes per weight, 101 GB for 8.4 billion. Each parameter is
    owned by one rank, which alone holds its state, updates it and sends the new weight to the others.
    (torch's ZeroRedundancyOptimizer shards alike, but loads its state in the weights' dtype, which would round the
    masters, and by number, which ties a saved state to the number of ranks.)
    """

    def __init__(self, named_parameters: dict[str, nn.Parameter]):
        """Every rank gives the same parameters under the same names, and holds the same weights."""
        self.parameters = named_parameters
        self.owners = assign_owners({name: p.numel() for name, p in named_parameters.items()}, dist.get_world_size())
        self.state = {}  # of the parameters that this rank owns
        for name, owner in self.owners.items():
            if owner == dist.get_rank():
                weight = named_parameters[name].detach()
                master = weight.float() if weight.dtype == torch.bfloat16 else weight
                self.state[name] = {
                    "master": master,
                    "exp_avg": torch.zeros_like(master),
                    "exp_avg_sq": torch.zeros_like(master),
                    "step": torch.zeros((), device=master.device),
                }

    @torch.no_grad()
    def step(self, lr: float, max_grad_norm: float) -> float:
        """Scale the gradients down to a global norm, update the weights, zero the gradients. Returns the norm before.

        The gradients are those that DistributedDataParallel leaves, the same on all ranks. Raises FloatingPointError,
        on all of them and with nothing changed, if the norm is infinite or not a number.
        """
        grads = {}
        for name, parameter in self.parameters.items():
            assert parameter.grad is not None, f"{name} has no gradient"
            grads[name] = parameter.grad
        grad_norm = global_norm(list(grads.values()))
        if not math.isfinite(grad_norm):
            raise FloatingPointError(f"the norm of the gradient is {grad_norm}")
        scale = min(1.0, max_grad_norm / (grad_norm + 1e-6))
        for name, state in self.state.items():
            master = state["master"]
            grad = grads[name].to(master.dtype).mul_(scale)  # one float32 gradient at a time
            moments = [state["exp_avg"]], [state["exp_avg_sq"]], []
            adamw(
                [master], [grad], *moments, [state["step"]],
                lr=lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, amsgrad=False, maximize=False, fused=True,
            )  # fmt: skip
            del grad
        self.send_weights()
        for grad in grads.values():
            grad.zero_()  # not None: it stays a view into DistributedDataParallel's buckets
        return grad_norm

    @torch.no_grad()
    def load_state(self, state: dict[str, dict[str, torch.Tensor]]) -> None:
        """Take over saved states by parameter name, those that this rank owns among them. send_weights is to follow.

        Raises ValueError for a state of another shape."""
        for name, own in self.state.items():
            for key, tensor in own.items():
                if state[name][key].shape != tensor.shape:  # copy_ would broadcast
                    raise ValueError(f"{name}: {key} is {[*state[name][key].shape]}, not {[*tensor.shape]}")
                tensor.copy_(state[name][key])

    @torch.no_grad()
    def send_weights(self) -> None:
        """Set the weights of all ranks to the masters, rounded to the weights' dtype."""
        for name, state in self.state.items():
            self.parameters[name].copy_(state["master"])  # where the weight is its own master, nothing moves
        weights = {name: parameter.detach() for name, parameter in self.parameters.items()}
        for sending in [dist.broadcast(weights[name], owner, async_op=True) for name, owner in self.owners.items()]:
            sending.wait()


def assign_owners(sizes: dict[str, int], world_size: int) -> dict[str, int]:
    """A rank for each parameter such that all ranks hold about as much: largest first, to the rank with the least."""
    held, owners = [0] * world_size, {}
    for name in sorted(sizes, key=lambda name: sizes[name], reverse=True):
        owners[name] = held.index(min(held))
        held[owners[name]] += sizes[name]
    return owners


def global_norm(tensors: list[torch.Tensor]) -> float:
    """The Euclidean norm over all elements of all tensors, in at least float32."""
    norms = [torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in tensors]
    return torch.linalg.vector_norm(torch.stack(norms)).item()
