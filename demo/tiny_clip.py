"""The demo's CLIP: small, and pre-trained on captioned drawings by contrastive learning.

python -m demo.tiny_clip --output tiny-clip.pt     pre-train it again: minutes on two cores

The drawings show other people in other places than the demo's dataset. The captions are as weak as captions from the
web: they name none to two of the things that a person wears, and never shoes, patterns, hair or skin.
"""

import argparse
import math
import os
import random
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import clip
from demo import draw
from losses import contrastive_loss
from util.checkpoint import read_tensors, save
from util.device import ignore_interrupts, run_script, show_progress

WEIGHTS = Path(__file__).with_name("tiny-clip.pt")
IMAGE_SIZE = (128, 64)
PLACES = {"train": range(101, 201), "test": range(201, 301)}  # cameras; the demo's dataset has 1 to 4
EMPTY_SHARE = 0.06  # share of drawings without a person, so that the word "person" has a meaning
EMPTY_CAPTION = "A photo of an empty place"


def load(image_size: tuple[int, int] = IMAGE_SIZE, seed: int = 0) -> clip.CLIP:
    """Load the demo's CLIP, in eval mode.

    It was pre-trained with few words; the embeddings of the other words are random, drawn from the seed.
    Raises ValueError for an image size other than (128, 64).
    """
    if tuple(image_size) != IMAGE_SIZE:
        raise ValueError("the demo's CLIP needs images of 128x64: drop --image-size, or give --clip-weights random")
    model = clip.untrained("tiny", IMAGE_SIZE, seed)
    saved = read_tensors(WEIGHTS)
    embeddings = model.token_embedding.weight.detach().clone()  # (49408, T)
    embeddings[saved["words"]] = saved["model"]["token_embedding.weight"].float()
    model.load_state_dict({**saved["model"], "token_embedding.weight": embeddings})
    return model


def weak_caption(person: draw.Person | None, rng: random.Random) -> str:
    """Return a caption that names none to two of the things that a person wears."""
    if person is None:
        return EMPTY_CAPTION
    words = list(draw.describe(person).values())
    chosen = rng.sample(words, rng.randint(0, 2))
    return draw.caption(*(word for word in words if word in chosen))


class Drawings(torch.utils.data.Dataset):
    """Captioned drawings (uint8 image (3, 128, 64), caption), each of another person.

    split: "train" or "test", which have different people and places.
    """

    def __init__(self, count: int, seed: int, split: str = "train"):
        self.count, self.split = count, split
        self.name = f"pretraining {'seen' if split == 'train' else 'unseen'} {seed}"  # seeds the drawings

    def person(self, index: int) -> draw.Person | None:
        rng = random.Random(f"{self.name} person {index}")
        return None if rng.random() < EMPTY_SHARE else draw.random_person(rng)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        person = self.person(index)
        rng = random.Random(f"{self.name} picture {index}")
        image, _ = draw.draw_sample(person, rng.choice(PLACES[self.split]), rng)
        pixels = v2.functional.pil_to_tensor(image)
        return v2.functional.resize(pixels, IMAGE_SIZE, v2.InterpolationMode.BICUBIC), weak_caption(person, rng)

    def draw(self) -> tuple[Tensor, list[str]]:
        """Draw all of them: images (N, 3, 128, 64), captions."""
        images, captions = [], []
        workers = min(8, os.cpu_count())
        for batch, texts in DataLoader(self, 100, num_workers=workers, worker_init_fn=ignore_interrupts):
            images.append(batch)
            captions += texts
            show_progress(len(captions), self.count, "drawings")
        return torch.cat(images), captions


