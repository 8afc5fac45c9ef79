"""What the scripts run on: device, precision, several processes (torchrun), progress, errors in one line."""

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

    Under torchrun, each process takes a GPU of its own, joins the others, and prints nothing unless it is the first.
    TF32 is switched off, so that fp32 means fp32. Raises ValueError if the device cannot be used.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if "LOCAL_RANK" in os.environ:
        if name.startswith("cuda:"):
            raise ValueError(f"torchrun gives each process a GPU of its own: drop --device {name}")
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
    torch.set_float32_matmul_precision("highest")  # NVIDIA's containers allow TF32 by an environment variable
    torch.backends.cudnn.allow_tf32 = False
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return device


def default_precision(device: torch.device) -> str:
    """Return bf16 on CUDA (fp16 if one of the GPUs only emulates bf16, as a T4 does), otherwise fp32."""
    if device.type != "cuda":
        return "fp32"
    has_bf16 = torch.tensor(int(torch.cuda.is_bf16_supported(including_emulation=False)))
    if world_size() > 1:
        dist.all_reduce(has_bf16, dist.ReduceOp.MIN)
    return "bf16" if has_bf16 else "fp16"


def default_workers(device: torch.device) -> int:
    """Return the number of loader processes: up to 8 on CUDA; 0 elsewhere, where they would slow down the model."""
    if device.type != "cuda":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context in which a model computes in `precision`."""
    return torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "fp32")


# ------------------------------------------------------------------------------- several processes (torchrun)


def world_size() -> int:
    """Return the number of processes that compute together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, from 0; the first one prints and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def distribute(model: nn.Module) -> nn.Module:
    """Return the model as training calls it: gradients and batch statistics are shared by all processes.

    Raises ValueError without a GPU for each process, which torch's SyncBatchNorm needs.
    """
    if world_size() == 1:
        return model
    if next(model.parameters()).device.type != "cuda":
        raise ValueError("training with torchrun needs a GPU for each process: run python train.py instead")
    return nn.parallel.DistributedDataParallel(nn.SyncBatchNorm.convert_sync_batchnorm(model))


def gather(x: Batch) -> Batch:
    """Concatenate the rows of x (B, ...) of all processes: (world size * B, ...). Lists and tuples element by element.

    Only the rows of this process carry a gradient. If every process computes the same loss from all rows, the sum of
    the processes' gradients is the gradient of that loss.
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

    SIGTERM keeps its default: it is how multiprocessing ends the loader processes after an error of the main process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# -------------------------------------------------------------------------------------- progress and errors


def show_progress(done: int, total: int, what: str) -> None:
    """Print a progress line that overwrites itself, on terminals only."""
    if sys.stderr.isatty() and rank() == 0:
        end = "\r\033[K" if done == total else ""
        print(f"\r{done} of {total} {what}", end=end, file=sys.stderr, flush=True)


def one_line(error: Exception) -> str:
    """Return the beginning of another library's message, to be part of ours."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def run_script(
    main: Callable[[], None],
    on_interrupt: str = "interrupted",
    on_out_of_memory: str = "see in nvidia-smi what else uses the GPU, or use --device cpu",
) -> None:
    """Run the main function of a script; end with one line on stderr instead of a traceback if a user can fix it.

    These are OSError, ValueError, an error of a loader process, out of GPU memory and a failing torch.compile. The
    exit status is 1; 130 after Ctrl-C, and 141 if nobody reads the output any more (`| head`).
    """
    # Print each line at once, also into a pipe, and escape file names that the terminal cannot show.
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
            time.sleep(5)  # torchrun ends this process before, if the first one failed too and printed its line
        sys.exit(f"error: {message}")


def end_loader_processes() -> None:
    """Terminate the loader processes after an error. torch would wait five seconds for each of them."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report them as killed
    for process in multiprocessing.active_children():
        process.terminate()


def describe_error(error: Exception, on_out_of_memory: str) -> str | None:
    """Return one line about an error that a user can fix, or None for a programming error."""
    text = str(error).strip() or type(error).__name__
    # Signs of other libraries. Out of memory, cuBLAS may be "not initialized" too.
    signs = ("CUDA error: out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED")
    if isinstance(error, torch.OutOfMemoryError) or any(sign in text for sign in signs):
        return f"out of GPU memory ({torch.cuda.max_memory_allocated() / 2**30:.1f} GiB allocated): {on_out_of_memory}"
    if any(cls.__module__ == "torch._dynamo.exc" for cls in type(error).__mro__):
        return f"--compile failed ({one_line(error)}): drop --compile, or install a C compiler and Python's headers"
    if isinstance(error, RuntimeError) and not text.startswith("DataLoader worker"):
        return None
    # A ValueError that no `raise` statement raised ("too many values to unpack") is a mistake in the code.
    lines = [frame.line for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, ValueError) and lines and not lines[-1].startswith("raise"):
        return None
    # A loader process puts its traceback before the message.
    return text.splitlines()[-1].removeprefix(f"{type(error).__name__}: ")
