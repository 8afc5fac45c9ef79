"""What the scripts run on: device and precision, one process or several (torchrun), progress, errors of one line."""

import argparse
import contextlib
import math
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# ------------------------------------------------------------------------------------------------- flags


def make_parser(script: str, description: str) -> argparse.ArgumentParser:
    """A parser whose help has one line a flag."""
    return argparse.ArgumentParser(
        usage=f"python {script} [flags]",
        description=f"{description} Defaults stand in brackets.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=35, width=120),
    )


def path(text: str) -> Path:
    """The type of a flag: ~ is the home folder, which the shell does not see in --flag=~/x; "" is refused."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text).expanduser()


def add_machine_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that the scripts share: where the data are and what to compute with."""
    add = parser.add_argument_group("machine").add_argument
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--data-root", type=path, default=Path("data"), metavar="DIR", help="folder of the datasets (%(default)s)")
    add("--device", default=device, help="cpu, cuda or cuda:1 (%(default)s)")
    add("--precision", choices=PRECISIONS, help="(fp32 on a CPU; on CUDA bf16, or fp16 if the GPU has no bf16)")
    add("--workers", type=int, metavar="N", help="loader processes (0 on a CPU, up to 8 on CUDA)")
    add("--eval-batch-size", type=int, default=128, metavar="N", help="pictures at a time when scoring (%(default)s)")


def check_device(args: argparse.Namespace) -> None:
    """Makes --device the current one. ValueError if it is not usable."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", args.device):
        raise ValueError(f"--device {args.device} is not usable here: only cpu, cuda, cuda:0, cuda:1 and so on are")
    device = torch.device(args.device)
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {args.device} is not usable here ({first_sentence(error)})") from error
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)


def check_machine_flags(args: argparse.Namespace) -> None:
    """Fills in --precision and --workers. ValueError for an impossible device, precision or number."""
    check_device(args)
    on_cpu = torch.device(args.device).type == "cpu"
    if args.workers is None:
        # On a CPU they would compete with the model.
        args.workers = 0 if on_cpu else min(8, count_cores() // processes_here())
    if args.precision is None:
        args.precision = "fp32" if on_cpu else best_cuda_precision()
    torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32
    if not 0 <= args.workers <= 256 or args.eval_batch_size < 1:
        raise ValueError("--workers must be at least 0 and at most 256, --eval-batch-size at least 1")
    if args.precision == "fp16" and on_cpu:
        raise ValueError("--precision fp16 needs CUDA: use fp32 or bf16")


def check_compile() -> None:
    """ValueError if --compile does not work here."""
    if world_size() > 1:
        raise ValueError("--compile does not go with torchrun: torch fails on SyncBatchNorm there (its issue 134182)")
    if not any(map(shutil.which, ("cc", "gcc", "clang", "cl"))):
        raise ValueError("--compile needs a C compiler, and none is on the PATH: install one, or drop --compile")


def check_output(flag: str, file: Path | None, suffix: str) -> None:
    """ValueError or FileNotFoundError, before any work, if no file of this name is to be written; None is no file."""
    if file is None:
        return
    if file.suffix != suffix:
        raise ValueError(f"{flag} {file}: give a name that ends in {suffix}")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"{flag} {file}: there is no folder {file.parent}")
    if file.is_dir():
        raise ValueError(f"{flag} {file} is a folder: give the name of a file")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise PermissionError(f"{flag} {file}: you may not write there")


def best_cuda_precision() -> str:
    """bf16 where the current GPU computes in it; an older one (a T4) only emulates it and gets fp16."""
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def count_cores() -> int:
    """Of those that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def cpu_warning(flops: float) -> str:
    """How long so many operations take on this CPU, by a matrix product, and why CUDA is not used."""
    a = torch.randn(1024, 1024)
    a @ a
    start = time.perf_counter()
    a @ a
    days = flops * (time.perf_counter() - start) / (2 * 1024**3) / 86400
    try:
        torch.zeros(1, device="cuda")
        why = "it is usable: drop --device cpu"
    except (RuntimeError, AssertionError) as error:
        why = first_sentence(error)
    return f"WARNING: training on a CPU, which will take about {days:.1f} days or more; CUDA: {why}"


def require_shared_memory(needed: int, advice: str) -> None:
    """ValueError if less than so many bytes of shared memory are free, where the system tells."""
    free = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else math.inf
    if needed > free:
        raise ValueError(f"{needed / 1e9:.1f} GB of shared memory are needed, {free / 1e9:.1f} GB are free: {advice}")


