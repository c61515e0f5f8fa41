"""One strip for the README: what each of the seven lessons makes, from its pretrained model.

Run        python experiments/hero.py
Writes     out/hero/hero.png, and the samples beside it

The last panel shows what fid.py measures: rows of digits, blurred, noisy and with shuffled pixels.
"""
import argparse
import importlib
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import fid
from fid_damage import blur, noise, shuffle_pixels

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SAMPLES = {  # flags, and which 16 of the samples (arr_0) are shown, as rows of 4
    "pixelcnn": ("--num 40", range(0, 40, 2)),
    "vqvae": ("--num 40", range(1, 40, 2)),
    "dalle_mini": ("--num 4", range(16)),
    "ddpm": ("--num 40", range(0, 40, 2)),
    "latent_diffusion": ("--num 4", range(16)),
    "video_diffusion": ("--num 4", range(4)),
}


def tiles(x):
    """16 images (N, H, W, C) uint8 as one, 4 in a row, with a dark border of a pixel."""
    x = np.pad(x[:16], ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=64)
    _, H, W, C = x.shape
    return x.reshape(4, 4, H, W, C).swapaxes(1, 2).reshape(4 * H, 4 * W, C)


def panels(out):
    """(file name, picture) of every lesson; samples are written to out."""
    for name, (flags, shown) in SAMPLES.items():
        path = out / f"{name}.npz"
        importlib.import_module(name).main(
            ["--sample", *flags.split(), "--save", str(path), "--out", str(out / name)])
        x = np.load(path)["arr_0"]
        if x.ndim == 5:  # every second frame of four clips
            x = x[:, ::2].reshape(-1, *x.shape[2:])
            shown = range(16)
        yield name, tiles(x[list(shown)])
    x = fid.read_images("mnist:test", ROOT / "data")[0][[3, 2, 1, 18]]
    torch.manual_seed(0)
    rows = [x, blur(x, 3), noise(x, 64), shuffle_pixels(x, 1)]
    yield "fid", tiles(torch.cat(rows).permute(0, 2, 3, 1).numpy())


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--out", type=Path, default=Path("out/hero"))
    out = p.parse_args(argv).out
    out.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(1, 7, figsize=(14, 2.3))
    for ax, (name, picture) in zip(axes, panels(out)):
        ax.imshow(picture.squeeze(), cmap="gray", vmin=0, vmax=255)
        ax.set_title(f"{name}.py", fontsize=10, family="monospace")
        ax.axis("off")
    figure.tight_layout(pad=0.3)
    figure.savefig(out / "hero.png", dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
