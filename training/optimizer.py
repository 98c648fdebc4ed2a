"""AdamW with float32 master weights. Its state is sharded over the ranks (ZeRO stage 1, arXiv 1910.02054)."""

import math

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.adamw import adamw


class ShardedAdamW:
    """AdamW without weight decay that computes in float32 and splits its state over the ranks.

    bfloat16 weights near 0.02 are 1e-4 apart, so at a learning rate of 1e-6 nearly every update of a bfloat16 weight
    would be rounded away. Updates therefore add up in a float32 master copy, and the weight is that copy, rounded. A
    float32 weight is its own master.

    Master weight, mean gradient and mean squared gradient take 12 bytes per weight: 101 GB for 8.4 billion weights.
    Each parameter has one owner, the only rank that holds its state. The owner updates the parameter and sends it to
    the other ranks. (torch's ZeroRedundancyOptimizer also shards the state. But it loads the state in the weights'
    dtype, which would round the masters, and by position, which ties a saved state to the number of ranks.)
    """

    def __init__(self, named_parameters: dict[str, nn.Parameter]):
        """Give each parameter an owner and make this rank's state. Every rank passes the same names and weights."""
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

    def grad_norm(self) -> float:
        """Return the global norm of the gradients. DistributedDataParallel gives all ranks the same gradients."""
        return global_norm(list(self._grads().values()))

    @torch.no_grad()
    def step(self, lr: float, grad_scale: float) -> None:
        """Multiply the gradients by `grad_scale`, take one AdamW step, and set the gradients to zero."""
        grads = self._grads()
        for name, state in self.state.items():
            master = state["master"]
            grad = grads[name].to(master.dtype).mul_(grad_scale)  # one float32 gradient at a time
            moments = [state["exp_avg"]], [state["exp_avg_sq"]], []
            adamw(
                [master], [grad], *moments, [state["step"]],
                lr=lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, amsgrad=False, maximize=False, fused=True,
            )  # fmt: skip
            del grad
        self.send_weights()
        for grad in grads.values():
            grad.zero_()  # not None: the gradient stays a view into DistributedDataParallel's buckets

    def _grads(self) -> dict[str, torch.Tensor]:
        grads = {}
        for name, parameter in self.parameters.items():
            assert parameter.grad is not None, f"{name} has no gradient"
            grads[name] = parameter.grad
        return grads

    @torch.no_grad()
    def load_state(self, state: dict[str, dict[str, torch.Tensor]]) -> None:
        """Load this rank's share of a saved state. Call send_weights afterwards.

        state: of all parameters, by name. Raises ValueError if a shape differs.
        """
        for name, own in self.state.items():
            for key, tensor in own.items():
                if state[name][key].shape != tensor.shape:  # copy_ would broadcast
                    raise ValueError(f"{name}: {key} is {[*state[name][key].shape]}, not {[*tensor.shape]}")
                tensor.copy_(state[name][key])

    @torch.no_grad()
    def send_weights(self) -> None:
        """Set the weights of all ranks to their masters, rounded to the weights' dtype."""
        for name, state in self.state.items():
            self.parameters[name].copy_(state["master"])  # does nothing if the weight is its own master
        weights = {name: parameter.detach() for name, parameter in self.parameters.items()}
        for sending in [dist.broadcast(weights[name], owner, async_op=True) for name, owner in self.owners.items()]:
            sending.wait()


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that learn, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def clip_scale(grad_norm: float, max_grad_norm: float) -> float:
    """Return the factor, at most 1, that scales a gradient of norm `grad_norm` down to `max_grad_norm`.

    Raises FloatingPointError if the norm is infinite or NaN. Training stops before that, in Run.require_finite.
    """
    if not math.isfinite(grad_norm):
        raise FloatingPointError(f"the norm of the gradient is {grad_norm}")
    return min(1.0, max_grad_norm / (grad_norm + 1e-6))


def assign_owners(sizes: dict[str, int], world_size: int) -> dict[str, int]:
    """Give each parameter a rank so that all ranks hold about the same: largest first, to the rank with the least."""
    held, owners = [0] * world_size, {}
    for name in sorted(sizes, key=lambda name: sizes[name], reverse=True):
        owners[name] = held.index(min(held))
        held[owners[name]] += sizes[name]
    return owners


def global_norm(tensors: list[torch.Tensor]) -> float:
    """Return the Euclidean norm over all elements of all tensors, computed in at least float32."""
    norms = [torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in tensors]
    return torch.linalg.vector_norm(torch.stack(norms)).item()
