"""What a training run needs around its algorithm: processes, phase times, averages, memory."""

import os
import resource
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from errors import InputError
from policy import Prompt, completion_logprobs, load_policy

# ---- processes ----

FAILED = "failed"  # in the store: how many ranks have failed
# Set by setup_distributed:
_launcher = None  # id of the process that started this one
_patient_group = None  # of all ranks, for waits that have no right length: a download, a checkpoint of many GB
_store: dist.Store  # key-value pairs that the ranks share
_watcher: threading.Thread | None = None  # ends this process once another rank has failed
_finished = threading.Event()  # set when this rank has nothing left to do that could fail: the watcher ends


def setup_distributed(timeout: timedelta = timedelta(minutes=30)) -> tuple[int, int, torch.device]:
    """Join the processes that torchrun started, or be a single one. Returns rank, number of processes and device.

    Each process takes a GPU of its own; where this machine has fewer than processes, all of them stay on the CPU.
    A collective of the training step that lasts longer than `timeout` ends the run: some rank hangs.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if torch.cuda.device_count() >= local_size:
        device, backend = torch.device("cuda", local_rank), "nccl"
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # in float32, convolutions in float32 as well
    else:
        device, backend = torch.device("cpu"), "gloo"
        if local_rank == 0 and (short := _too_few_gpus()):
            print(f"{short}: running on the CPU", flush=True)
    global _launcher, _patient_group, _store, _watcher
    _store = _meet(rank, world_size) if "RANK" in os.environ else dist.HashStore()  # without torchrun: nobody to meet
    _require_same_device(rank, world_size, device)
    dist.init_process_group(
        backend,
        store=_store,
        rank=rank,
        world_size=world_size,
        device_id=device if device.type == "cuda" else None,
        timeout=timeout,
    )
    _launcher = os.getppid()
    _patient_group = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    if world_size > 1:
        _finished.clear()
        _watcher = threading.Thread(target=_end_with_the_others, daemon=True)
        _watcher.start()
    if rank != 0:
        disable_progress_bar()  # transformers' bars; one set of them is enough
    return rank, world_size, device


def _meet(rank: int, world_size: int) -> dist.Store:
    """The store of key-value pairs that the environment names, under a prefix that nobody has used before.

    torchrun keeps one store over its restarts, where a process may find the address of one that is dead and wait for
    it (github.com/pytorch/pytorch/issues/135712). So rank 0 answers every other rank that is alive with a new prefix.
    """
    store, _, _ = next(dist.rendezvous("env://", rank, world_size))
    mine = uuid.uuid4().hex
    if rank != 0:
        store.set(f"hello/{rank}", mine)
        prefix = store.get(f"welcome/{mine}").decode()  # waits for the answer to this very process
        store.set(f"{prefix}/{rank}", "here")
        return dist.PrefixStore(prefix, store)
    absent = set(range(1, world_size))
    while absent:
        for other in list(absent):
            if store.check([f"hello/{other}"]):  # of this start or of an earlier one
                store.set(f"welcome/{store.get(f'hello/{other}').decode()}", mine)
            if store.check([f"{mine}/{other}"]):
                absent.remove(other)
        time.sleep(0.01)
    return dist.PrefixStore(mine, store)


def _require_same_device(rank: int, world_size: int, device: torch.device) -> None:
    """End all ranks with one line if some have a GPU and others have none: they would wait for each other."""
    _store.set(f"device/{rank}", device.type)
    kinds = [_store.get(f"device/{other}").decode() for other in range(world_size)]
    if len(set(kinds)) > 1:
        without = ", ".join(str(other) for other, kind in enumerate(kinds) if kind == "cpu")
        message = f"no GPU of its own for rank {without}, and one for each other; look at nvidia-smi on all nodes"
        _end_all(f"{Path(sys.argv[0]).name}: error: {message}")


def _too_few_gpus() -> str | None:
    """What is said where this machine has GPUs, but fewer than processes."""
    gpus, processes = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return f"{processes} processes share {gpus} GPU(s)" if 0 < gpus < processes else None


def require_gpu_each() -> None:
    """Raise SharedInputError where a machine has GPUs, but fewer than processes, which therefore are on the CPU."""
    found = [said for said in gather(_too_few_gpus()) if said]
    if found:
        raise SharedInputError(
            f"{found[0]}; start one for each, with --nproc_per_node, or set CUDA_VISIBLE_DEVICES= to stay on the CPU"
        )


def wait_for_all_ranks() -> None:
    """Return once every rank is here, however long that takes."""
    dist.barrier(group=_patient_group)


def on_rank_0(function):
    """Call `function` on rank 0 alone, while the others wait however long it takes. Returns its result to every rank.

    An InputError or OSError of it is raised as SharedInputError on every rank.
    """
    if not dist.is_initialized():
        return function()
    outcome: list = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome = [function(), None]
        except (InputError, OSError) as error:
            outcome = [None, str(error)]
    dist.broadcast_object_list(outcome, group=_patient_group)
    result, failure = outcome
    if failure is not None:
        raise SharedInputError(failure)
    return result


class SharedInputError(InputError):
    """An InputError that all ranks raise together."""


def gather(value) -> list:
    """The values of all ranks, by rank; without processes that have joined, the value alone."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_patient_group)
    return values