def ignore_interrupts(worker: int) -> None:
    """Make a loader process ignore Ctrl-C, which the main process handles.

    SIGTERM keeps its default: it is how multiprocessing ends the loader processes after an error of the main process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def autocast(args: argparse.Namespace) -> torch.autocast:
    """The context in which a model runs in --precision on --device."""
    dtype = PRECISIONS[args.precision]
    return torch.autocast(torch.device(args.device).type, dtype, enabled=dtype != torch.float32)


# ------------------------------------------------------------------------- one process, or several (torchrun)


def processes_here() -> int:
    """How many processes torchrun has started on this machine; 1 without torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def require_gpus(args: argparse.Namespace) -> None:
    """ValueError if torchrun has started more processes than there are GPUs for."""
    gpus = 0 if args.device == "cpu" else torch.cuda.device_count()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and processes_here() > gpus:
        raise ValueError(f"training takes a GPU for each process: {processes_here()} processes, {gpus} GPUs")


def join_processes(args: argparse.Namespace) -> None:
    """Under torchrun: meets the other processes, takes a GPU of its own, and falls silent unless it is the first.

    ValueError if --device names a certain GPU, or if there are fewer GPUs than processes.
    """
    if "LOCAL_RANK" not in os.environ:
        return
    if args.device not in ("cpu", "cuda"):
        raise ValueError(f"torchrun gives each process a GPU of its own: drop --device {args.device}")
    if args.device == "cuda":
        if processes_here() > torch.cuda.device_count():
            raise ValueError(f"{processes_here()} processes, {torch.cuda.device_count()} GPUs: lower --nproc_per_node")
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    dist.init_process_group("gloo" if args.device == "cpu" else "cpu:gloo,cuda:nccl")
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, for as long as the process lives


def leave_processes() -> bool:
    """Parts from the other processes; True for the first one, which goes on alone."""
    is_first = rank() == 0
    if dist.is_initialized():
        dist.destroy_process_group()
    return is_first


def world_size() -> int:
    """How many processes compute together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number among them, from 0 on; the first one prints and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def distribute(model: nn.Module) -> nn.Module:
    """The model as training calls it: with several processes, batch statistics and gradients are of all of them."""
    if world_size() == 1:
        return model
    return nn.parallel.DistributedDataParallel(nn.SyncBatchNorm.convert_sync_batchnorm(model))


def gather(x: Tensor) -> Tensor:
    """The rows of x (B, ...) of all processes, the first process's first: (world size * B, ...).

    Only a process's own rows carry gradient. If each computes the same loss from all rows, the sum of the processes'
    gradients is the gradient of that loss.
    """
    if world_size() == 1:
        return x
    own = x.detach().contiguous()
    parts = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(parts, own)
    parts[rank()] = x
    return torch.cat(parts)


def agree(number: int | None) -> int | None:
    """The largest of the processes' numbers, or None if none has one."""
    if world_size() == 1:
        return number
    largest = torch.tensor(number or 0)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.item() or None


# ------------------------------------------------------------------------------------- what a person sees


def say(line: str) -> None:
    """Prints; if nobody reads any more (`| tee` had the Ctrl-C, too), it is silent from now on, and no error."""
    try:
        print(line, flush=True)
    except OSError:
        fall_silent()


def fall_silent() -> None:
    """Standard output leads nowhere from now on."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def show_progress(done: int, total: int, what: str) -> None:
    """A line that overwrites itself, on terminals."""
    if sys.stderr.isatty() and rank() == 0:
        end = "\r\033[K" if done == total else ""
        print(f"\r{done} of {total} {what}", end=end, file=sys.stderr, flush=True)


def one_line(error: Exception) -> str:
    """The beginning of another library's message, fit to be part of ours."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def first_sentence(error: Exception) -> str:
    """Of another library's message: its advice, which follows, is not for our users."""
    return one_line(error).split(". ")[0]


@contextlib.contextmanager
def out_of_memory(advice: str) -> Iterator[None]:
    """Turns the GPU's out-of-memory error into a ValueError of one line that ends with this advice."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        peak = torch.cuda.max_memory_allocated() / 2**30
        raise ValueError(f"out of GPU memory, peak {peak:.1f} GiB: {advice}") from error


def exit_on_error(main: Callable[[], None]) -> None:
    """Runs a script; what a user can mend is one line on stderr and exit status 1, not a traceback.

    Ctrl-C is one line, too, and status 130. A reader that is gone (`| head`) has seen enough: silence, and status 141.
    """
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        fall_silent()
        sys.exit(141)
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker"):
            raise  # a programming error keeps its traceback
        if int(os.environ.get("RANK", 0)) > 0:
            time.sleep(5)  # by then torchrun has ended this process, if the first one failed and said so
        # A loader process wraps its error into a traceback, whose last line is the message.
        lines = str(error).strip().splitlines() or [type(error).__name__]
        sys.exit("error: " + lines[-1].removeprefix(f"{type(error).__name__}: "))
