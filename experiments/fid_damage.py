"""What moves FID, and does it move when the eye sees damage?

Slide      FID: "many others have been proposed", for what FID does not see
Question   Test digits are damaged in four ways, ever more. Does FD rise with each? Precision and
           recall say why.
Run        python experiments/fid_damage.py                      25 s
"""
import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import fid


def blur(x, width):
    """Every pixel of images (N, C, H, W) uint8 becomes the mean of width x width; width is odd."""
    mean = F.avg_pool2d(x.float(), width, 1, width // 2, count_include_pad=False)
    return mean.round().to(torch.uint8)


def noise(x, std):
    """Gaussian noise on images (N, C, H, W) uint8; std in grey levels."""
    return (x + std * torch.randn(x.shape)).round().clamp(0, 255).to(torch.uint8)


def shuffle_pixels(x, share):
    """The pixels of a share of the images x (N, C, H, W) change places, the same way in all."""
    n, order = round(share * len(x)), torch.randperm(x[0].numel())
    return torch.cat([x[n:], x[:n].flatten(1)[:, order].view(x[:n].shape)])


def repeat_images(x, share):
    """A share of the images x (N, C, H, W) is replaced by copies of 20 of them."""
    n = round(share * len(x))
    return torch.cat([x[n:], x[torch.arange(n) % 20]])


DAMAGES = [(noise, "none", (0,)), (blur, "blur, pixels wide", (3, 5, 7)),
           (noise, "noise, grey levels", (16, 32, 128)),
           (shuffle_pixels, "share with shuffled pixels", (0.02, 0.05, 0.2)),
           (repeat_images, "share of copies of 20 images", (0.25, 0.5, 0.95))]


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--num", type=int, default=2000, help="test images")
    a = p.parse_args(argv)
    args = fid.parse_args([])
    f, title = fid.choose_features(args)
    torch.manual_seed(0)
    real = fid.summarise(f, *fid.load_data("mnist", "train", ROOT / "data"), args, "train")
    x = fid.load_data("mnist", "test", ROOT / "data")[0]
    x = x[torch.randperm(len(x))[:a.num]]
    print(f"| damage | {title} | precision | recall |\n| --- | --- | --- | --- |")
    for damage, text, strengths in DAMAGES:
        for strength in strengths:
            fake = fid.summarise(f, damage(x, strength), None, args, text)
            distance = fid.frechet_distance(real["mu"], real["S"], fake["mu"], fake["S"])
            precision, recall = fid.precision_recall(real["X"], fake["X"])
            name = f"{text}, {strength:g}" if strength else text
            print(f"| {name} | {distance:.4f} | {precision:.3f} | {recall:.3f} |")


if __name__ == "__main__":
    main()
