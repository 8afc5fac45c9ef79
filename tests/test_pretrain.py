"""The demo's CLIP: what it learns from, that it learns, what lies in util/tiny-clip.pt."""

import random

import pytest
import torch
from conftest import refused, run

import clip
import model
import train
from extras import pretrain
from util import demo


def people_of_the_demo(seed: int) -> list[demo.Person]:
    distractors = [demo.random_person(random.Random(f"{seed} distractor {number}")) for number in range(160)]
    return [demo.person_of(pid, seed) for pid in range(1, 321)] + distractors


def test_it_learns_from_other_people_in_other_places():
    """Neither the demo's (seed 0) nor the ablation's (from 1000 on); what it is tested on is different again."""
    parts = {}
    for part in ("seen", "unseen"):
        drawings = pretrain.Drawings(8000 if part == "seen" else 1000, 1, part)
        parts[part] = {drawings.person(i)._replace(build=0) for i in range(len(drawings)) if drawings.person(i)}
    demos = {person._replace(build=0) for seed in (0, 1000, 1001, 1002) for person in people_of_the_demo(seed)}
    assert len(parts["seen"]) > 7000 and not parts["seen"] & demos
    assert not parts["unseen"] & demos and not parts["unseen"] & parts["seen"]
    assert not set(pretrain.PLACES["seen"]) & {1, 2, 3, 4, *pretrain.PLACES["unseen"]}


def test_captions_are_weak():
    """None to two words of what is there; never shoes, patterns, hair or skin; some places are empty."""
    drawings = pretrain.Drawings(500, 0)
    counts = []
    for index in range(len(drawings)):
        person = drawings.person(index)
        text = pretrain.caption(person, random.Random(index))
        if person is None:
            assert text == pretrain.EMPTY_PLACE
            continue
        words = text.removeprefix("A photo of a person").removeprefix(" with ").split(", ") if " with " in text else []
        assert set(words) <= set(demo.describe(person).values())
        counts.append(len(words))
    assert set(counts) == {0, 1, 2} and 0.03 < 1 - len(counts) / 500 < 0.1


def test_a_few_steps_of_pretraining_tell_words_apart():
    """With a caption that names every top: the loss falls, and tops of people not seen are told apart (chance 8%)."""
    args = pretrain.parse_args(["--pictures", "800", "--batch", "32", "--epochs", "3"])
    drawings = pretrain.Drawings(args.pictures, args.seed)
    pictures, _ = drawings.draw()
    people = map(drawings.person, range(args.pictures))
    captions = [demo.sentence(demo.describe(person)["top"]) if person else pretrain.EMPTY_PLACE for person in people]
    model, losses = pretrain.pretrain(pictures, captions, args)
    assert sum(losses[-10:]) < sum(losses[:10]) - 10
    assert pretrain.zero_shot(model, pretrain.Drawings(200, args.seed, "unseen"))["colour of the top"] > 0.2


def test_the_weights_in_the_repository():
    """Small, made by one run of the script as it stands, and they know what they say they know."""
    assert demo.TINY_CLIP.stat().st_size < 3e6
    about = torch.load(demo.TINY_CLIP, weights_only=True)["about"]
    settings = vars(pretrain.parse_args([]))
    assert all(about[name] == settings[name] for name in settings.keys() - {"output"})
    assert len(about["commit"]) == 40 and about["torch"]
    found = pretrain.zero_shot(load_clip(), pretrain.Drawings(300, about["seed"], "unseen"))
    for name, share in about["zero-shot"].items():
        assert found[name] == pytest.approx(share, abs=0.1)
    assert about["zero-shot"]["colour of the top"] > 0.4


def load_clip(*flags: str) -> clip.CLIP:
    return model.load_clip(train.parse_args(["--backbone", "tiny", *flags]))


def test_tiny_loads_them_unless_random_weights_are_asked_for():
    """Of other words than the captions' the embeddings are random, from the seed."""
    known, other = clip.tokenize("red top")[0, 1:3], clip.tokenize("cathedral")[0, 1]
    a, b, c = load_clip(), load_clip("--seed", "1"), load_clip("--clip-weights", "random")
    assert torch.equal(a.visual.proj, b.visual.proj) and not torch.equal(a.visual.proj, c.visual.proj)
    words = [x.token_embedding.weight for x in (a, b, c)]
    assert torch.equal(words[0][known], words[1][known]) and not torch.equal(words[0][known], words[2][known])
    assert not torch.equal(words[0][other], words[1][other]) and torch.equal(words[0][other], words[2][other])


def test_bad_flags(tmp_path):
    refused(run("extras/pretrain.py", "--batch 1", tmp_path), "--batch at least 2")
    refused(run("extras/pretrain.py", "--output nowhere/tiny.pt", tmp_path), "there is no folder nowhere")
    flags = "--dataset synthetic --backbone tiny"
    refused(run("train.py", f"{flags} --image-size 64 32", tmp_path), "for 128x64 pixels")
    refused(run("train.py", f"{flags} --clip-weights ViT-B-16.pt", tmp_path), "weights of its own")