def pretrain(
    images: Tensor,
    captions: list[str],
    epochs: int = 6,
    batch_size: int = 128,
    lr: float = 1e-3,
    weight_decay: float = 0.02,
    seed: int = 1,
) -> clip.CLIP:
    """Train a small CLIP on uint8 images (N, 3, 128, 64) and captions."""
    model = clip.untrained("tiny", IMAGE_SIZE, seed).train()
    token_ids = clip.tokenize(captions)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=weight_decay, fused=True)
    steps = len(images) // batch_size  # per epoch; the last incomplete batch is dropped
    scheduler = OneCycleLR(optimizer, lr, total_steps=epochs * steps, pct_start=0.1)  # warm-up, then cosine decay
    generator = torch.Generator().manual_seed(seed)
    history = []
    for epoch in range(1, epochs + 1):
        for batch in torch.randperm(len(images), generator=generator).split(batch_size)[:steps]:
            image = model.encode_image(clip.normalize(images[batch])).embedding
            text = model.encode_text(token_ids[batch])
            loss = contrastive_loss(image, text, 1 / model.logit_scale.exp())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            model.logit_scale.data.clamp_(max=math.log(100))  # as in CLIP: the temperature stays at 0.01 or above
            history.append(loss.item())
            show_progress(len(history), epochs * steps, "steps")
        print(f"epoch {epoch}/{epochs}  loss {sum(history[-steps:]) / steps:.3f}")
    return model.eval()


@torch.inference_mode()
def zero_shot(model: clip.CLIP, drawings: Drawings) -> dict[str, float]:
    """Return two zero-shot accuracies: colour of the top (chance: 1/12), person or empty place (chance: 1/2)."""
    images, _ = drawings.draw()
    embeddings = torch.cat([model.encode_image(clip.normalize(batch)).embedding for batch in images.split(500)])

    def classify(captions: list[str]) -> list[int]:
        texts = model.encode_text(clip.tokenize(captions))
        return torch.cosine_similarity(embeddings[:, None], texts, dim=2).argmax(dim=1).tolist()  # (N,)

    people = [drawings.person(index) for index in range(len(drawings))]
    colours = list(draw.CLOTHES.values())
    tops = classify([draw.caption(f"{draw.COLOURS[colour]} top") for colour in colours])
    presence = classify([EMPTY_CAPTION, draw.caption()])
    correct_tops = [colours[i] == person.top for person, i in zip(people, tops) if person]
    correct_presence = [i == (person is not None) for person, i in zip(people, presence)]
    return {
        "colour of the top": sum(correct_tops) / len(correct_tops),
        "person or empty place": sum(correct_presence) / len(people),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="file to write the weights to")
    add("--images", type=int, default=8000, help="number of drawings to learn from (default: 8000)")
    add("--epochs", type=int, default=6, help="number of epochs (default: 6)")
    add("--batch-size", type=int, default=128, help="drawings per batch (default: 128)")
    add("--lr", type=float, default=1e-3, help="highest learning rate of AdamW (default: 1e-3)")
    add("--weight-decay", type=float, default=0.02, help="weight decay of AdamW (default: 0.02)")
    add("--seed", type=int, default=1, help="seed of drawings and weights (default: 1)")
    args = parser.parse_args(argv)
    if args.epochs < 1 or not 2 <= args.batch_size <= args.images:
        parser.error("--epochs must be at least 1, --batch-size at least 2 and at most --images")
    if not args.output.absolute().parent.is_dir():
        parser.error(f"--output: no folder {args.output.parent}")

    images, captions = Drawings(args.images, args.seed).draw()
    model = pretrain(images, captions, args.epochs, args.batch_size, args.lr, args.weight_decay, args.seed)
    test = Drawings(max(1, args.images // 8), args.seed, "test")
    accuracies = zero_shot(model, test)
    print(f"zero-shot accuracy on {len(test)} drawings of other people in other places:")
    for name, value in accuracies.items():
        print(f"  {name}: {value:.1%}")

    # Half precision, and only the word embeddings that were trained: 2 MB instead of 30.
    words = clip.tokenize(captions).unique()
    weights = {name: tensor.half() for name, tensor in model.state_dict().items()}
    weights["token_embedding.weight"] = weights["token_embedding.weight"][words].clone()
    about = {name: value for name, value in vars(args).items() if name != "output"}
    about |= {"torch": str(torch.__version__), "zero_shot": accuracies}
    save({"model": weights, "words": words, "about": about}, args.output)
    print(f"weights written to {args.output} ({args.output.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    run_script(main)
