"""The flow from noise to data, where it can be drawn: points in the plane.

Slide      Converting samples: "Learn a neural field to represent the flow from x_T to x_0",
           x_{t-1} = f(x_t) + x_t; Flow between distributions
Question   What does the field f look like early and late, and which paths do the samples take?
Run        python experiments/flow_2d.py                         one minute; or --data moons, rings
Writes     out/flow_2d/flow.png
"""
import argparse
import math
import sys
from pathlib import Path

import matplotlib
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import ddpm

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def make_points(name, n):
    """Points (n, 2) in [-1, 1] on a spiral, two moons or three rings."""
    u, k = torch.rand(n), torch.randint(6, (n,))
    if name == "moons":
        side = (k % 2 * 2 - 1).float()
        x = 0.6 * (math.pi * u).cos() + 0.25 * side
        y = side * (0.6 * (math.pi * u).sin() - 0.2)
        points = torch.stack([x, y], dim=1)
    else:
        r = 0.9 * u.sqrt() if name == "spiral" else 0.3 * (k % 3 + 1)
        angle = 3 * math.pi * u.sqrt() if name == "spiral" else 2 * math.pi * u
        points = torch.stack([r * angle.cos(), r * angle.sin()], dim=1)
    return points + 0.02 * torch.randn(n, 2)


class Field(nn.Module):
    """A residual MLP: points (B, 2), times (B,) -> (B, 2). It takes the class y, and ignores it."""

    def __init__(self, width=192, depth=3):
        super().__init__()
        self.width = width
        self.point, self.time = nn.Linear(2, width), nn.Linear(width, width)
        self.hidden = nn.ModuleList([nn.Linear(width, width) for _ in range(depth)])
        self.out = ddpm.zero(nn.Linear(width, 2))

    def forward(self, x, t, y):
        h = self.point(x) + self.time(ddpm.time_embedding(t, self.width))  # (B, width)
        for layer in self.hidden:
            h = h + F.silu(layer(F.silu(h)))
        return self.out(h)


def train(data, steps, predict, schedule, batch_size=1024, lr=2e-3):
    model, abar = Field(), ddpm.make_abar(schedule).float()
    opt = torch.optim.Adam(model.parameters(), lr)
    for step in tqdm(range(steps), leave=False):
        opt.param_groups[0]["lr"] = lr * (1 - step / steps)
        x0 = data[torch.randint(len(data), (batch_size,))]
        t = torch.randint(1, ddpm.T + 1, (batch_size,))
        loss = ddpm.diffusion_loss(model, x0, None, t, torch.randn_like(x0), abar, predict)
        opt.zero_grad()
        loss.backward()
        opt.step()
    return model


@torch.no_grad()
def field_at(model, mesh, t, s, args):
    """f of the slide, from time t to s, at the points mesh (N, 2): what DDIM adds to them."""
    abar = ddpm.make_abar(args.schedule).tolist()
    out = model(mesh, torch.full((len(mesh),), t), None)
    x0 = ddpm.x0_of(out, mesh, abar[t], args.predict).clamp(-1, 1)
    return ddpm.ddim_step(mesh, x0, abar[t], abar[s]) - mesh


def draw(path, samples, data, model, args, file):
    """path (S, N, 2): the points at every step. Upper row: the field at four times; below: noise,
    paths, samples, data."""
    figure, axes = plt.subplots(2, 4, figsize=(16, 8), layout="constrained")
    mesh = torch.cartesian_prod(*[torch.linspace(-1.6, 1.6, 17)] * 2)  # (289, 2)
    for ax, share in zip(axes[0], (0.1, 0.5, 0.8, 0.95)):
        i = int(share * args.sample_steps)
        t, s = (round(ddpm.T * (1 - k / args.sample_steps)) for k in (i, i + 1))
        f = field_at(model, mesh, t, s, args)
        ax.scatter(*path[i].T, s=2, c="lightsteelblue")
        ax.quiver(*mesh.T, *f.T, angles="xy", width=0.004)
        ax.set_title(f"the field at t = {t}")
    below = (("noise", path[0]), ("paths", None), ("samples", samples), ("data", data))
    for ax, (title, points) in zip(axes[1], below):
        if points is None:
            ax.plot(*path[:, :60].permute(2, 0, 1), c="grey", lw=0.7)  # columns are lines
            ax.scatter(*samples[:60].T, s=12, c="crimson", zorder=2)
        else:
            ax.scatter(*points.T, s=2, c="crimson" if title == "samples" else "steelblue")
        ax.set_title(title)
    for ax in axes.flat:
        ax.set(xlim=(-1.8, 1.8), ylim=(-1.8, 1.8), xticks=[], yticks=[], aspect="equal")
    figure.savefig(file, dpi=80)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--data", choices=["spiral", "moons", "rings"], default="spiral")
    p.add_argument("--steps", type=int, default=6000, help="of training")
    p.add_argument("--num", type=int, default=2000, help="number of samples")
    p.add_argument("--out", type=Path, default=Path("out/flow_2d"))
    a = p.parse_args(argv)
    a.out.mkdir(parents=True, exist_ok=True)
    args = ddpm.parse_args(["--sampler", "ddim", "--sample-steps", "100", "--guidance", "1"])
    torch.manual_seed(0)
    data, other = make_points(a.data, 20_000), make_points(a.data, a.num)
    model = train(data, a.steps, args.predict, args.schedule)
    noise, path = torch.randn(a.num, 2), []
    samples = ddpm.sample(model, noise, torch.zeros(a.num, dtype=torch.long), args,
                          on_step=lambda xt, x0: path.append(xt))
    draw(torch.stack([*path, samples]), samples, other, model, args, a.out / "flow.png")
    print("| mean distance to the nearest of 20,000 data points | |\n| --- | --- |")
    for name, points in (("samples", samples), ("other data", other), ("noise", noise)):
        print(f"| {name} | {torch.cdist(points, data).min(1).values.mean():.4f} |")
    print(f"{a.out / 'flow.png'}: the field at four times; noise, paths, samples, data")


if __name__ == "__main__":
    main()
