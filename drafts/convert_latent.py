"""Rename the keys of the old pretrained/latent_diffusion.pt, and compare the pictures.

    python convert_latent.py OLD_REPOSITORY OUT.pt [--length 8]

With --length 16, the old number of text tokens, the pictures must be the same to the bit in
float32; the file that the new lesson reads has 8 (TEXT_LENGTH), without the last 8 pads.
"""
import argparse
import importlib.util
import sys
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "tests")]
import latent_diffusion as new
from test_latent_diffusion import diffusers_name


def load_old(folder):
    spec = importlib.util.spec_from_file_location("old", Path(folder) / "latent_diffusion.py")
    old = importlib.util.module_from_spec(spec)
    sys.modules["old"] = old
    spec.loader.exec_module(old)
    return old


def convert(old, config, state, length):
    """State of the new networks from that of the old ones (fp16)."""
    bpe = old.BytePairs(config["learned"])
    words = [bpe.encode(word) for word in new.WORDS]
    assert all(len(tokens) == 1 for tokens in words), words
    first_pad = 256 + len(config["learned"])
    rows = [tokens[0] for tokens in words] + [first_pad + i for i in range(length)]
    out = {k: v for k, v in state.items() if k.startswith("autoencoder.")}
    for key, value in state.items():
        if key.startswith("ema.text."):
            out[key.replace("ema.text.", "denoiser.encoder.")] = value
    out["denoiser.encoder.word.weight"] = state["ema.text.word.weight"][rows]
    out["denoiser.encoder.place"] = state["ema.text.place"][:length]
    new.TEXT_LENGTH = length
    args = new.parse_args(["--device", "cpu"])
    model = new.build(args)
    names = diffusers_name(args.channels, args.layers)
    for key in model.denoiser.backbone.state_dict():
        out[f"denoiser.backbone.{key}"] = state[f"ema.backbone.{names(key)}"]
    model.load_state_dict(out)
    return args, model.eval(), out


def main():
    p = argparse.ArgumentParser()
    p.add_argument("old", type=Path)
    p.add_argument("out", type=Path)
    p.add_argument("--length", type=int, default=8)
    p.add_argument("--num", type=int, default=2)
    p.add_argument("--scenes", type=int, default=100)
    a = p.parse_args()
    old = load_old(a.old)
    ckpt = torch.load(a.old / "pretrained/latent_diffusion.pt", weights_only=True)
    args, model, state = convert(old, ckpt["config"], ckpt["model"], a.length)
    args.bf16, args.num = False, a.num
    new.autocast = lambda args: torch.autocast("cpu", enabled=False)
    config = {k: getattr(args, k) for k in new.HPARAMS} | dict(
        seed=0, scenes=120_000, ae_steps=4000, steps=6000, every=1000)
    torch.save(dict(file="latent_diffusion", config=config, step=6000,
                    ema={k: v.half() for k, v in state.items()}), a.out)
    old_args = old.parse_args(["--sample", "--device", "cpu"], ckpt["config"])
    old_args.bf16, old_args.device = False, "cpu"
    old_model = old.LatentDiffusion(old_args).eval()
    full = ckpt["model"] | {k.replace("ema.", "denoiser.", 1): v for k, v in ckpt["model"].items()
                            if k.startswith("ema.")}
    old_model.load_state_dict(full)
    texts = [t for t in new.PROMPTS for _ in range(a.num)]
    with torch.no_grad():
        context = old_model.ema.text(old_model.tokens(texts))
        noise = old.noise_for(old_args, old_model, len(texts))
        z_old = old.new_latents(old_args, old_model, context, noise)
        z_new = new.sample(model.denoiser, noise, new.to_tokens(texts), args)
        theirs, ours = old.decoded_latents(old_model, z_old), new.generate(args, model, texts)
        print(f"latents equal to the bit: {torch.equal(z_old, z_new)}, difference at most "
              f"{(z_old - z_new).abs().max()}; pictures: {(theirs != ours).sum()} of "
              f"{ours.numel():,} numbers differ")
        for pairs in (True, False):  # the old checker, 100 scenes each
            wanted = old.random_facts(a.scenes, np.random.default_rng(5), pairs, single=0)
            rng = np.random.default_rng(6)
            texts2 = [new.caption_of(f, rng.random() < 0.5) for f in wanted]
            found = new.generate(args, model, texts2)
            right = old.accuracy(old_model.checker, found, torch.from_numpy(wanted))
            print(f"pairs seen: {pairs}; digit, colour, relation, all right by the old checker:",
                  [f"{r.float().mean().item():.3f}" for r in right], flush=True)
    new.save_picture(a.out.with_suffix(".png"), new.grid(torch.cat([theirs, ours]), 2 * a.num))


if __name__ == "__main__":
    main()