def load_on_all_ranks(name_or_path: str, dtype: torch.dtype, device: torch.device):
    """load_policy on every rank, however much slower some node is. Raises SharedInputError if it fails on any."""
    loaded = failure = None
    try:
        with memory_errors("loading the model"):
            loaded = load_policy(name_or_path, dtype, device)
    except InputError as error:
        failure = str(error)
    failures = [reason for reason in gather(failure) if reason]
    if failures:
        raise SharedInputError(failures[0])
    return loaded


# ---- the end ----


def finish_together(script: str, work, interrupted: Callable[[], str]) -> int:
    """Call `work` on this rank and leave the process group in order. Returns the exit status: 1 after an error.
    `interrupted` says what is left after Ctrl-C.

    What ends a rank is printed once, by the first rank that it happens to: a user's mistake and what the machine
    refuses as one line, all else with its traceback. The other ranks then end within seconds, wherever they are.
    """
    try:
        work()
        wait_for_all_ranks()
    except SharedInputError as error:
        if dist.get_rank() == 0:
            _say(f"{script}: error: {error}")
        _leave()
        return 1
    except KeyboardInterrupt:
        _end_all(f"{script}: interrupted; {interrupted()}", status=130)
    except (InputError, OSError) as error:  # such as a clip that this rank alone cannot decode
        _end_all(f"{script}: error: {error}")
    except Exception as error:
        if isinstance(error, dist.DistError) or "onnection" in str(error):  # and the other rank said nothing
            reason = " ".join(str(error).split())[:300]
            _end_all(f"{script}: error: rank {dist.get_rank()} has lost the others; was one killed? ({reason})")
        _end_all(f"{traceback.format_exc()}{script}: error: rank {dist.get_rank()}: {type(error).__name__}: {error}")
    _leave()
    return 0


def _leave() -> None:
    """Leave the process group. The watcher ends first: a thread that is within torch's C++ code when the interpreter
    shuts down takes the process with it (SIGABRT), and torchrun would report a run that is complete as failed."""
    _finished.set()
    if _watcher is not None:
        _watcher.join()
    dist.destroy_process_group()


def _end_all(message: str, status: int = 1) -> NoReturn:
    """End this process at once, and the others, which may wait for it in a collective. The first to fail says why."""
    try:
        first = _store.add(FAILED, 1) == 1
    except RuntimeError:
        first = True  # nobody is left to ask
    if first:
        _say(message)
    os._exit(status)


