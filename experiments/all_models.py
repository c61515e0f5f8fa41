"""All generators side by side: how good, how large, how fast?

Question   Do the measures agree on which model is the best?
Run        python experiments/all_models.py                    the pretrained models
Needs      pretrained/scene_judge.pt (experiments/scene_accuracy.py) for scenes

Digits: FD to the 60,000 training digits and accuracy, both by the classifier of fid.py. Scenes: the
share in which a judge finds everything right, for seen and for held-out pairs of digit and colour.
"""
import argparse
import importlib
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
import fid
import scene_accuracy


def load(name):
    """The file, its flags and its pretrained model."""
    lesson = importlib.import_module(name)
    return lesson, *scene_accuracy.load_model(lesson, None, [])


def timed(draw, *args):
    """What draw(*args) returns, and its seconds."""
    start = time.perf_counter()
    return draw(*args), time.perf_counter() - start


def cost(model, seconds, num):
    return f"{sum(p.numel() for p in model.parameters()):,} | {seconds * 100 / num:.1f} |"


def digits(num):
    """A row of measures for each model of digits, and one for real test digits."""
    args = fid.parse_args(["mnist:train", "samples"])
    f, _ = fid.choose_features(args)
    real = fid.read_set("mnist:train", f, args)

    def row(name, fake, tail):
        m = fid.measures(real, fake)
        print(f"| {name} | {m['distance']:.3f} | {m['  at infinite N']:.3f} | "
              f"{m['accuracy']:.3f} | {tail}", flush=True)

    print("| digits | FD | at infinite N | accuracy | parameters | s per 100 |")
    print("| --- | --- | --- | --- | --- | --- |")
    labels = torch.arange(num) % 10
    for name in ("pixelcnn", "vqvae", "ddpm"):
        lesson, a, model = load(name)
        images, seconds = timed(lesson.generate, a, model, num if name == "ddpm" else labels)
        images = images[0] if name == "ddpm" else images
        fake = fid.summarise(f, images, labels, args, name)
        row(f"`{name}.py`", fake, cost(model, seconds, num))
    row("real test digits", fid.floor_of(real, fake, f, args)[1], "| |")


def scenes(num):
    """A row for each model of scenes, and one for real scenes: the shares that are right."""
    print("| scenes | all right, seen pairs | held-out pairs | parameters | s per 100 |")
    print("| --- | --- | --- | --- | --- |")
    for name in ("dalle_mini", "latent_diffusion"):
        lesson, args, model = load(name)
        judge = scene_accuracy.load_judge(lesson, args.device)
        drawn, real = [], []
        for pairs in ("seen", "held-out"):
            images, texts, facts = lesson.load_scenes(num, "test", pairs, args, single=0)
            x, seconds = timed(lesson.generate, args, model, texts)
            for shares, y in ((drawn, x), (real, images)):
                right = scene_accuracy.accuracy(judge, y, facts)[:, 3].mean()
                shares.append(f"{right:.3f}")
        print(f"| `{name}.py` | {' | '.join(drawn)} | {cost(model, seconds, num)}", flush=True)
    print(f"| real scenes of test digits | {' | '.join(real)} | | |")


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--num", type=int, default=1000, help="samples per row")
    num = p.parse_args(argv).num
    digits(num)
    print()
    scenes(num)


if __name__ == "__main__":
    main()
