"""Run `python bench.py gpu`: measure this project on one H100 or H200 within five minutes.

A part is a function part(tiny, save) that runs in a process of its own. It calls save(name=value, ...) as soon as it
knows a value. `save` prints the values and adds them to the part's results file, so a part that fails or runs out of
time keeps the values it has saved. A value is a number, a text, a list, a dict, or an entry of models.save_line. A part
that continues after an error saves it in a dict named `errors`, and counts as failed.
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks.card import card_part
from benchmarks.fidelity import bench_fidelity
from benchmarks.gpu_parts import decode_part, memory_part, step_part, train_part
from benchmarks.models import machine_name, results_path, versions
from infra.errors import InputError
from infra.files import check_folder, write_text
from infra.processes import choose_kernels

# name -> function, and its time limit in seconds; together five minutes. An H200 took 26, 28, 32, 8, 24 and 27 s.
PARTS: dict[str, tuple[Callable, int]] = {
    "card": (card_part, 45),
    "fidelity": (bench_fidelity, 60),
    "memory": (memory_part, 60),
    "decode": (decode_part, 35),
    "train": (train_part, 50),
    "step": (step_part, 50),
}
TINY_LIMIT = 900  # seconds: with --tiny, no part fails because the CPU is slow
UNFINISHED = "has not ended"


def bench_gpu(args: argparse.Namespace) -> None:
    """Run the parts one after the other. Print a table of all results in the folder. Exit status 1 if a part failed."""
    if args.tiny:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        raise InputError("gpu needs a GPU, and torch finds none; --tiny runs the parts on the CPU, on a small model")
    folder = Path(args.out) if args.out else results_path("gpu", machine_name())
    check_folder(folder)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("bench.py: ended by SIGTERM"))  # so that the part ends, too
    started = time.perf_counter()
    failed = [part for part in args.parts if not run_part(part, args.tiny, folder)]
    print(f"\n{table(folder)}\n\nresults: {folder}, after {time.perf_counter() - started:.0f} s", flush=True)
    if failed:
        sys.exit(f"bench.py: failed: {', '.join(failed)}")


def run_part(name: str, tiny: bool, folder: Path) -> bool:
    """Run a part, in its process and within its time limit. Return whether it succeeded."""
    function, limit = PARTS[name]
    path, limit = folder / f"{name}.json", TINY_LIMIT if tiny else limit
    path.unlink(missing_ok=True)
    print(f"\n{name}, at most {limit} s", flush=True)
    started = time.perf_counter()
    process = start(inside, function, tiny, path)
    try:
        process.join(limit)
        status = process.exitcode  # None: it still runs
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # also the processes that it started
        process.kill()
        process.join()
    result = {"error": UNFINISHED, "values": {}} | (json.loads(path.read_bytes()) if path.exists() else {})
    if status == 0:
        result["error"] = None
    elif status is None:
        result["error"] = f"ended at its time limit of {limit} s"
    elif result["error"] == UNFINISHED:
        result["error"] = f"ended with status {status}"
    result["seconds"] = time.perf_counter() - started
    write_text(path, json.dumps(result, indent=2) + "\n")
    return result["error"] is None


def start(function: Callable, *args) -> Any:
    """Start a process that calls function(*args): a fork of a server that has imported torch and transformers."""
    # Imports in the server must not initialize CUDA: a fork could not use it then.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    multiprocessing.set_forkserver_preload(["transformers.models.qwen2_audio.modeling_qwen2_audio"])
    process = multiprocessing.get_context("forkserver").Process(target=function, args=args)
    process.start()
    return process


def inside(part: Callable, tiny: bool, path: Path) -> None:
    """Run a part in this process. Write machine, versions and values to `path`."""
    os.setsid()  # a group of processes that run_part can end
    choose_kernels()
    if tiny:
        torch.set_num_threads(1)  # on such small tensors more threads are slower
    result: dict[str, Any] = {"machine": machine_name(), **versions(), "tiny": tiny, "error": UNFINISHED, "values": {}}

    def save(**values) -> None:
        result["values"] |= values
        write_text(path, json.dumps(result, indent=2) + "\n")
        print(*rows(values), sep="\n", flush=True)

    try:
        part(tiny, save)
        if errors := result["values"].get("errors"):
            raise RuntimeError(f"failed: {', '.join(errors)}")
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {error}"
        save()
        raise


def table(folder: Path) -> str:
    """Make the table of all results in a folder, also of earlier calls. See `rows`."""
    lines = []
    for part in PARTS:
        path = folder / f"{part}.json"
        if not path.exists():
            lines.append(f"{part}: no results")
            continue
        result = json.loads(path.read_bytes())
        about = [result.get("machine", "no machine"), f"{result.get('seconds', 0):.0f} s"]
        about += [f"{name} {result[name]}" for name in ("torch", "transformers", "date") if name in result]
        lines += [f"{part}: {', '.join(about)}", *rows(result["values"])]
        if result["error"]:
            lines.append(f"  FAILED: {result['error']}")
    return "\n".join(lines)


def rows(values: dict[str, Any], within: str = "") -> Iterator[str]:
    """Make a line of each value: name, value, unit, remark. In a dict, each value has a line; in a list, each item."""
    for key, value in values.items():
        name = f"{within}{key.replace('_', ' ')}"
        if isinstance(value, list):
            yield from (f"  {name} {number}: {brief(item)}" for number, item in enumerate(value, start=1))
        elif isinstance(value, dict) and "value" not in value:
            yield from rows(value, f"{name}, ")
        else:
            entry = value if isinstance(value, dict) else {"value": value, "unit": "", "remark": ""}
            yield f"  {name:<60} {brief(entry['value']):>12} {entry['unit']:<8} {entry['remark']}".rstrip()


def brief(value) -> str:
    """Format a value on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {brief(number)}" for name, number in value.items())
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.1f}"
    return str(value)
