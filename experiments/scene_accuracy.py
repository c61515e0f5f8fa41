"""How often is a scene drawn right, and how often if its pairs of digit and colour are held out?

Slide      Dall-E: "One of the first examples of very good generalisation"
Question   Of 1,000 scenes of two digits, in how many does a judge read the caption: both digits,
           both colours, their relation, and nothing else?
Run        python experiments/scene_accuracy.py dalle_mini                     or latent_diffusion
           python experiments/scene_accuracy.py dalle_mini --model out/x/model.pt --guidance 4
           python experiments/scene_accuracy.py dalle_mini --train      pretrained/scene_judge.pt

A judge has to know what it judges: this one is trained on real scenes with all 80 pairs of digit
and colour. The rows of real scenes tell how well it reads, and what the first stage lets through.
"""
import argparse
import importlib
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
JUDGE = ROOT / "pretrained/scene_judge.pt"
EMPTY = 10  # the digit of a place where nothing stands


class Judge(nn.Module):
    """Reads a scene: which digit, or EMPTY, and which colour stands at each of its places."""

    def __init__(self, places, D=64):
        super().__init__()
        self.places = places  # (y, x) of their centres
        self.features = nn.Sequential(
            nn.Conv2d(3, D // 2, 3, padding=1), nn.ReLU(),
            nn.Conv2d(D // 2, D, 4, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(D, D, 3, padding=1), nn.ReLU(),
            nn.Conv2d(D, D, 4, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(D, D, 3, padding=1), nn.ReLU())
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(16 * D, 2 * D), nn.ReLU(),
                                  nn.Linear(2 * D, 11 + 8))

    def forward(self, images):
        """(B, 3, 32, 32) in [-1, 1] -> logits of digits (B, 5, 11) and of colours (B, 5, 8)."""
        h = self.features(images)  # (B, D, 8, 8)
        crops = [h[:, :, y // 4 - 2:y // 4 + 2, x // 4 - 2:x // 4 + 2].flatten(1)
                 for y, x in self.places]
        return self.head(torch.stack(crops, dim=1)).float().split([11, 8], dim=2)


def judge_loss(judge, images, facts):
    """Nats per place for the digit and, where there is one, for its colour; facts (B, 5, 2)."""
    digit, colour = judge(images)
    wanted = facts[..., 1].masked_fill(facts[..., 0] == EMPTY, -100)  # -100: does not count
    return (F.cross_entropy(digit.flatten(0, 1), facts[..., 0].flatten())
            + F.cross_entropy(colour.flatten(0, 1), wanted.flatten()))


@torch.no_grad()
def read(judge, images):
    """Images (N, 3, 32, 32) uint8 -> the digits (N, 5), or EMPTY, and the colours (N, 5)."""
    batches = [judge(x.float() / 127.5 - 1) for x in images.split(500)]
    return [torch.cat(logits).argmax(2) for logits in zip(*batches)]


def accuracy(judge, images, facts):
    """What is right in images (N, 3, 32, 32) uint8 of facts (N, 5, 2): (N, 4), from 0 to 1. Digit
    and colour: shares of the things asked for; relation: things stand where they should and
    nowhere else; all: everything at once."""
    digit, colour = read(judge, images)
    there = facts[..., 0] != EMPTY
    digit_right = digit == facts[..., 0]
    colour_right = colour == facts[..., 1]
    shares = [(right & there).sum(1) / there.sum(1) for right in (digit_right, colour_right)]
    relation = ((digit != EMPTY) == there).all(1)
    everything = (digit_right & (colour_right | ~there)).all(1)
    return torch.stack([*shares, relation.float(), everything.float()], dim=1)


def load_judge(lesson, device="cpu"):
    judge = Judge(lesson.PLACES)
    judge.load_state_dict(torch.load(JUDGE, map_location="cpu", weights_only=True)["model"])
    return judge.to(device).eval()


def load_model(lesson, path, flags):
    """Flags and averaged model of a checkpoint; flags override those of the checkpoint."""
    ckpt = lesson.load_checkpoint(path or ROOT / "pretrained" / f"{lesson.NAME}.pt")
    args = lesson.parse_args(flags, ckpt["config"])
    model = lesson.build(args).eval()
    model.load_state_dict(ckpt["ema"])
    return args, model


def train_judge(lesson, args, scenes, steps):
    """Train the judge on scenes of training digits with all pairs, and write JUDGE."""
    images, _, facts = lesson.load_scenes(scenes, "train", "all", args)
    torch.manual_seed(args.seed)
    judge = Judge(lesson.PLACES).to(args.device)
    opt = torch.optim.Adam(judge.parameters(), 2e-3, (0.9, 0.95), fused=True)
    bar = tqdm(range(steps))
    for step in bar:
        index = torch.randint(len(images), (128,), device=args.device)
        for group in opt.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 100) * (1 - step / steps)
        with lesson.autocast(args):
            loss = judge_loss(judge, lesson.to_float(images[index]), facts[index])
        loss.backward()
        nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        if step % 20 == 0:
            bar.set_postfix_str(f"{loss.item():.4f} nats per place")
    state = {name: weight.half() for name, weight in judge.state_dict().items()}
    torch.save({"file": "scene_judge", "step": steps, "model": state}, JUDGE)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("lesson", choices=["dalle_mini", "latent_diffusion"])
    p.add_argument("--train", action="store_true", help="train the judge first")
    p.add_argument("--steps", type=int, default=4000, help="of the judge's training")
    p.add_argument("--scenes", type=int, default=120_000, help="for the judge's training")
    p.add_argument("--model", type=Path, help="a checkpoint, default pretrained/LESSON.pt")
    p.add_argument("--num", type=int, default=1000, help="scenes of each kind")
    a, flags = p.parse_known_args(argv)  # other flags are the lesson's, such as --guidance
    lesson = importlib.import_module(a.lesson)
    if a.train:
        train_judge(lesson, lesson.parse_args(flags), a.scenes, a.steps)
    args, model = load_model(lesson, a.model, flags)
    judge = load_judge(lesson, args.device)
    print(f"| {a.num:,} scenes of two digits | digit | colour | relation | all |")
    print("| --- | --- | --- | --- | --- |")
    for pairs in ("seen", "held-out"):
        images, texts, facts = lesson.load_scenes(a.num, "test", pairs, args, single=0)
        with torch.no_grad():
            back = torch.cat([lesson.to_uint8(model.autoencoder(lesson.to_float(x))[0])
                              for x in images.split(500)])
        drawn = lesson.generate(args, model, texts)
        rows = {"real": images, "real, with the next one's caption": images.roll(-1, 0),
                "real, through the first stage": back, "drawn": drawn}
        for name, x in rows.items():
            shares = accuracy(judge, x, facts).mean(0).tolist()
            cells = " | ".join(f"{share:.3f}" for share in shares)
            print(f"| {pairs} pairs: {name} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
