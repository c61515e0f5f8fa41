"""Why is an excellent density a poor classifier, and what does it take to make it a good one?

Slides     Discriminative vs. Generative; Recall: Bayes' Rule
Question   By Bayes' rule, p(y | x) is proportional to p(x | y). pretrained/pixelcnn.pt spends some
           670 bits on the pixels of a digit, of which the class is at most log2(10) = 3.3:
           maximum likelihood hardly notices whether these 3.3 are right. How much density does a
           good classifier cost?
Method     Fine-tune on  bits/dim + weight * softplus(log p(x | wrong) - log p(x | right)),  with
           images that the model nearly misclassifies, and the wrong classes that it confuses with
           the right one. Random wrong classes are too easy: their term is nearly zero.
Run        python experiments/generative_classifier.py          50 minutes on 2 cores, half of them
                                                                to classify training images
Writes     out/generative_classifier/model.pt, a checkpoint for pixelcnn.py --sample; samples.png,
           samples at guidance 1, before and after; gaps.pt, how training images are classified
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
    joint = pixelcnn.log_joint(args, model, x.to(args.device))
    gaps = joint - joint.gather(1, y[:, None])
    return gaps.scatter(1, y[:, None], -math.inf)


def hard_pairs(gaps, n):
    """Indices (n,) of images and a wrong class (n,) for each. Three in four images are drawn by how
    nearly they are misclassified, the others uniformly; classes by how likely they make it."""
    images = torch.sigmoid(gaps.amax(1) / 3).multinomial(n, replacement=True)
    images[:n // 4] = torch.randint(len(gaps), (n // 4,))
    classes = (gaps[images] / 3).softmax(1).multinomial(1)[:, 0]
    return images, classes


def tune(args, model, images, labels, a):
    """Fine-tune the model; returns its average over the last steps."""
    x = pixelcnn.to_levels(images, args.levels)
    path = a.out / "gaps.pt"
    if not path.exists():
        parts = tqdm(list(zip(x.split(500), labels.split(500))), "classifying training images")
        torch.save(torch.cat([confusions(args, model, *part) for part in parts]), path)
    gaps = torch.load(path)
    ema = copy.deepcopy(model)
    opt = torch.optim.Adam(model.requires_grad_(True).parameters(), a.lr, (0.9, 0.95), fused=True)
    torch.manual_seed(args.seed)
    bar = tqdm(range(1, a.steps + 1))
    for step in bar:
        density = torch.randint(len(x), (12,))
        y = labels[density].masked_fill(torch.rand(len(density)) < 0.1, args.classes)
        i, wrong = hard_pairs(gaps, 20)
        for group in opt.param_groups:
            group["lr"] = a.lr * min(1, step / 50) * (1 - (step - 1) / a.steps)
        with pixelcnn.autocast(args):
            nats = pixelcnn.log_prob(model, torch.cat([x[density], x[i], x[i]]).to(args.device),
                                     torch.cat([y, labels[i], wrong]).to(args.device))
        likelihood, right, other = nats.split([len(density), len(i), len(i)])
        contrast = F.softplus(other - right).mean()
        loss = pixelcnn.to_bits(likelihood.mean(), args.shape) + a.weight * contrast
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        pixelcnn.ema_update(ema, model, step)
        gaps[i, wrong] = (other - right).detach().to(gaps)
        if step % 20 == 0:
            bar.set_postfix_str(f"contrast {contrast:.3f} nats")
    return ema


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--model", type=Path, default=ROOT / "pretrained/pixelcnn.pt")
    p.add_argument("--steps", type=int, default=1800)
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
    print("| model | accuracy by Bayes' rule | bits/dim given the class | accuracy of samples at "
          "guidance 1 |\n| --- | --- | --- | --- |")
    for axis, name in zip(axes, ("maximum likelihood", "with contrast")):
        if name == "with contrast":
            images, labels = pixelcnn.load_data(args.data, "train", args.data_dir)
            model = tune(args, model, images, labels, a)
            pixelcnn.save_checkpoint(args, ckpt["step"], ema=model.state_dict())
        joint = pixelcnn.log_joint(args, model, x)
        right = (joint.argmax(1) == y.cpu()).double().mean()
        bits = math.log(args.classes) + joint.gather(1, y.cpu()[:, None]).mean()
        bits = pixelcnn.to_bits(bits, args.shape)
        samples = pixelcnn.generate(args, model, classes[:a.num])
        read = torch.cat([classifier(part)[1].argmax(1).cpu() for part in samples.split(100)])
        share = (read == classes[:a.num]).double().mean()
        print(f"| {name} | {right:.4f} | {bits:.4f} | {share:.3f} |", flush=True)
        axis.imshow(pixelcnn.grid(samples[:100], 10))
        axis.set(title=f"{name}, guidance 1", xticks=[], yticks=[])
    figure.savefig(a.out / "samples.png", dpi=120)


if __name__ == "__main__":
    main()