def _say(message: str) -> None:
    """Print the last line of a run."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()  # leaves it as it is, and ends its line
    sys.stdout.flush()
    rank = int(os.environ.get("RANK", 0))  # also before the process group is there
    print("\n" * (rank != 0) + message, file=sys.stderr, flush=True)  # off the line of rank 0's bar


def _end_with_the_others() -> None:
    """In a thread: end this process once another rank has failed, even if it hangs in a collective on a GPU."""
    while not _finished.wait(0.5):
        try:
            if _store.check([FAILED]) and not _finished.is_set():
                os._exit(1)
        except RuntimeError:
            return  # the store is gone; collectives will fail, or exit_if_abandoned will tell


def launchers() -> list[str]:
    """The torchruns that started the ranks; empty without torchrun. The same after torchrun started them again."""
    mine = None
    if "TORCHELASTIC_RUN_ID" in os.environ:
        mine = f"{socket.gethostname()}:{_launcher}"
        stat = Path(f"/proc/{_launcher}/stat")  # of Linux; its field 22 is the start time: a container's ids repeat
        mine += f":{stat.read_text().rpartition(')')[2].split()[19]}" if stat.exists() else ""
    return sorted({name for name in gather(mine) if name})


def exit_if_abandoned() -> None:
    """End this process if torchrun was killed and it was not, before it writes where a resumed run may be writing."""
    if "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != _launcher:
        print("torchrun is gone: exiting", file=sys.stderr, flush=True)
        os._exit(1)


def catch_sigterm() -> threading.Event:
    """From now on SIGTERM, which announces the end of a job, only sets the event that is returned."""
    announced = threading.Event()
    signal.signal(signal.SIGTERM, lambda signum, frame: announced.set())
    return announced


class CompletionLogprobs(nn.Module):
    """policy.completion_logprobs as a module, because DistributedDataParallel watches a module's forward."""

    def __init__(self, model, checkpointing: bool):
        super().__init__()
        self.model, self.checkpointing = model, checkpointing

    def forward(self, prompt: Prompt, completions: Tensor, mask: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        return completion_logprobs(self.model, prompt, completions, mask, temperature, self.checkpointing)


def data_parallel(model, prompt: Prompt, checkpointing: bool) -> DistributedDataParallel:
    """The policy's completion_logprobs, with gradients that are averaged over the ranks and stored in the buckets they
    travel in.

    Two backward passes over `prompt`, any single one, bring DistributedDataParallel to the state it keeps: the first
    shows it the order of the gradients, by which it lays out its buckets anew, and the second makes the gradients
    views into those. Without this, gradients that are accumulated before the first exchange would take up their
    memory twice, and a resumed run's first step would add numbers up in another order than a run never interrupted.
    """
    ddp_model = DistributedDataParallel(CompletionLogprobs(model, checkpointing), gradient_as_bucket_view=True)
    tokens = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        ddp_model(prompt, tokens, torch.ones_like(tokens, dtype=torch.bool), 1.0)[0].sum().backward()
    model.zero_grad(set_to_none=False)
    return ddp_model


# ---- memory ----

# What makes a phase need less.
LESS_MEMORY = {
    "data": "lower --prompts_per_rank",
    "listen": "lower --prompts_per_rank",
    "sample": "lower --prompts_per_rank, --group_size or --max_new_tokens",
    "reference": "raise --accumulation_steps; --beta 0 or --lora_rank hold no reference",
    "train": "raise --accumulation_steps, lower --group_size or --max_new_tokens, use --gradient_checkpointing on",
    "update": "use more GPUs, which share the optimizer's state, or --lora_rank",
    "the held-out questions": "lower --prompts_per_rank or --max_new_tokens, or leave out --heldout",
    "the evaluation": "lower --batch_size, --samples or --max_new_tokens",
}
START = "use more or larger GPUs, --dtype bfloat16, --beta 0 or --lora_rank"


@contextmanager
def memory_errors(phase: str):
    """Inside `with`, running out of memory ends in an InputError that names the phase and the flags that help."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # of a GPU, torch.OutOfMemoryError
        said = str(error)  # torch's allocator, CUDA and NCCL, which live on what torch leaves over, or cuBLAS
        on_gpu = "out of memory" in said or "ALLOC_FAILED" in said
        if not (on_gpu or isinstance(error, MemoryError) or "can't allocate memory" in said):
            raise
        help, reason = LESS_MEMORY.get(phase, START), " ".join(said.split())[:200]
        where = "GPU memory" if on_gpu else "memory"
        raise InputError(f"out of {where} in phase {phase!r}: {help} ({reason})") from None


# ---- measuring ----


class Clock:
    """Wall-clock seconds of a step and of its phases: `with clock("sample"): ...` adds to that phase."""

    def __init__(self, device: torch.device):
        self.device, self.started = device, time.perf_counter()
        self.phases: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str):
        started = time.perf_counter()
        with memory_errors(phase):
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # what the phase left running on the GPU belongs to it
        self.phases[phase] += time.perf_counter() - started

    def total(self) -> float:
        return time.perf_counter() - self.started


def mean_over_ranks(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """The mean of each value over all ranks."""
    means = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    dist.all_reduce(means)
    return dict(zip(values, (means / dist.get_world_size()).tolist()))


def mean_length(mask: Tensor) -> float:
    """The mean number of tokens of completions with that mask [N, T], over all ranks, of which each has N."""
    return mean_over_ranks({"length": mask.sum(dim=1).double().mean().item()}, mask.device)["length"]


def peak_memory_gb(device: torch.device) -> float:
    """The most memory that any process has held so far, in 1e9 bytes: on its GPU or, without one, as resident set."""
    if device.type == "cuda":
        held = torch.cuda.max_memory_allocated(device)
    else:
        held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        held *= 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
    most = torch.tensor(held / 1e9, dtype=torch.float64, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return most.item()
