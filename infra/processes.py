"""Ranks: join, wait for each other, share values, end together; time of phases; errors for memory that runs out."""

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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from infra.errors import InputError
from infra.ownership import owning

# ---- join and wait ----

FAILED = "failed"  # key in the store: number of ranks that have failed
# Set by setup_distributed:
_launcher = None  # id of the process that started this rank, such as torchrun
_patient_group = None  # all ranks, with a timeout of days: for waits such as a download or a checkpoint of many GB
_store: dist.Store  # key-value pairs that the ranks share
_watcher: threading.Thread | None = None  # ends this rank once another rank has failed
_finished = threading.Event()  # set when this rank cannot fail any more; the watcher then ends


def setup_distributed(timeout: timedelta = timedelta(minutes=30)) -> tuple[int, int, torch.device]:
    """Join the ranks that torchrun started, or be the only rank. Returns rank, number of ranks and device.

    Each rank takes its own GPU. If this machine has fewer GPUs than ranks, all its ranks stay on the CPU. A collective
    of the training step that takes longer than `timeout` ends the run: some rank hangs.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    choose_kernels()
    if torch.cuda.device_count() >= local_size:
        device, backend = torch.device("cuda", local_rank), "nccl"
        torch.cuda.set_device(device)
    else:
        device, backend = torch.device("cpu"), "gloo"
        if local_rank == 0 and (short := _too_few_gpus()):
            print(f"{short}: running on the CPU", flush=True)
    global _launcher, _patient_group, _store, _watcher
    _store = _rendezvous(rank, world_size) if "RANK" in os.environ else dist.HashStore()
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
        disable_progress_bar()  # of transformers: those of rank 0 are enough
    return rank, world_size, device


def choose_kernels() -> None:
    """Turn off kernels of cuDNN that torch would use on a GPU. Training, evaluation and benchmarks call this first.

    cuDNN's attention returns NaN gradients if there is a mask, the number of keys is 64 modulo 128, and the logsumexp
    of a query's scores is below -88.7 (github.com/pytorch/pytorch/issues/196678). It also plans most new shapes for
    0.1 s or more, and nearly every step has a new shape. Both were seen on an H200 with torch 2.11: docs/speed.md.
    cuDNN's convolutions would round float32 to TF32, which has 10 bits.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cudnn.allow_tf32 = False


def _rendezvous(rank: int, world_size: int) -> dist.Store:
    """Open the key-value store that the environment names, under a prefix that has never been used.

    torchrun keeps the store when it restarts the ranks. A new rank may find the address of a dead rank in it and wait
    for that rank (github.com/pytorch/pytorch/issues/135712). So rank 0 sends each rank that is alive a new prefix.
    """
    store, _, _ = next(dist.rendezvous("env://", rank, world_size))
    mine = uuid.uuid4().hex
    if rank != 0:
        store.set(f"hello/{rank}", mine)
        prefix = store.get(f"welcome/{mine}").decode()  # waits until rank 0 answers this start of the rank
        store.set(f"{prefix}/{rank}", "here")
        return dist.PrefixStore(prefix, store)
    absent = set(range(1, world_size))
    while absent:
        for other in list(absent):
            if store.check([f"hello/{other}"]):  # from this start or an earlier one
                store.set(f"welcome/{store.get(f'hello/{other}').decode()}", mine)
            if store.check([f"{mine}/{other}"]):
                absent.remove(other)
        time.sleep(0.01)
    return dist.PrefixStore(mine, store)


def _require_same_device(rank: int, world_size: int, device: torch.device) -> None:
    """End all ranks with one line if some have a GPU and others do not: they would wait for each other."""
    _store.set(f"device/{rank}", device.type)
    devices = [_store.get(f"device/{other}").decode() for other in range(world_size)]
    if len(set(devices)) > 1:
        without = ", ".join(str(other) for other, name in enumerate(devices) if name == "cpu")
        message = f"no GPU for rank {without}, but one for each other rank; check nvidia-smi on all nodes"
        _end_all(f"{Path(sys.argv[0]).name}: error: {message}")


