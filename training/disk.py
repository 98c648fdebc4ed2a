"""Disk space of a run: what its checkpoints and resume states take, compared with what is free."""

from pathlib import Path

from infra.errors import InputError
from infra.files import free_bytes
from model.lora import lora_layers

SMALL_FILES = 20_000_000  # bytes of a checkpoint's processor, of metrics and of curves


def state_bytes(policy) -> int:
    """Return the bytes of a resume state: a float32 master and two moments of each trained weight."""
    return sum(12 * p.numel() for p in policy.parameters() if p.requires_grad)


def checkpoint_bytes(policy) -> int:
    """Return the bytes of a checkpoint's weights: all, or with LoRA the adapter's. Works on meta tensors too."""
    adapter = bool(lora_layers(policy))
    return sum(p.numel() * p.element_size() for p in policy.parameters() if p.requires_grad or not adapter)


def require_disk_space(out: Path, policy, checkpoint: bool = True, state: bool = True) -> int:
    """Return the bytes of the next save. Raises InputError if the disk has less room."""
    size = checkpoint * checkpoint_bytes(policy) + state * state_bytes(policy) + SMALL_FILES
    free = free_bytes(out)
    if free < size:
        raise InputError(
            f"{out}: the next save takes {size / 1e9:.2f} GB and {free / 1e9:.2f} GB are free; make room "
            "(--keep_last keeps fewer checkpoints), then continue with --resume"
        )
    return size


def check_disk_of_run(out: Path, policy, config: dict, step: int, checkpoints: int) -> None:
    """Print the disk space that the rest of the run takes. Add a warning if less is free.

    config: the run's settings. step: the step of the state that the run continues from, or 0. checkpoints: how many
    the run has on the disk. Raises InputError if not even the next save fits.
    """
    require_disk_space(out, policy)
    free, (more, states) = free_bytes(out), added_saves(config, step, checkpoints)
    checkpoint, state = checkpoint_bytes(policy) + SMALL_FILES, state_bytes(policy)
    needed = more * checkpoint + states * state
    short = "; this is too little: make room, lower --keep_last or raise --save_every" if free < needed else ""
    print(
        f"{out}: the run takes up to {needed / 1e9:.2f} GB more disk (checkpoints: {more} x {checkpoint / 1e9:.2f} GB, "
        f"resume states: {states} x {state / 1e9:.2f} GB), and {free / 1e9:.2f} GB are free{short}",
        flush=True,
    )


def added_saves(config: dict, step: int, checkpoints: int) -> tuple[int, int]:
    """Bound the numbers of checkpoints and resume states that a run adds to the disk at any time after `step`.

    See check_disk_of_run. While a run saves, it holds two states and one checkpoint more than --keep_last. If some
    checkpoints have no state of their step, it keeps one more (see save_run).
    """
    save_every, state_every = config["save_every"], config["save_state_every"]
    more, states = (-(-config["steps"] // every) - step // every for every in (save_every, state_every))
    if config["keep_last"]:
        kept = config["keep_last"] + 1 + (save_every % state_every > 0)
        more = min(more, max(0, kept - checkpoints))
    return more, min(states, 1 if step else 2)
