"""Train PromptSG as in section 5.1 of the paper.

python train.py --dataset msmt17 --backbone vit         the paper's run
python train.py --dataset synthetic --backbone tiny     the demo: no data, no download, no GPU
torchrun --nproc_per_node 4 train.py ...                several GPUs, which share each batch

A run is a directory with last.pt, log.jsonl (one line per epoch), args.json and curves.png. After
Ctrl-C, kill or a crash, the same command with --resume continues it after the last saved epoch. All
randomness is derived from the seed and the epoch, so a resumed run equals an uninterrupted one, bit
for bit (on CUDA with --deterministic).
"""

import argparse
import time
from pathlib import Path

import torch
from torch.optim.lr_scheduler import StepLR

import clip
import data
import evaluate
import losses
from demo import draw, tiny_clip
from model import COMPOSED_PROMPT, PromptSG, count_learnable, restore_model, tokenize_composed
from util import checkpoint
from util.curves import draw_curves
from util.device import (
    PRECISIONS,
    autocast,
    default_precision,
    default_workers,
    distribute,
    gather,
    rank,
    run_script,
    setup,
    show_progress,
    world_size,
)

CLIP_NAMES = {"vit": "ViT-B/16", "resnet": "RN50", "tiny": "tiny"}
TINY_DEFAULTS = {
    "epochs": 24, "decay_every": 20, "lr_visual": 4e-4, "lr_new": 2e-3, "batch_ids": 8, "image_size": (128, 64),
    "eval_every": 24,
}  # fmt: skip
# Flags that may differ when a run is resumed: where it runs, how long, how often it is evaluated.
FREE_FLAGS = ("data_root", "device", "workers", "output", "resume", "compile", "epochs", "eval_every")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="python train.py [flags]", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dataset", choices=data.FOLDERS, default="market1501", help="dataset to train on (default: market1501)")
    add("--data-root", default="data", help="directory of the datasets (default: data)")
    add("--backbone", choices=CLIP_NAMES, default="vit", help="CLIP ViT-B/16, CLIP RN50 or the demo's (default: vit)")
    add("--clip-weights", metavar="PATH", help="weight file or folder, or 'random' (default: download OpenAI's)")
    add("--output", help="run directory (default: runs/DATASET-BACKBONE)")
    add("--resume", action="store_true", help="continue the run in the run directory, if there is one")
    add("--seed", type=int, default=0, help="random seed (default: 0)")
    add("--device", help="cpu and cuda are tested; mps, xpu, ... may work (default: cuda if available, otherwise cpu)")
    add("--precision", choices=PRECISIONS, help="precision of training (default: bf16 on CUDA, otherwise fp32)")
    add("--workers", type=int, help="data loader processes (default: up to 8 on CUDA, otherwise 0)")
    add("--eval-every", type=int, default=10, help="epochs between two evaluations; 0: never (default: 10, tiny 24)")
    add("--compile", action="store_true", help="use torch.compile")
    add("--deterministic", action="store_true", help="bit for bit reproducible on CUDA too, and slower")

    add = parser.add_argument_group("section 5.1").add_argument
    add("--epochs", type=int, default=60, help="number of epochs (default: 60, tiny 24)")
    add("--batch-ids", type=int, default=16, help="identities per batch, P (default: 16, tiny 8)")
    add("--batch-images", type=int, default=4, help="images per identity, K (default: 4)")
    add("--image-size", type=int, nargs=2, default=(256, 128), help="height and width (default: 256 128, tiny 128 64)")
    add("--lr-visual", type=float, default=5e-6, help="learning rate of the visual encoder (default: 5e-6, tiny 4e-4)")
    add("--lr-new", type=float, default=5e-5, help="learning rate of the new modules (default: 5e-5, tiny 2e-3)")
    add("--decay-every", type=int, default=20, help="epochs between two learning rate decays (default: 20)")
    add("--decay-factor", type=float, default=0.1, help="factor of a learning rate decay (default: 0.1)")
    add("--supcon-weight", type=float, default=0.5, help="lambda in Eq. 10 (default: 0.5)")
    add("--composed-prompt", default=COMPOSED_PROMPT, help="prompt of section 4.1 (default: 'A photo of a S* person')")

    add = parser.add_argument_group("not in the paper: our choice (docs/choices.md)").add_argument
    add("--temperature", type=float, help="tau in Eqs. 5 and 6 (default: CLIP's own, 0.01 in OpenAI's weights)")
    add("--margin", type=float, default=0.3, help="triplet margin m in Eq. 9 (default: 0.3)")
    add("--label-smoothing", type=float, default=0.1, help="label smoothing of the ID loss (default: 0.1)")
    add("--weight-decay", type=float, default=1e-4, help="weight decay of Adam (default: 1e-4)")

    add = parser.add_argument_group("rows of Tables 2 to 5").add_argument
    add("--baseline", action="store_true", help="Table 2: visual encoder with ID and triplet loss only")
    add("--without-i2t", action="store_true", help="Table 3 b: no image-to-text SupCon loss")
    add("--without-t2i", action="store_true", help="Table 3 c: no text-to-image SupCon loss")
    add("--without-interaction", action="store_true", help="Table 3 d, Table 5 row 1: no interaction module")
    prompts = ("composed", "simplified")
    add("--train-prompt", choices=prompts, default="composed", help="Table 4: training prompt (default: composed)")
    add("--blocks", type=int, choices=(0, 1, 2), default=2, help="Table 5: blocks of the module (default: 2)")

    args = parser.parse_args(argv)
    if args.backbone == "tiny":
        parser.set_defaults(**TINY_DEFAULTS)
        args = parser.parse_args(argv)  # parse again, so that a flag given by the user wins over the demo's default
    args.image_size = tuple(args.image_size)
    args.output = args.output or f"runs/{args.dataset}-{args.backbone}"
    if min(args.batch_ids, args.batch_images) < 2:
        parser.error("--batch-ids and --batch-images must be at least 2: a triplet needs two identities of two images")
    if min(args.epochs, args.decay_every) < 1:
        parser.error("--epochs and --decay-every must be at least 1")
    if args.backbone == "tiny" and args.clip_weights not in (None, "random"):
        parser.error("--backbone tiny has its own weights: drop --clip-weights, or give random")
    for name in ("lr_visual", "lr_new", "decay_factor", "weight_decay", "supcon_weight", "eval_every"):
        if not getattr(args, name) >= 0:
            parser.error(f"--{name.replace('_', '-')} must be at least 0")
    if args.temperature is not None and not args.temperature > 0:
        parser.error("--temperature must be above 0")
    if any(side < 16 or side % 16 for side in args.image_size):
        parser.error("--image-size must be two multiples of 16: a patch has 16x16 pixels")
    tokenize_composed(args.composed_prompt)  # raises ValueError before anything is downloaded
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    folder = Path(args.output)
    device = setup(args.device, args.deterministic)  # under torchrun: joins the other processes
    precision = args.precision or default_precision(device)
    workers = default_workers(device) if args.workers is None else args.workers
    if device.type == "cpu" and args.backbone != "tiny":
        print("no GPU: this will take days (the demo: --dataset synthetic --backbone tiny)")
    if not args.resume:
        checkpoint.refuse_taken(folder)

    # Data: batches of P identities x K images.
    if args.dataset == "synthetic":
        draw.draw_dataset(Path(args.data_root) / "synthetic")  # only if it is not there yet
    subsets = ("train", "query", "gallery") if args.eval_every else ("train",)
    dataset = data.load_dataset(args.dataset, args.data_root, subsets)
    print(data.summary(dataset))
    pids = [sample.pid for sample in dataset.train]
    sampler = data.PKSampler(pids, args.batch_ids, args.batch_images, args.seed, rank(), world_size())
    loader = data.train_loader(dataset.train, sampler, args.image_size, workers, pin_memory=device.type == "cuda")

    # The checkpoint to resume from, if there is one.
    settings = {**vars(args), "precision": precision}
    defaults = vars(parse_args(["--backbone", args.backbone]))  # of flags that an older checkpoint lacks
    digest = data.digest(dataset.train)
    resumed = checkpoint.find_run(folder, settings, defaults, FREE_FLAGS, digest) if args.resume else None

    # Model: CLIP and the new modules around it.
    if resumed:
        model = restore_model(resumed)  # a checkpoint is complete: no weights are downloaded
    else:
        if args.clip_weights == "random":
            clip_model = clip.untrained(CLIP_NAMES[args.backbone], args.image_size, args.seed)
        elif args.backbone == "tiny":
            clip_model = tiny_clip.load(args.image_size)
        else:
            name = CLIP_NAMES[args.backbone]
            clip_model = clip.load(args.clip_weights or name, args.image_size, architecture=name)
        torch.manual_seed(args.seed)
        model = PromptSG(
            clip_model,
            dataset.num_identities,
            blocks=args.blocks,
            interaction=not (args.baseline or args.without_interaction),
            inversion=not (args.baseline or args.train_prompt == "simplified"),
            composed_prompt=args.composed_prompt,
        )
        checkpoint.start_run(folder, {**settings, **clip_model.source}, device)
    model.to(device, memory_format=torch.channels_last)
    print(f"{count_learnable(model) / 1e6:.1f}M learnable parameters; {args.backbone} on {device}, {precision}")

    # SupCon (Eqs. 4 to 6): temperature and directions. Training with the simplified prompt has no SupCon (Table 4).
    temperature = model.temperature if args.temperature is None else args.temperature
    dropped = {"i2t": args.without_i2t, "t2i": args.without_t2i}  # Table 3 b and c
    directions = [name for name in dropped if model.inversion and not dropped[name]]

    # Optimizer (section 5.1): Adam with two learning rates, multiplied by 0.1 every 20 epochs.
    groups = model.parameter_groups(args.lr_visual, args.lr_new)
    fused = device.type in ("cpu", "cuda", "mps", "xpu")  # where torch has a fused Adam
    optimizer = torch.optim.Adam(groups, weight_decay=args.weight_decay, fused=fused)
    scheduler = StepLR(optimizer, args.decay_every, args.decay_factor)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    # Resume, or evaluate CLIP before training, while the new modules are still random.
    log, first_epoch = [], 1
    if resumed:
        optimizer.load_state_dict(resumed["optimizer"])
        scheduler.load_state_dict(resumed["scheduler"])
        scaler.load_state_dict(resumed["scaler"])
        log, first_epoch = resumed["log"], resumed["epoch"] + 1
        print(f"resumed after epoch {resumed['epoch']}")
        del resumed  # free the memory
    elif args.eval_every:
        result = evaluate.evaluate(model, dataset, "none", workers)
        print(f"CLIP before training: {evaluate.describe(result)}")
        log.append({"epoch": 0, "mAP": result["mAP"], "rank1": result["rank1"]})

    # Under torchrun: DistributedDataParallel, with batch normalisation over all processes.
    forward = distribute(model)
    if args.compile:
        forward = torch.compile(forward)

    saved_at = time.monotonic()
    for epoch in range(first_epoch, args.epochs + 1):
        model.train()
        sampler.set_epoch(epoch)
        torch.manual_seed(1000 * args.seed + epoch)  # unused so far; resuming stays exact if you add dropout
        history = []  # the terms of each step, kept on the device to avoid a synchronisation at every step
        start = time.perf_counter()

        for step, (images, labels) in enumerate(loader, 1):
            # Forward. The losses need the whole batch, so several processes gather their outputs.
            images = clip.normalize(images.to(device, non_blocking=True))  # (B, 3, H, W)
            labels = labels.to(device, non_blocking=True)  # (B,)
            with autocast(device, precision):
                output = forward(images)
            output, labels = gather(output), gather(labels)

            # Losses. The triplet loss is summed over z and three states of the encoder (section 4.3).
            triplet = sum(losses.triplet_loss(x, labels, args.margin) for x in output.triplet_features)  # Eq. 9
            identity = losses.identity_loss(output.logits, labels, args.label_smoothing)  # Eq. 8
            supcon = losses.supcon_loss(output.image, output.text, labels, temperature, directions)  # Eqs. 4-6
            loss = triplet + identity + args.supcon_weight * supcon  # Eq. 10

            # Step. DistributedDataParallel averages the gradients of the processes; we need their sum.
            optimizer.zero_grad()
            scaler.scale(loss * world_size()).backward()
            scaler.step(optimizer)
            scaler.update()

            # Terms, for the printed line and log.jsonl. Those named loss* are drawn in curves.png too.
            accuracy = (output.logits.argmax(dim=1) == labels).float().mean()
            terms = dict(loss=loss, loss_triplet=triplet, loss_id=identity, loss_supcon=supcon, accuracy=accuracy)
            history.append(torch.stack([term.detach() for term in terms.values()]))
            if step % 20 == 0 or step == len(loader):
                check_finite(torch.stack(history), list(terms), epoch)
                show_progress(step, len(loader), f"steps of epoch {epoch}")

        # Log.
        seconds = time.perf_counter() - start
        means = dict(zip(terms, torch.stack(history).mean(dim=0).tolist()))
        speed = len(history) * args.batch_ids * args.batch_images / seconds
        lr = scheduler.get_last_lr()[-1]  # of the new modules
        log.append({"epoch": epoch, **means, "lr": lr, "seconds": seconds, "images_per_second": speed})
        scheduler.step()
        line = "  ".join(f"{name.removeprefix('loss_')} {value:.3f}" for name, value in means.items())
        left = f"{round((args.epochs - epoch) * seconds / 60, 1):g} min left"
        print(f"epoch {epoch}/{args.epochs}  {line}  {speed:.0f} images/s  {left}")

        # Evaluate before saving, so that a checkpoint never lacks the result of its own epoch.
        is_last = epoch == args.epochs
        is_evaluated = args.eval_every > 0 and (is_last or epoch % args.eval_every == 0)
        if is_evaluated:
            result = evaluate.evaluate(model, dataset, workers=workers)
            print(f"epoch {epoch}, {model.default_prompt} prompt: {evaluate.describe(result)}")
            log[-1] |= {"mAP": result["mAP"], "rank1": result["rank1"]}

        # Save after an evaluation, after the last epoch, and if the last save is over a minute old.
        checkpoint.write_log(log, folder / "log.jsonl")
        if is_last or is_evaluated or time.monotonic() - saved_at > 60:
            state = {
                "args": settings,
                "model_args": model.model_args,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
                "scaler": scaler.state_dict(),
                "epoch": epoch,
                "log": log,
                "train_digest": digest,
            }
            checkpoint.save(state, folder / "last.pt")  # to a temporary file, then renamed
            saved_at = time.monotonic()

    # Summary, with the other prompt of section 4.3.
    if rank() == 0:
        draw_curves(log, folder / "curves.png")
    print(f"training time (Table 6): {sum(record.get('seconds', 0) for record in log):.0f} s, without evaluation")
    if args.eval_every and "mAP" in log[0] and "mAP" in log[-1]:
        line = f"mAP {log[0]['mAP']:.1%} (CLIP before training) -> {log[-1]['mAP']:.1%} {model.default_prompt}"
        if model.default_prompt == "composed":
            line += f", {evaluate.evaluate(model, dataset, 'simplified', workers)['mAP']:.1%} simplified"
        print(line)
    if device.type == "cuda":
        allocated, reserved = torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30
        print(f"peak GPU memory: {allocated:.1f} GiB allocated, {reserved:.1f} GiB reserved")
    print(f"evaluate this model: python evaluate.py --checkpoint {folder / 'last.pt'}")


def check_finite(history: torch.Tensor, names: list[str], epoch: int) -> None:
    """Raise ValueError, with epoch and step, if a term in history (steps, terms) is NaN or infinite."""
    finite = history.isfinite().cpu()
    if not finite.all():
        step = finite.all(dim=1).tolist().index(False)
        bad = ", ".join(name for name, is_finite in zip(names, finite[step]) if not is_finite)
        raise ValueError(
            f"{bad} not finite in epoch {epoch}, step {step + 1}: start a new run with lower --lr-visual and --lr-new, "
            "or with another --precision than fp16"
        )


if __name__ == "__main__":
    run_script(
        main,
        on_interrupt="interrupted; the same command with --resume continues after the last saved epoch",
        on_out_of_memory="see in nvidia-smi what else uses the GPU; --precision bf16 needs less memory than fp32, and "
        "so do fewer --batch-ids, which changes the method",
    )