def _too_few_gpus() -> str | None:
    """Return a warning if this machine has GPUs, but fewer than ranks, else None."""
    gpus, ranks = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return f"{ranks} ranks, but {gpus} GPU(s)" if 0 < gpus < ranks else None


def require_gpu_each() -> None:
    """Raise SharedInputError if any machine has GPUs, but fewer than ranks: its ranks would run on the CPU."""
    warnings = [warning for warning in gather(_too_few_gpus()) if warning]
    if warnings:
        raise SharedInputError(
            f"{warnings[0]}; start one rank per GPU with --nproc_per_node, or set CUDA_VISIBLE_DEVICES= to use the CPU"
        )


def wait_for_all_ranks() -> None:
    """Wait until every rank has called this function, for up to seven days."""
    dist.barrier(group=_patient_group)


def on_rank_0(function):
    """Call `function` on rank 0 only, and return its result on every rank. The others wait, for up to seven days.

    If it raises InputError or OSError, every rank raises SharedInputError.
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


@contextmanager
def owning_together(files: list[Path]) -> Iterator[None]:
    """Inside `with`, rank 0 holds these owner files for all ranks. All ranks call this. Raises SharedInputError."""
    with ExitStack() as owned:
        on_rank_0(lambda: [owned.enter_context(owning(file)) for file in files])
        yield


class SharedInputError(InputError):
    """An InputError that all ranks raise at the same time."""


def gather(value) -> list:
    """Return the values of all ranks, in order of rank; only this value if there is no process group."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_patient_group)
    return values


# ---- end together ----


def finish_together(script: str, work, interrupted: Callable[[], str]) -> int:
    """Call `work` on this rank, then leave the process group. Returns the exit status: 1 after an error.

    The first rank that fails prints why: one line for a user mistake (InputError) or a refusal of the machine
    (OSError), a traceback for all other errors. The other ranks then end within seconds, wherever they are. After
    Ctrl-C, it prints what interrupted() returns.
    """
    try:
        work()
        wait_for_all_ranks()
    except SharedInputError as error:
        if dist.get_rank() == 0:
            _print_last_line(f"{script}: error: {error}")
        _leave()
        return 1
    except KeyboardInterrupt:
        _end_all(f"{script}: interrupted; {interrupted()}", status=130)
    except (InputError, OSError) as error:  # such as a clip that this rank alone cannot decode
        _end_all(f"{script}: error: {error}")
    except Exception as error:
        if isinstance(error, dist.DistError) or "onnection" in str(error):  # the other rank printed nothing
            reason = " ".join(str(error).split())[:300]
            _end_all(f"{script}: error: rank {dist.get_rank()} lost its connection; was another killed? ({reason})")
        _end_all(f"{traceback.format_exc()}{script}: error: rank {dist.get_rank()}: {type(error).__name__}: {error}")
    _leave()
    return 0


def _leave() -> None:
    """Leave the process group, after the watcher has ended.

    If the interpreter shut down while the watcher is in torch's C++ code, the process would abort (SIGABRT), and
    torchrun would report a complete run as failed.
    """
    _finished.set()
    if _watcher is not None:
        _watcher.join()
    dist.destroy_process_group()


def _end_all(message: str, status: int = 1) -> NoReturn:
    """End this rank at once, and with it the others, which may wait in a collective. The first to fail prints why."""
    try:
        first = _store.add(FAILED, 1) == 1
    except RuntimeError:
        first = True  # the store is gone, and with it the other ranks
    if first:
        _print_last_line(message)
    os._exit(status)


