"""How the demo's CLIP learned its words: plain contrastive learning on captioned drawings, in minutes on two cores.

python -m extras.pretrain                 makes util/tiny-clip.pt again

The drawings are of other people in other places than the demo's. The captions are weak, as the web's are: none to two
words for what a person wears, and never shoes, patterns, hair or skin.
"""

import argparse
import math
import random

import torch
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import clip
import data
import losses
from util import demo, machine
from util.run import provenance, write_whole

IMAGE_SIZE = (128, 64)
PLACES = {"seen": range(101, 201), "unseen": range(201, 301)}  # the demo's cameras are 1 to 4
NOBODY = 0.06  # the share of pictures of places without anybody, so that "person" means something
EMPTY_PLACE = "A photo of an empty place"


def caption(person: demo.Person | None, rng: random.Random) -> str:
    """None to two of the words for a person."""
    if person is None:
        return EMPTY_PLACE
    words = list(demo.describe(person).values())
    chosen = rng.sample(words, rng.randint(0, 2))
    return demo.sentence(*(word for word in words if word in chosen))


class Drawings(torch.utils.data.Dataset):
    """Drawn pictures uint8 (3, 128, 64), each of somebody else, with captions; deterministic from `part` and seed.

    part: "seen", to learn from, or "unseen", to be tested on.
    """

    def __init__(self, count: int, seed: int, part: str = "seen"):
        self.count, self.seed, self.part = count, seed, part

    def person(self, index: int) -> demo.Person | None:
        """Who is in a picture."""
        rng = random.Random(f"pretraining {self.part} {self.seed} person {index}")
        return None if rng.random() < NOBODY else demo.random_person(rng)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        person = self.person(index)
        rng = random.Random(f"pretraining {self.part} {self.seed} picture {index}")
        picture, _ = demo.draw_sample(person, rng.choice(PLACES[self.part]), rng)
        pixels = v2.functional.pil_to_tensor(picture)
        return v2.functional.resize(pixels, IMAGE_SIZE, v2.InterpolationMode.BICUBIC), caption(person, rng)

    def draw(self) -> tuple[Tensor, list[str]]:
        """All of them: (N, 3, 128, 64), captions."""
        pictures, captions = [], []
        for images, texts in DataLoader(self, batch_size=100, num_workers=machine.count_cores()):
            pictures.append(images)
            captions += texts
            machine.show_progress(len(captions), self.count, "drawings")
        return torch.cat(pictures), captions


def pretrain(pictures: Tensor, captions: list[str], args: argparse.Namespace) -> tuple[clip.CLIP, list[float]]:
    """CLIP's own training: pictures uint8 (N, 3, H, W) and captions -> the model, the loss of each step."""
    model = clip.untrained("tiny", IMAGE_SIZE, args.seed).train()
    token_ids = clip.tokenize(captions)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=args.weight_decay, fused=True)
    batches = len(pictures) // args.batch  # in an epoch
    schedule = OneCycleLR(optimizer, args.lr, total_steps=args.epochs * batches, pct_start=0.1)  # warm-up and cosine
    generator = torch.Generator().manual_seed(args.seed)
    history = []
    for epoch in range(1, args.epochs + 1):
        for batch in torch.randperm(len(pictures), generator=generator).split(args.batch):
            if len(batch) < args.batch:
                break
            image = model.encode_image(clip.normalize(pictures[batch])).embedding
            text = model.encode_text(token_ids[batch])
            loss = losses.contrastive_loss(image, text, 1 / model.logit_scale.exp())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            model.logit_scale.data.clamp_(max=math.log(100))  # as CLIP: tau is at least 0.01
            history.append(loss.item())
            machine.show_progress(len(history), args.epochs * batches, "steps")
        print(f"epoch {epoch}/{args.epochs}  loss {sum(history[-batches:]) / batches:.3f}")
    return model.eval(), history


