"""Longer prompts: the model completes a short one by itself, then draws it.

Slide      Learning better prompts: "a cat drinking a pint of beer" becomes a paragraph
Question   dalle_mini.py models p(text) too, and can continue a prompt. Is what the short prompt
           says seen more often in images of the longer one?
Run        python experiments/better_prompts.py
           python experiments/better_prompts.py --model out/dalle_mini/model.pt --num 8
Needs      pretrained/scene_judge.pt (experiments/scene_accuracy.py), which reads the images
Writes     out/better_prompts/better_prompts.png: short prompts, and what became of them

Three kinds of short prompts: a whole caption, to which a second digit is added; one that breaks
off; and a colour without a digit. Training shows captions of the first kind only.
"""
import argparse
import math
import sys
from pathlib import Path

import matplotlib
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
import dalle_mini
import scene_accuracy

matplotlib.use("Agg")
import matplotlib.pyplot as plt

KINDS = {"a whole caption": "{article} {colour} {digit}",
         "unfinished": "{article} {colour} {digit} above", "a colour": "{article} {colour}"}


@torch.no_grad()
def continue_text(transformer, text, u):
    """Texts (B, N) in which the pads are replaced by draws from p(text): at least one word, then
    words until the first pad. u (B, N): uniform random numbers."""
    V, N = int(transformer.none[0]), transformer.N
    known = (text < V).sum(1)  # (B,) words that are given
    text = text.clone()
    ended = torch.zeros_like(known, dtype=torch.bool)
    for i in range(int(known.min()), N):
        logits, _ = transformer(text, text[:, :0])  # (B, N, V + N)
        logits = logits[:, i].float()
        logits[known == i, V:] = -math.inf
        token = dalle_mini.draw(logits, u[:, i])
        token = torch.where(i < known, text[:, i], token)
        ended |= token >= V
        text[:, i] = torch.where(ended, V + i, token)
    return text


def to_text(tokens):
    """Tokens (N,) -> the words before the pads."""
    return " ".join(dalle_mini.WORDS[i] for i in tokens.tolist() if i < len(dalle_mini.WORDS))


def prompts_of(kind, pairs):
    """Every short prompt of a kind about pairs (digit, colour)."""
    texts = []
    for digit, colour in pairs:
        name = list(dalle_mini.COLOURS)[colour]
        texts.append(KINDS[kind].format(article="an" if name == "orange" else "a", colour=name,
                                        digit=dalle_mini.DIGITS[digit]))
    return texts


def follows(judge, kind, images, pairs):
    """In which images (N, 3, 32, 32) is the thing that the prompt names: pairs (N, 2) of digit and
    colour. If it is to stand above something, it has to stand at the top."""
    digit, colour = scene_accuracy.read(judge, images)  # (N, 5) each
    right = (colour == pairs[:, 1:]) & (digit != scene_accuracy.EMPTY)
    if kind != "a colour":
        right &= digit == pairs[:, :1]
    return right[:, 3] if kind == "unfinished" else right.any(1)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--model", type=Path, help="a checkpoint, default pretrained/dalle_mini.pt")
    p.add_argument("--num", type=int, default=10, help="images per prompt, each its own longer one")
    p.add_argument("--folder", type=Path, default=Path("out/better_prompts"))
    a, flags = p.parse_known_args(argv)  # other flags are dalle_mini.py's, such as --guidance
    a.folder.mkdir(parents=True, exist_ok=True)
    args, model = scene_accuracy.load_model(dalle_mini, a.model, flags)
    judge = scene_accuracy.load_judge(dalle_mini, args.device)
    every = torch.cartesian_prod(torch.arange(10), torch.arange(8))  # (80, 2): digit, colour
    held_out = every.sum(1) % 8 == 0
    figure, axes = plt.subplots(len(KINDS), 8, figsize=(14, 6.5), layout="constrained")
    print("| the prompt is | pairs | seen in images of the short prompt | of the longer one |")
    print("| --- | --- | --- | --- |")
    for kind, row in zip(KINDS, axes):
        for pairs, name in ((every[~held_out], "seen"), (every[held_out], "held-out")):
            if kind == "a colour" and name == "held-out":
                continue  # no pair is named
            pairs = pairs.repeat_interleave(a.num, dim=0)
            short = dalle_mini.to_tokens(prompts_of(kind, pairs.tolist())).to(args.device)
            u = torch.rand(short.shape, generator=torch.Generator().manual_seed(args.seed))
            longer = continue_text(model.transformer, short, u.to(args.device))
            texts = [[to_text(tokens) for tokens in both] for both in (short, longer)]
            drawn = [dalle_mini.generate(args, model, some) for some in texts]
            shares = [follows(judge, kind, images, pairs.to(args.device)).float().mean().item()
                      for images in drawn]
            print(f"| {kind} | {name} | {shares[0]:.3f} | {shares[1]:.3f} |", flush=True)
            if name == "seen":
                pick = torch.linspace(0, len(pairs) - 1, 4).long().tolist()
                for axis, i in zip(row, [i for i in pick for _ in range(2)]):
                    axis.axis("off")
                for column, i in enumerate(pick):
                    for which in (0, 1):
                        axis = row[2 * column + which]
                        axis.imshow(drawn[which][i].permute(1, 2, 0).cpu().numpy())
                        words = texts[which][i].split()
                        axis.set_title(" ".join(words[:4]) + "\n" + " ".join(words[4:]), fontsize=8)
    figure.savefig(a.folder / "better_prompts.png", dpi=120)


if __name__ == "__main__":
    main()