def _print_last_line(message: str) -> None:
    """Print the last line of a run, below the progress bars."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()  # ends its line
    sys.stdout.flush()
    rank = int(os.environ.get("RANK", 0))  # not dist.get_rank(): there may be no process group yet
    print("\n" * (rank != 0) + message, file=sys.stderr, flush=True)  # rank 0's bar does not end its line


def _end_with_the_others() -> None:
    """In a thread: end this rank once another rank has failed, even if this one hangs in a collective on a GPU."""
    while not _finished.wait(0.5):
        try:
            if _store.check([FAILED]) and not _finished.is_set():
                os._exit(1)
        except RuntimeError:
            return  # the store is gone; a collective or exit_if_abandoned will end this rank


def launchers() -> list[str]:
    """Identify the torchruns that started the ranks: none without torchrun, the same ones after they restart ranks."""
    mine = None
    if "TORCHELASTIC_RUN_ID" in os.environ:
        mine = f"{socket.gethostname()}:{_launcher}"
        # On Linux, field 22 is the start time of the process. It is needed, because process ids in containers repeat.
        stat = Path(f"/proc/{_launcher}/stat")
        mine += f":{stat.read_text(errors='replace').rpartition(')')[2].split()[19]}" if stat.exists() else ""
    return sorted({name for name in gather(mine) if name})


def exit_if_abandoned() -> None:
    """End this rank if its torchrun was killed: it must not write where a resumed run may be writing."""
    if "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != _launcher:
        print("torchrun is gone: exiting", file=sys.stderr, flush=True)
        os._exit(1)


def catch_sigterm() -> threading.Event:
    """Make SIGTERM, which announces the end of a job, only set an event. Returns the event."""
    announced = threading.Event()
    signal.signal(signal.SIGTERM, lambda signum, frame: announced.set())
    return announced


# ---- memory ----

# phase -> what makes it need less memory
LESS_MEMORY = {
    "loading the model": "use larger GPUs or --dtype bfloat16: each GPU holds all weights",
    "data": "lower --prompts_per_rank or --dynamic_sampling",
    "listen": "lower --prompts_per_rank or --dynamic_sampling",
    "sample": "lower --prompts_per_rank, --group_size or --max_new_tokens",
    "reference": "raise --accumulation_steps; with --beta 0 or --lora_rank there is no reference model",
    "train": "raise --accumulation_steps, lower --group_size or --max_new_tokens, use --gradient_checkpointing on",
    "update": "use more GPUs, which share the optimizer's state, or --lora_rank",
    "the held-out questions": "lower --prompts_per_rank or --max_new_tokens, or leave out --heldout",
    "the evaluation": "lower --batch_size, --samples or --max_new_tokens",
}
START = "use more or larger GPUs, --dtype bfloat16, --beta 0 or --lora_rank"


@contextmanager
def memory_errors(phase: str):
    """Inside `with`, turn an out-of-memory error into an InputError that names the phase and the flags that help."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        # The message is from torch's allocator, from CUDA or NCCL, which use the memory that torch leaves, or cuBLAS.
        message = str(error)
        on_gpu = "out of memory" in message or "ALLOC_FAILED" in message
        if not (on_gpu or isinstance(error, MemoryError) or "can't allocate memory" in message):
            raise
        remedy, reason = LESS_MEMORY.get(phase, START), " ".join(message.split())[:200]
        memory = "GPU memory" if on_gpu else "memory"
        raise InputError(f"out of {memory} in phase {phase!r}: {remedy} ({reason})") from None


# ---- measure ----


class Clock:
    """Measures wall-clock seconds of a step and its phases: `with clock("sample"): ...` adds to that phase."""

    def __init__(self, device: torch.device):
        self.device, self.started = device, time.perf_counter()
        self.phases: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str):
        started = time.perf_counter()
        with memory_errors(phase):
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # work that still runs on the GPU belongs to this phase
        self.phases[phase] += time.perf_counter() - started

    def total(self) -> float:
        return time.perf_counter() - self.started


def mean_over_ranks(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """Average each value over all ranks."""
    means = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    dist.all_reduce(means)
    return dict(zip(values, (means / dist.get_world_size()).tolist()))


def mean_length(mask: Tensor) -> float:
    """Return the mean number of True values in the rows of a mask [N, T], over all ranks. Each rank has N rows."""
    return mean_over_ranks({"length": mask.sum(dim=1).double().mean().item()}, mask.device)["length"]


def peak_memory_gb(device: torch.device) -> float:
    """Return the most memory that any rank has held so far, in 1e9 bytes: on its GPU, or else its resident set."""
    if device.type == "cuda":
        held = torch.cuda.max_memory_allocated(device)
    else:
        held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        held *= 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
    most = torch.tensor(held / 1e9, dtype=torch.float64, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return most.item()
