"""Sampling with caches beside the plain loop: python tests/bench_pixelcnn.py [--num 100]

One run, the network of the default size, random weights; the plain loop is long: minutes. Both must
give the same images.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import pixelcnn

p = argparse.ArgumentParser()
p.add_argument("--num", type=int, default=100)
num = p.parse_args().num
torch.set_num_threads(2)
args = pixelcnn.parse_args(["--device", "cpu"])
args.shape, args.classes = [1, 28, 28], 10
torch.manual_seed(0)
model = pixelcnn.make_model(args).eval()
labels = pixelcnn.class_labels(args, num)
found, seconds = [], []
for args.naive in (False, True):
    start = time.perf_counter()
    found.append(pixelcnn.draw_images(args, model, labels))
    seconds.append(time.perf_counter() - start)
same = (found[0] == found[1]).float().mean()
print(f"{num} images of 28 x 28, gated, {sum(p.numel() for p in model.parameters()):,} parameters")
print(f"cached {seconds[0]:8.1f} s {seconds[0] / num:8.3f} s an image")
print(f"naive  {seconds[1]:8.1f} s {seconds[1] / num:8.3f} s an image")
print(f"{seconds[1] / seconds[0]:.0f} times faster; {100 * same:.2f} % of pixels the same")
