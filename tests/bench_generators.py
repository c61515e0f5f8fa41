"""All generators of this repository side by side, as README.md shows them:

    python tests/bench_generators.py [a model of latent_diffusion.py --backbone dit]

Digits: 1,000 of each enclosed model of MNIST, 100 a class, against the 60,000 training images, by the
features and the reading of fid.py's classifier. Scenes: 2,000 of two digits, captions drawn like those
of training, by the features and the reading of one checker for all, that of dalle_mini.py, against
20,000 scenes of training digits. The last row of each table is real: test digits, and scenes of them.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
import dalle_mini
import ddpm
import fid
import latent_diffusion
import pixelcnn
import vqvae
from fid_bias import frechet_bias

torch.set_num_threads(2)


def ready(module, build, key, path=None):
    """Arguments and model of a checkpoint, the enclosed one by default."""
    ckpt = module.read_checkpoint(path or ROOT / f"pretrained/{module.NAME}.pt")
    args = module.parse_args(["--sample", "--device", "cpu"], ckpt["config"])
    module.use_device(args)
    model = build(args).eval()
    if module is latent_diffusion:  # an exported one has the averaged network alone
        ckpt["model"] |= {k.replace("ema.", "denoiser.", 1): v for k, v in ckpt["model"].items()
                          if k.startswith("ema.")}
    module.load_state(model, ckpt, key)
    return args, model


def timed(draw, n):
    """What draw() gives, and its seconds for 100 of n images."""
    start = time.perf_counter()
    return draw(), (time.perf_counter() - start) * 100 / n


def digits(n=1000):
    args = fid.parse_args(["mnist:train", "samples", "--device", "cpu"])
    f, _ = fid.choose_features(args)
    real = fid.read_set("mnist:train", f, args)
    print("| digits | FD | at infinite N | accuracy | parameters | s per 100 |\n"
          "| --- | --- | --- | --- | --- | --- |")
    for module in (pixelcnn, vqvae, ddpm):
        y = torch.arange(n) % 10
        ckpt = module.load_checkpoint(ROOT / f"pretrained/{module.NAME}.pt")
        a = module.parse_args(["--device", "cpu"], ckpt["config"])
        model = module.build(a).eval()
        model.load_state_dict(ckpt["ema"])
        if module is ddpm:
            (x, y), seconds = timed(lambda: ddpm.generate(a, model, n), n)
        else:
            x, seconds = timed(lambda: module.generate(a, model, y), n)
        fake = fid.summarise(f, x, y, args, module.NAME)
        row(f"`{module.NAME}.py`", fid.measures(real, fake), cost(model, seconds))
    floor = fid.floor_of(real, fake, f, args)
    row("test digits", fid.measures(real, floor[1]))


def row(name, m, tail="|"):
    print(f"| {name} | {m['distance']:.4f} | {m['  at infinite N']:.4f} | {m['accuracy']:.3f} | {tail} |", flush=True)


def cost(net, seconds):
    return f"{sum(p.numel() for p in net.parameters()):,} | {seconds:.1f}"


@torch.no_grad()
def scene_features(checker, x):
    """What the checker's head computes of its five places before it decides (N, 5 x 2 D)."""
    found = []
    for part in x.split(500):
        kept = []
        hook = checker.head[1].register_forward_hook(lambda *a: kept.append(a[2].flatten(1)))
        checker(dalle_mini.to_float(part))
        hook.remove()
        found += kept
    return torch.cat(found)


@torch.no_grad()
def scenes(n=2000, flux=None):
    dm, ld = dalle_mini, latent_diffusion
    a, stream = ready(dm, dm.DallE, "model")
    models = [("`dalle_mini.py`", stream, stream.transformer, lambda texts: dm.draw_prompts(
        a, stream, stream.tokens(texts), 1))]
    for name, path, w in (("`latent_diffusion.py`, the U-Net", None, None),
                          ("the same, `--guidance 1`", None, 1.0),
                          ("the same, the transformer of Flux", flux, None)):
        if path or "Flux" not in name:
            b, m = ready(ld, ld.LatentDiffusion, "model", path)
            b.guidance = w or b.guidance
            models.append((name, m, m.ema, lambda texts, b=b, m=m: ld.draw_texts(
                b, m, m.tokens(texts), 1)))
    checker, rng = stream.checker, np.random.default_rng(3)
    gaussian = lambda x: fid.gaussian(scene_features(checker, x))
    mu, S = gaussian(dm.render(dm.random_facts(20_000, rng, single=0), *dm.load_data(a, "train"), rng))

    def line(name, x, facts, tail="|"):
        m, T = gaussian(x)
        fd = fid.frechet_distance(mu, S, m, T)
        less = fd - frechet_bias(S, T, 20_000, n)
        right = float(dm.accuracy(checker, x, torch.from_numpy(facts))[3].mean())
        print(f"| {name} | {fd:.1f} | {less:.1f} | {right:.3f} | {tail} |", flush=True)

    print(f"\n| scenes, {len(mu)} features | FD | less its bias | all right | parameters | s per 100 |\n"
          "| --- | --- | --- | --- | --- | --- |")
    facts = dm.random_facts(n, rng, single=0)
    texts = [dm.describe(f, rng.random() < 0.5) for f in facts]
    for name, _, net, draw in models:
        x, seconds = timed(lambda: draw(texts), n)
        line(name, x.flatten(0, 1), facts, cost(net, seconds))
    real = dm.render(facts, *dm.load_data(a, "test"), rng)
    m = models[1][1]
    line("real scenes of test digits", real, facts)
    line("the same, from the codes of `dalle_mini.py`",
         dm.to_uint8(dm.pictures_of(stream, dm.codes_of(stream, real))), facts)
    line("the same, from the latents of `latent_diffusion.py`",
         ld.decoded_latents(m, ld.latents_of(m, real)), facts)


if __name__ == "__main__":
    digits()
    scenes(flux=Path(sys.argv[1]) if sys.argv[1:] else None)
