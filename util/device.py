"""Device, precision, several processes (torchrun), progress lines, and errors in one line."""

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# A tensor, or a list or named tuple of them.
Batch = TypeVar("Batch", Tensor, list, tuple)


# -------------------------------------------------------------------------------------- device and precision


def setup(name: str | None = None, deterministic: bool = False) -> torch.device:
    """Return the device to compute on (default: cuda if available) and make it the current one.

    Under torchrun, each process takes its own GPU and joins the others. Only the first process prints. TF32 is switched
    off, so fp32 means full float32. Raises ValueError if the device cannot be used.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if "LOCAL_RANK" in os.environ:
        if name.startswith("cuda:"):
            raise ValueError(f"torchrun gives each process its own GPU: drop --device {name}")
        if name == "cuda":
            name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here ({one_line(error).split('. ')[0]})") from error
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    if "LOCAL_RANK" in os.environ:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        if rank() > 0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115, open until the process ends
    torch.set_float32_matmul_precision("highest")  # NVIDIA's containers enable TF32 with a variable
    torch.backends.cudnn.allow_tf32 = False
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return device


def default_precision(device: torch.device) -> str:
    """Return "bf16" on CUDA ("fp16" if a process's GPU only emulates bf16, like a T4), otherwise "fp32"."""
    if device.type != "cuda":
        return "fp32"
    has_bf16 = torch.tensor(int(torch.cuda.is_bf16_supported(including_emulation=False)))
    if world_size() > 1:
        dist.all_reduce(has_bf16, dist.ReduceOp.MIN)
    return "bf16" if has_bf16 else "fp16"


def default_workers(device: torch.device) -> int:
    """Return the number of loader processes: up to 8 on CUDA, otherwise 0: they would compete with the model."""
    if device.type != "cuda":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context in which a model computes in `precision`."""
    return torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "fp32")


# ------------------------------------------------------------------------------- several processes (torchrun)


def world_size() -> int:
    """Return the number of processes, 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, from 0. Process 0 prints and writes files."""
    return dist.get_rank() if dist.is_initialized() else 0


def distribute(model: nn.Module) -> nn.Module:
    """Wrap the model for training: processes share their gradients and batch statistics.

    Raises ValueError if a process has no GPU, which SyncBatchNorm needs.
    """
    if world_size() == 1:
        return model
    if next(model.parameters()).device.type != "cuda":
        raise ValueError("training with torchrun needs a GPU for each process: run python train.py instead")
    return nn.parallel.DistributedDataParallel(nn.SyncBatchNorm.convert_sync_batchnorm(model))


def gather(x: Batch) -> Batch:
    """Concatenate x (B, ...) of all processes: (world size * B, ...). A list or named tuple is gathered by element.

    Gradients flow to the rows of this process only. If all processes compute the same loss from all rows, the sum of
    their gradients is the gradient of that loss.
    """
    if world_size() == 1:
        return x
    if isinstance(x, list):
        return [gather(element) for element in x]
    if isinstance(x, tuple):
        return type(x)(*map(gather, x))
    own = x.detach().contiguous()
    parts = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(parts, own)
    parts[rank()] = x
    return torch.cat(parts)


def ignore_interrupts(worker_id: int) -> None:
    """Make a loader process ignore Ctrl-C, which the main process handles.

    SIGTERM keeps its default action: multiprocessing ends loader processes with it after an error of the main process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# -------------------------------------------------------------------------------------- progress and errors


def show_progress(done: int, total: int, what: str) -> None:
    """Print a progress line that overwrites itself, on terminals only."""
    if sys.stderr.isatty() and rank() == 0:
        end = "\r\033[K" if done == total else ""
        print(f"\r{done} of {total} {what}", end=end, file=sys.stderr, flush=True)


def one_line(error: Exception) -> str:
    """Return the beginning of an error's message in one line, to quote another library's error in ours."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def run_script(
    main: Callable[[], None],
    on_interrupt: str = "interrupted",
    on_out_of_memory: str = "see in nvidia-smi what else uses the GPU, or use --device cpu",
) -> None:
    """Run the main function of a script. Errors that a user can fix end in one line on stderr, without a traceback.

    These are OSError, ValueError, errors of loader processes, out of GPU memory and failures of torch.compile. The exit
    status is 1 after an error, 130 after Ctrl-C, and 141 if the output is closed (`| head`).
    """
    # Flush each line, also into a pipe, and escape characters of file names that the terminal cannot show.
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        try:
            main()
        except BaseException:
            end_loader_processes()
            raise
        if dist.is_initialized():
            dist.destroy_process_group()
    except KeyboardInterrupt:
        print(f"\n{on_interrupt}", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (OSError, ValueError, RuntimeError) as error:
        message = describe_error(error, on_out_of_memory)
        if message is None:
            raise
        if int(os.environ.get("RANK", 0)) > 0:
            time.sleep(5)  # if the first process failed too, its line is printed and torchrun ends this one
        sys.exit(f"error: {message}")


def end_loader_processes() -> None:
    """Terminate the loader processes after an error. torch would wait five seconds for each one."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report them as killed
    for process in multiprocessing.active_children():
        process.terminate()


def describe_error(error: Exception, on_out_of_memory: str) -> str | None:
    """Return one line about an error that a user can fix, or None for a programming error."""
    text = str(error).strip() or type(error).__name__
    # Messages of CUDA libraries. If memory is full, cuBLAS can also fail as "not initialized".
    signs = ("CUDA error: out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED")
    if isinstance(error, torch.OutOfMemoryError) or any(sign in text for sign in signs):
        return f"out of GPU memory ({torch.cuda.max_memory_allocated() / 2**30:.1f} GiB allocated): {on_out_of_memory}"
    if any(cls.__module__ == "torch._dynamo.exc" for cls in type(error).__mro__):
        return f"--compile failed ({one_line(error)}): drop --compile, or install a C compiler and Python's headers"
    if isinstance(error, RuntimeError) and not text.startswith("DataLoader worker"):
        return None
    # A ValueError without a `raise` statement, such as "too many values to unpack", is a programming error.
    lines = [frame.line for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, ValueError) and lines and not lines[-1].startswith("raise"):
        return None
    # A loader process puts its traceback before the message.
    return text.splitlines()[-1].removeprefix(f"{type(error).__name__}: ")
