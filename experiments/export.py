"""Shrink a checkpoint for pretrained/: the averaged weights alone, in half precision.

Run        python experiments/export.py out/long/model.pt pretrained/ddpm.pt
"""
import sys

import torch


def main(argv=None):
    source, target = argv or sys.argv[1:]
    ckpt = torch.load(source, map_location="cpu", weights_only=True)
    small = {key: ckpt[key] for key in ("file", "config", "step")}
    small["ema"] = {name: weight.half() for name, weight in ckpt["ema"].items()}
    torch.save(small, target)


if __name__ == "__main__":
    main()
