"""Draw 16 images per caption and keep the best: does a scorer choose the right ones?

Slide      Dall-E
Question   DALL-E draws many images, and a network like CLIP keeps the one that fits the text best
           (Ramesh et al. 2021). How many more scenes are right, for seen and for held-out pairs of
           digit and colour? The scorer is trained on seen pairs alone, as dalle_mini.py is.
Run        python experiments/rerank.py
           python experiments/rerank.py --model out/dalle_mini/model.pt --num 500
Needs      pretrained/scene_judge.pt (experiments/scene_accuracy.py), which counts what is right

The scorer gives text and image a direction each: those of a pair agree, those of others do not.
"""
import argparse
import math
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
import dalle_mini
import scene_accuracy


class Scorer(nn.Module):
    """CLIP in miniature (Radford et al. 2021): texts and images as vectors of length 1."""

    def __init__(self, tokens, N, D=64, E=64):
        super().__init__()
        self.text = nn.Sequential(nn.Embedding(tokens, 32), nn.Flatten(), nn.Linear(32 * N, 4 * D),
                                  nn.ReLU(), nn.Linear(4 * D, E))
        self.image = nn.Sequential(
            nn.Conv2d(3, D // 2, 4, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(D // 2, D, 3, padding=1), nn.ReLU(),
            nn.Conv2d(D, D, 4, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(D, D, 4, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(16 * D, 4 * D), nn.ReLU(), nn.Linear(4 * D, E))
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def of_text(self, text):
        """Tokens (B, N) -> (B, E)."""
        return F.normalize(self.text(text).float(), dim=1)

    def of_image(self, images):
        """Images (B, 3, 32, 32) uint8 -> (B, E)."""
        return F.normalize(self.image(dalle_mini.to_float(images)).float(), dim=1)


def contrastive_loss(scorer, text, images):
    """Every image has to find its text in the batch, and every text its image; other pairs with the
    same text are left out. text (B, N), images (B, 3, 32, 32) uint8."""
    a, b = scorer.of_text(text), scorer.of_image(images)
    with torch.autocast(a.device.type, enabled=False):
        logits = scorer.log_scale.exp().clamp(max=100) * a @ b.T  # (B, B)
    own = torch.arange(len(a), device=a.device)
    same = (text[:, None] == text).all(2) & (own[:, None] != own)
    logits = logits.masked_fill(same, -math.inf)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def train_scorer(args, model, steps):
    """A scorer of images as they come from codes: those are what it will judge."""
    text, codes = dalle_mini.load_tokens(args, model, args.scenes, "train", "seen")
    images = torch.cat([dalle_mini.to_uint8(dalle_mini.images_of(model.autoencoder, part))
                        for part in codes.view(-1, 8, 8).split(5000)])
    torch.manual_seed(args.seed)
    scorer = Scorer(len(dalle_mini.WORDS) + dalle_mini.TEXT_LENGTH, text.shape[1]).to(args.device)
    opt = torch.optim.Adam(scorer.parameters(), 2e-3, (0.9, 0.95), fused=True)
    bar = tqdm(range(steps))
    for step in bar:
        index = torch.randint(len(text), (256,), device=args.device)
        for group in opt.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 100) * (1 - step / steps)
        with dalle_mini.autocast(args):
            loss = contrastive_loss(scorer, text[index], images[index])
        loss.backward()
        nn.utils.clip_grad_norm_(scorer.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        if step % 20 == 0:
            bar.set_postfix_str(f"{loss.item():.3f} nats (chance: {math.log(256):.2f})")
    return scorer.eval()


@torch.no_grad()
def best_of(scorer, text, images, n):
    """Of the first n images per text, the one that agrees most: (N, 3, 32, 32). text (N, tokens),
    images (N, M, 3, 32, 32) uint8."""
    candidates = images[:, :n].flatten(0, 1)
    directions = torch.cat([scorer.of_image(part) for part in candidates.split(1000)])
    cosines = (directions.view(len(text), n, -1) * scorer.of_text(text)[:, None]).sum(2)  # (N, n)
    return images[torch.arange(len(text), device=text.device), cosines.argmax(1)]


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--model", type=Path, help="a checkpoint, default pretrained/dalle_mini.pt")
    p.add_argument("--steps", type=int, default=2000, help="of the scorer's training")
    p.add_argument("--num", type=int, default=250, help="captions of each kind")
    a, flags = p.parse_known_args(argv)  # other flags are dalle_mini.py's, such as --guidance
    args, model = scene_accuracy.load_model(dalle_mini, a.model, flags)
    judge = scene_accuracy.load_judge(dalle_mini, args.device)
    scorer = train_scorer(args, model, a.steps)
    print(f"| {a.num:,} captions | digit | colour | relation | all |")
    print("| --- | --- | --- | --- | --- |")
    for pairs in ("seen", "held-out"):
        _, texts, facts = dalle_mini.load_scenes(a.num, "test", pairs, args, single=0)
        images = dalle_mini.generate(args, model, [text for text in texts for _ in range(16)])
        images = images.view(a.num, 16, 3, 32, 32)
        for n in (1, 4, 16):
            best = best_of(scorer, dalle_mini.to_tokens(texts).to(args.device), images, n)
            shares = scene_accuracy.accuracy(judge, best, facts).mean(0).tolist()
            cells = " | ".join(f"{share:.3f}" for share in shares)
            print(f"| {pairs} pairs: best of {n} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
