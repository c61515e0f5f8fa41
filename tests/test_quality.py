"""The pretrained checkpoints draw what docs/results.md says, judged by nearest neighbours in pixels
and by pretrained classifiers."""

from pathlib import Path

import numpy as np
import pytest
import torch

import dalle_mini
import ddpm
import fid
import latent_diffusion
import pixelcnn
import scene_accuracy
import video_diffusion
import video_geometry
import video_motion
import vqvae

ROOT = Path(ddpm.__file__).parent


@pytest.fixture(scope="module", autouse=True)
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def load(lesson, name=None):
    """Flags and network of a pretrained checkpoint."""
    path = ROOT / f"pretrained/{name or lesson.NAME}.pt"
    return scene_accuracy.load_model(lesson, path, ["--device", "cpu"])


def classes_of(images):
    """What pretrained/fid.pt reads in images."""
    args = fid.parse_args(["--device", "cpu", "--out", str(ROOT)])
    f, _ = fid.choose_features(args)
    return fid.summarise(f, images, None, args, "images")["logits"].argmax(1)


def distances(a, b):
    """Euclidean distances (N, M) of images; those near 0 are rounded."""
    return torch.cdist(*(ddpm.to_float(x).flatten(1) for x in (a, b)))


def test_ddpm_digits():
    """120 samples: of the class asked for, by the classifier and by the vote of the 5 nearest of
    60,000 training images, whose accuracy on real test digits is 0.969; no sample is a training
    image; samples of a class are about as far apart as real ones; black and white as MNIST is."""
    args, model = load(ddpm)
    images, labels = ddpm.generate(args, model, 120)
    known, known_labels = ddpm.load_data("mnist", "train", ROOT / "data")
    near = distances(images, known).topk(5, largest=False)
    assert (classes_of(images) == labels).float().mean() >= 0.98
    assert (known_labels[near.indices].mode(dim=1).values == labels).float().mean() >= 0.97
    assert near.values[:, 0].min() > 1.5
    for c in range(10):
        own, some = images[labels == c], known[known_labels == c][:200]
        apart = distances(own, own)
        assert (apart + 100 * torch.eye(len(own))).min() > 1.5
        assert apart.mean() > 0.75 * distances(some, some).mean(), c
    assert abs(images.float().mean() - known.float().mean()) < 6
    assert (images[:, :, 0] < 8).float().mean() > 0.98 and (images > 200).float().mean() > 0.05


def test_pixelcnn():
    """100 samples at the default guidance are read as their classes, the first 300 test digits
    cost as many bits as on the day of training, and p(y | x) reads 20 of them."""
    args, model = load(pixelcnn)
    labels = torch.arange(100) % 10
    drawn = pixelcnn.generate(args, model, labels)
    assert (classes_of(drawn) == labels).float().mean() >= 0.93
    x, y = pixelcnn.held_out(args, 300)
    bits = pixelcnn.to_bits(pixelcnn.log_probs(model, x, y).mean(), args.shape)
    assert bits == pytest.approx(0.8451, abs=0.0005)
    found = pixelcnn.log_joint(args, model, x[:20]).argmax(1)
    assert (found == y[:20]).float().mean() >= 0.88


def test_vqvae():
    """1,000 test digits through their codes: near, read as before, nearly all codes in use. 60
    samples at the default guidance are read as their classes."""
    args, model = load(vqvae)
    images, _ = vqvae.test_set(args, 1000)
    found = vqvae.codes_of(model.autoencoder, images)
    back = vqvae.images_of(model.autoencoder, found)
    assert (back - vqvae.to_float(images)).square().mean() < 0.0095
    assert len(found.unique()) == args.codebook_size
    assert (classes_of(images) == classes_of(vqvae.to_uint8(back))).float().mean() >= 0.98
    labels = torch.arange(60) % 10
    drawn = vqvae.generate(args, model, labels)
    assert (classes_of(drawn) == labels).float().mean() >= 0.95


def share_right(judge, images, facts):
    return scene_accuracy.accuracy(judge, images, facts).mean(0)[3].item()


def test_the_judge_knows_what_it_judges():
    """It reads real scenes with held-out pairs as well as seen ones, to within two points."""
    args, judge = dalle_mini.parse_args(["--device", "cpu"]), scene_accuracy.load_judge(dalle_mini)
    shares = []
    for pairs in ("seen", "held-out"):
        images, _, facts = dalle_mini.load_scenes(1000, "test", pairs, args, single=0)
        shares.append(share_right(judge, images, facts))
    assert min(shares) >= 0.95 and abs(shares[0] - shares[1]) <= 0.02, shares


@pytest.mark.parametrize("lesson", [dalle_mini, latent_diffusion], ids=lambda m: m.NAME)
def test_scenes_are_what_the_caption_asks_for(lesson):
    """All of 60 scenes, within chance of docs/results.md; and the first stage can show them."""
    (args, model), judge = load(lesson), scene_accuracy.load_judge(lesson)
    args.sample_steps = 10  # of latent_diffusion.py: less than half as many as by default
    for pairs in ("seen", "held-out"):
        images, texts, facts = lesson.load_scenes(60, "test", pairs, args, single=0)
        with torch.no_grad():
            back = lesson.to_uint8(model.autoencoder(lesson.to_float(images))[0])
        assert share_right(judge, back, facts) >= 0.9
        assert share_right(judge, lesson.generate(args, model, texts), facts) >= 0.94


def test_spheres_roll_as_the_law_says():
    """16 clips continued from two frames: both spheres stay, where the law of motion has them."""
    args, model = load(video_diffusion)
    args.sample_steps = 12  # of 40
    real, K, pose = video_diffusion.load_clips(args, "test", 16)
    hues = video_motion.find(real)[2]
    at, there, _ = video_motion.find(video_diffusion.generate(args, model, 16, [2]), hues)
    assert there.all(2).float().mean() >= 0.9
    assert video_motion.fit_law(at, there, K, pose).mean() <= 0.9


def test_new_views_are_where_the_camera_says():
    """Of 16 test scenes, 7 views each from one picture: closer to the truth than the empty table,
    by the decibels of docs/results.md less chance, and with the spheres in their places."""
    args, model = load(video_diffusion, "video_diffusion_orbit")
    args.sample_steps = 12
    scenes, K, pose = video_diffusion.random_world(
        "orbit", 16, args.frames, args.height, np.random.default_rng([args.seed, 1]))
    real, empty = (
        video_diffusion.render_clips(s, K, pose, args.height, args.height)
        for s in (scenes, video_geometry.without(scenes, "spheres")))
    drawn = video_diffusion.generate(args, model, 16, [1])
    gain = video_geometry.psnr(drawn, real)[:, 1:] - video_geometry.psnr(empty, real)[:, 1:]
    _, _, off, found, lines, _ = video_geometry.measures(drawn, real, empty, empty, scenes, K, pose)
    assert gain.mean() >= 4.5
    assert off <= 1.1 and found >= 0.95 and lines <= 0.6, (off, found, lines)
