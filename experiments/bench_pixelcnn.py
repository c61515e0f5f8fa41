"""How much faster is sampling with caches than the slide's loop?

Run        python experiments/bench_pixelcnn.py [--num 20]         about two minutes
"""
import argparse
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import pixelcnn


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--model", type=Path, default=ROOT / "pretrained/pixelcnn.pt")
    p.add_argument("--num", type=int, default=20)
    a = p.parse_args(argv)
    ckpt = pixelcnn.load_checkpoint(a.model)
    args = pixelcnn.parse_args([], ckpt["config"])
    model = pixelcnn.build(args).eval()
    model.load_state_dict(ckpt["ema"])
    x = torch.full((a.num, *args.shape), -1, device=args.device)
    y = torch.arange(a.num, device=args.device) % args.classes
    u = torch.rand(x.shape).to(args.device)
    found = {}
    seconds = {}
    for sampler in (pixelcnn.sample, pixelcnn.sample_naive):
        start = time.perf_counter()
        found[sampler] = sampler(model, x, y, u, args.guidance)
        seconds[sampler] = time.perf_counter() - start
        print(f"{sampler.__name__:14}{seconds[sampler]:8.1f} s for {a.num} images", flush=True)
    cached, naive = found.values()
    same = (cached == naive).double().mean()
    print(f"{seconds[pixelcnn.sample_naive] / seconds[pixelcnn.sample]:.0f} times faster; "
          f"{100 * same:.2f} % of the pixels are the same")


if __name__ == "__main__":
    main()
