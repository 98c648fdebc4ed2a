"""AdamW that keeps a float32 master copy of every bfloat16 weight."""

import torch
from torch import nn


class MasterAdamW:
    """AdamW without weight decay whose arithmetic is float32 whatever the weights' dtype.

    A bfloat16 weight near 0.02 moves in steps of 1e-4; at a learning rate of 1e-6 nearly every update of it would be
    rounded away. So updates add up in a float32 copy, and the weight is that copy rounded. Weights that are float32
    already are their own master.
    """

    def __init__(self, parameters: list[nn.Parameter]):
        self.parameters = parameters
        self.masters = [p.detach().float() if p.dtype == torch.bfloat16 else p for p in parameters]
        self.adamw = torch.optim.AdamW(self.masters, betas=(0.9, 0.999), weight_decay=0.0)

    def step(self, lr: float, max_grad_norm: float) -> float:
        """Clip the gradients to a global norm, update the weights, drop the gradients. Returns the norm before."""
        for group in self.adamw.param_groups:
            group["lr"] = lr
        for parameter, master in zip(self.parameters, self.masters):
            master.grad = parameter.grad if master is parameter else parameter.grad.float()
        grad_norm = nn.utils.clip_grad_norm_(self.masters, max_grad_norm)
        self.adamw.step()
        with torch.no_grad():
            for parameter, master in zip(self.parameters, self.masters):
                if master is not parameter:
                    parameter.copy_(master)
                parameter.grad = master.grad = None
        return grad_norm.item()
