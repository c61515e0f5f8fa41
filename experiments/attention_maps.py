"""Which part of an image looks at which word?

Slides     Dall-E; Unet in Stable Diffusion 1 (cross-attention to the prompt)
Question   Attention is where text meets image. Does the place of a digit look at its own words?
Run        python experiments/attention_maps.py dalle_mini                     or latent_diffusion
           python experiments/attention_maps.py dalle_mini --prompt "a red seven above a blue two"
Writes     out/attention_maps/LESSON.png: per prompt the image, and a map for each word

A map holds the attention weight of a word at each of 8 x 8 places, the mean over layers, heads and
sampling steps: of dalle_mini.py while it predicts the code there, of latent_diffusion.py's U-Net
the cross-attention at full resolution.
"""
import argparse
import importlib
import math
import sys
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
import scene_accuracy

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PROMPTS = ["a green three left of a white five", "a purple one above a yellow two",
           "a red eight left of a white nine"]


@torch.no_grad()
def stream_maps(lesson, args, model, text):
    """dalle_mini.py: an image (3, 32, 32) uint8 of a caption, and the weights of the N tokens of
    its text (N, 64)."""
    net, tokens = model.transformer, lesson.to_tokens([text]).to(args.device)
    u = torch.rand(1, 64, generator=torch.Generator().manual_seed(args.seed)).to(args.device)
    codes = lesson.sample(net, tokens, tokens[:, :0], u, args.guidance)
    qkv = []
    hooks = [block.qkv.register_forward_hook(lambda *call: qkv.append(call[2]))
             for block in net.blocks]
    net(tokens, codes)
    for hook in hooks:
        hook.remove()
    maps = []
    for layer in qkv:
        q, k, _ = layer.unflatten(2, (3, net.blocks[0].heads, -1)).permute(2, 0, 3, 1, 4)
        scores = (q @ k.mT)[0] / math.sqrt(q.shape[3])  # (heads, N + 64, N + 64)
        later = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, -math.inf).softmax(2).mean(0)
        maps.append(weights[net.N:, 1:net.N + 1])  # a token stands one place further on
    image = lesson.to_uint8(lesson.images_of(model.autoencoder, codes.view(1, 8, 8)))[0]
    return image, torch.stack(maps).mean(0).T


@torch.no_grad()
def cross_maps(lesson, args, model, text):
    """latent_diffusion.py: the same, from its U-Net."""
    maps, attention = [], F.scaled_dot_product_attention

    def spy(q, k, v, **options):  # (B, heads, places, channels) each
        if k.shape[2] == lesson.TEXT_LENGTH and q.shape[2] == 64:
            with torch.autocast(q.device.type, enabled=False):
                weights = (q.float() @ k.float().mT / math.sqrt(q.shape[3])).softmax(3)
            maps.append(weights[0].mean(0))  # (64, N); the first of the batch has the text
        return attention(q, k, v, **options)

    F.scaled_dot_product_attention = spy
    try:
        image = lesson.generate(args, model, [text])[0]
    finally:
        F.scaled_dot_product_attention = attention
    return image, torch.stack(maps).mean(0).T


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("lesson", choices=["dalle_mini", "latent_diffusion"])
    p.add_argument("--model", type=Path, help="a checkpoint, default pretrained/LESSON.pt")
    p.add_argument("--folder", type=Path, default=Path("out/attention_maps"))
    a, flags = p.parse_known_args(argv)  # other flags are the lesson's, such as --prompt
    a.folder.mkdir(parents=True, exist_ok=True)
    lesson = importlib.import_module(a.lesson)
    args, model = scene_accuracy.load_model(lesson, a.model, flags)
    maps_of = stream_maps if a.lesson == "dalle_mini" else cross_maps
    prompts = args.prompt or PROMPTS
    figure, axes = plt.subplots(len(prompts), 1 + lesson.TEXT_LENGTH, squeeze=False,
                                figsize=(13, 1.7 * len(prompts)), layout="constrained")
    for text, row in zip(prompts, axes):
        image, maps = maps_of(lesson, args, model, text)
        for axis in row:
            axis.axis("off")
        row[0].imshow(image.permute(1, 2, 0).cpu().numpy())
        for axis, word, weights in zip(row[1:], text.split(), maps.view(-1, 8, 8).cpu()):
            axis.imshow(weights.numpy(), vmin=0)
            axis.set_title(f"{word} {weights.max():.2f}", fontsize=9)
    figure.savefig(a.folder / f"{a.lesson}.png", dpi=120)
    print(f"{a.folder}/{a.lesson}.png: image, and the weight of each word at its 8 x 8 places")


if __name__ == "__main__":
    main()