@torch.inference_mode()
def zero_shot(model: clip.CLIP, drawings: Drawings) -> dict[str, float]:
    """How often the right one of several sentences is the nearest: the top's and the legs' colour, person or nobody."""
    pictures, _ = drawings.draw()
    people = [drawings.person(index) for index in range(len(drawings))]
    images = torch.cat([model.encode_image(clip.normalize(batch)).embedding for batch in pictures.split(500)])

    def told_apart(who: list[int], sentences: list[list[str]], right: list[int]) -> float:
        """sentences[i] are those to choose from for picture who[i]."""
        texts = {text: model.encode_text(clip.tokenize(text))[0] for text in {t for row in sentences for t in row}}
        choices = torch.stack([torch.stack([texts[text] for text in row]) for row in sentences])  # (N, choices, D)
        best = torch.cosine_similarity(images[who].unsqueeze(1), choices, dim=2).argmax(dim=1)
        return (best == torch.tensor(right)).float().mean().item()

    somebody = [index for index, person in enumerate(people) if person]
    colours = list(demo.CLOTHES)
    tops = [[demo.sentence(f"{colour} top") for colour in colours]] * len(somebody)
    legs = [[demo.sentence(f"{colour} {people[i].legwear}") for colour in colours] for i in somebody]
    return {
        "colour of the top": told_apart(somebody, tops, [colours.index(demo.COLOURS[people[i].top]) for i in somebody]),
        "colour of the legs": told_apart(
            somebody, legs, [colours.index(demo.COLOURS[people[i].bottom]) for i in somebody]
        ),
        "person or empty place": told_apart(
            list(range(len(people))),
            [[EMPTY_PLACE, demo.sentence()]] * len(people),
            [int(person is not None) for person in people],
        ),
    }


def pack(model: clip.CLIP, captions: list[str]) -> tuple[dict[str, Tensor], Tensor]:
    """Weights in half precision, and the ids of the words of the captions: of the others' embeddings none is kept."""
    words = clip.tokenize(captions).unique()
    weights = {name: tensor.half() for name, tensor in model.state_dict().items()}
    weights["token_embedding.weight"] = weights["token_embedding.weight"][words].clone()
    return weights, words


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Every setting and its meaning."""
    parser = machine.make_parser("-m extras.pretrain", "Pre-train the demo's CLIP on captioned drawings.")
    add = parser.add_argument
    add("--output", type=machine.path, default=demo.TINY_CLIP, metavar="FILE.pt", help="the weights (%(default)s)")
    add("--pictures", type=int, default=8000, metavar="N", help="drawings to learn from (%(default)s)")
    add("--epochs", type=int, default=6, metavar="N", help="(%(default)s)")
    add("--batch", type=int, default=128, metavar="N", help="pictures and captions in a batch (%(default)s)")
    add("--lr", type=float, default=1e-3, metavar="X", help="of AdamW, with warm-up and cosine (%(default)s)")
    add("--weight-decay", type=float, default=0.02, metavar="X", help="of AdamW (%(default)s)")
    add("--seed", type=int, default=1, metavar="N", help="of drawings and weights (%(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    machine.check_output("--output", args.output, ".pt")
    if min(args.batch - 1, args.epochs, args.pictures // args.batch) < 1:
        raise ValueError("--epochs must be at least 1, --batch at least 2, and --pictures at least one batch")
    pictures, captions = Drawings(args.pictures, args.seed).draw()
    model, _ = pretrain(pictures, captions, args)
    figures = zero_shot(model, Drawings(1000, args.seed, "unseen"))
    print("on 1000 drawings that it has not seen (chance: 8%, 8%, 50%):")
    for name, value in figures.items():
        print(f"  {name}: {value:.1%} right")
    print(f"  temperature: {1 / model.logit_scale.exp().item():.3f}")
    weights, words = pack(model, captions)
    about = {**vars(args), **provenance("cpu"), "zero-shot": figures}
    del about["output"], about["command"]  # paths of this machine
    write_whole({"model": weights, "words": words, "about": about}, args.output)
    print(f"written to {args.output}: {args.output.stat().st_size / 1e6:.1f} MB, {len(words)} words")


if __name__ == "__main__":
    machine.exit_on_error(main)
