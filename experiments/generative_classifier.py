"""Why is an excellent density a poor classifier, and what does it take to make it a good one?

Slides     Discriminative vs. Generative; Recall: Bayes' Rule
Question   By Bayes' rule, p(y | x) is proportional to p(x | y). pretrained/pixelcnn.pt spends some
           640 bits on the pixels of a digit, of which the class is at most log2(10) = 3.3:
           maximum likelihood hardly notices whether these 3.3 are right. How much density does a
           good classifier cost?
Method     Fine-tune on  bits/dim + weight * softplus(log p(x | wrong) - log p(x | right)),  with
           wrong classes that the model confuses with the right one. Random wrong classes are too
           easy: their term is nearly zero. The model itself says which are hard, for `fresh` more
           training images in every round.
Run        python experiments/generative_classifier.py                    an hour on 2 cores
           python experiments/generative_classifier.py --rounds 0         only the pretrained model
Writes     out/generative_classifier/model.pt, a checkpoint for pixelcnn.py --sample; samples.png,
           samples at guidance 1, before and after
"""
import argparse
import copy
import math
import sys
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import fid
import pixelcnn

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def confusions(args, model, x, y):
    """How much likelier a wrong class is than the right one: log p(x | k) - log p(x | y) in nats
    (N, classes), -inf where k = y. Above 0: the image is misclassified."""
    joint = pixelcnn.log_joint(args, model, x)
    gaps = joint - joint.gather(1, y.cpu()[:, None])
    return gaps.scatter(1, y.cpu()[:, None], -math.inf)


def hard_pairs(gaps, n):
    """Indices (n,) of images and a wrong class (n,) for each. Three in four images are drawn by how
    nearly they are misclassified, the others uniformly; a class by how likely it makes the image."""
    images = torch.sigmoid(gaps.amax(1) / 3).multinomial(n, replacement=True)
    images[:n // 4] = torch.randint(len(gaps), (n // 4,))
    classes = (gaps[images] / 3).softmax(1).multinomial(1)[:, 0]
    return images, classes


def tune(args, model, images, labels, a):
    """Fine-tune the model in place; its average over the last steps is returned."""
    x = pixelcnn.to_levels(images, args.levels)
    ema = copy.deepcopy(model)
    opt = torch.optim.Adam(model.requires_grad_(True).parameters(), a.lr, (0.9, 0.95), fused=True)
    torch.manual_seed(args.seed)
    order = torch.randperm(len(x))
    gaps, total = torch.empty(0, args.classes), a.rounds * a.steps
    for step in range(1, total + 1):
        if step % a.steps == 1:  # a new round: look at more images, with the model as it is now
            new = order[len(gaps):len(gaps) + a.fresh]
            gaps = torch.cat([gaps, confusions(args, ema, x[new], labels[new])])
            wrong = (gaps[-len(new):].amax(1) > 0).double().mean()
            print(f"step {step}: of {len(new):,} new training images {wrong:.3f} are misclassified",
                  flush=True)
        density = torch.randint(len(x), (a.batch,))
        pair, wrong = hard_pairs(gaps, a.batch)
        i = order[pair]
        y = labels[density].masked_fill(torch.rand(a.batch) < 0.1, args.classes)
        for group in opt.param_groups:
            group["lr"] = a.lr * min(1, step / 50) * (1 - (step - 1) / total)
        with pixelcnn.autocast(args):
            nats = pixelcnn.log_prob(model, torch.cat([x[density], x[i], x[i]]),
                                     torch.cat([y, labels[i], wrong]))
        likelihood, right, other = nats.chunk(3)
        contrast = F.softplus(other - right).mean()
        loss = -pixelcnn.to_bits(likelihood.mean(), args.shape) + a.weight * contrast
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        pixelcnn.ema_update(ema, model, step)
        gaps[pair, wrong] = (other - right).detach().double()
        if step % 50 == 0:
            print(f"step {step}: contrast {contrast:.3f} nats", flush=True)
    return ema


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--model", type=Path, default=ROOT / "pretrained/pixelcnn.pt")
    p.add_argument("--rounds", type=int, default=15)
    p.add_argument("--fresh", type=int, default=4000, help="new training images in every round")
    p.add_argument("--steps", type=int, default=150, help="training steps per round")
    p.add_argument("--batch", type=int, default=16, help="images, and as many pairs, per step")
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--weight", type=float, default=0.1, help="of the contrast")
    p.add_argument("--num", type=int, default=10_000, help="test images")
    p.add_argument("--out", type=Path, default=Path("out/generative_classifier"))
    a = p.parse_args(argv)
    a.out.mkdir(parents=True, exist_ok=True)
    ckpt = pixelcnn.load_checkpoint(a.model)
    args = pixelcnn.parse_args(["--out", str(a.out), "--guidance", "1"], ckpt["config"])
    model = pixelcnn.build(args).eval()
    model.load_state_dict(ckpt["ema"])
    x, y = pixelcnn.held_out(args, a.num)
    classifier = fid.choose_features(fid.parse_args(["--out", str(ROOT)]))[0]
    classes = torch.arange(1000) % 10
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.6), layout="constrained")
    print("| model | accuracy by Bayes' rule | bits/dim given the class | samples at guidance 1 read "
          "as asked |\n| --- | --- | --- | --- |")
    for axis, name in zip(axes, ("maximum likelihood", "with contrast")):
        if name == "with contrast":
            images, labels = pixelcnn.load_data(args.data, "train", args.data_dir)
            model = tune(args, model, images, labels, a)
            pixelcnn.save_checkpoint(args, ckpt["step"], ema=model.state_dict())
        joint = pixelcnn.log_joint(args, model, x)
        right = (joint.argmax(1) == y).double().mean()
        bits = math.log(args.classes) + joint.gather(1, y[:, None]).mean()
        bits = -pixelcnn.to_bits(bits, args.shape)
        samples = pixelcnn.generate(args, model, classes[:a.num])
        read = torch.cat([classifier(part)[1].argmax(1) for part in samples.split(100)])
        share = (read == classes[:a.num]).double().mean()
        print(f"| {name} | {right:.4f} | {bits:.4f} | {share:.3f} |", flush=True)
        axis.imshow(pixelcnn.grid(samples[:100], 10))
        axis.set(title=f"{name}, guidance 1", xticks=[], yticks=[])
    figure.savefig(a.out / "samples.png", dpi=120)


if __name__ == "__main__":
    main()
