"""The pretrained checkpoints draw what docs/results.md says, judged by nearest neighbours in pixels
and by the pretrained classifier."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import dalle_mini
import ddpm
import fid
import latent_diffusion
import pixelcnn
import video_diffusion
import vqvae

ROOT = Path(ddpm.__file__).parent
sys.path.insert(0, str(ROOT / "experiments"))
import scene_accuracy
import video_geometry
import video_motion


@pytest.fixture(scope="module")
def drawn():
    """120 samples of pretrained/ddpm.pt with its default sampler and guidance, and the data."""
    ckpt = ddpm.load_checkpoint(ROOT / "pretrained/ddpm.pt")
    args = ddpm.parse_args(["--device", "cpu"], ckpt["config"])
    model = ddpm.build(args).eval()
    model.load_state_dict(ckpt["ema"])
    return *ddpm.generate(args, model, 120), *ddpm.load_data("mnist", "train", ROOT / "data")


def distances(images, known):
    """(N, M), to the last digit: the fast way by products is wrong near 0."""
    a, b = (ddpm.to_float(x).flatten(1) for x in (images, known))
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def test_digits_are_of_the_class_asked_for(drawn):
    """By the vote of the 5 nearest of 60,000 training images, whose accuracy on real test digits is
    0.969 (guided samples are more typical). And no sample is a training image."""
    images, labels, known, known_labels = drawn
    near = distances(images, known).topk(5, largest=False)
    votes = known_labels[near.indices].mode(dim=1).values
    assert (votes == labels).float().mean() >= 0.97
    assert near.values[:, 0].min() > 1.5


def test_digits_are_varied(drawn):
    """Within a class samples are about as far apart as training images; no two are alike."""
    images, labels, known, known_labels = drawn
    for c in range(10):
        own = distances(images[labels == c], images[labels == c])
        real = distances(known[known_labels == c][:200], known[known_labels == c][:200])
        assert (own + 100 * torch.eye(len(own))).min() > 1.5
        assert own.mean() > 0.75 * real.mean(), c


def test_digits_are_black_and_white(drawn):
    """Brightness and background are those of MNIST: a wrong range shows as grey."""
    images, _, known, _ = drawn
    assert abs(images.float().mean() - known.float().mean()) < 6
    assert (images[:, :, 0] < 8).float().mean() > 0.98 and (images > 200).float().mean() > 0.05


def read_by_classifier(images, labels):
    """Share of images that pretrained/fid.pt reads as their labels."""
    return (classes_of(images) == labels).float().mean()


def classes_of(images):
    """What pretrained/fid.pt reads in images."""
    args = fid.parse_args(["--device", "cpu", "--out", str(ROOT)])
    f, _ = fid.choose_features(args)
    return fid.summarise(f, images, None, args, "images")["logits"].argmax(1)


def test_classifier_agrees_on_diffusion_samples(drawn):
    """The classifier's accuracy on ddpm.py's samples is that of docs/results.md, within chance."""
    assert read_by_classifier(drawn[0], drawn[1]) >= 0.98


@pytest.fixture(scope="module")
def density():
    """pretrained/pixelcnn.pt, ready to use."""
    ckpt = pixelcnn.load_checkpoint(ROOT / "pretrained/pixelcnn.pt")
    args = pixelcnn.parse_args(["--device", "cpu"], ckpt["config"])
    model = pixelcnn.build(args).eval()
    model.load_state_dict(ckpt["ema"])
    return args, model


def test_pixelcnn_digits_are_of_the_class_asked_for(density):
    """200 samples at the default guidance, as docs/results.md says, within chance."""
    args, model = density
    labels = torch.arange(200) % 10
    assert read_by_classifier(pixelcnn.generate(args, model, labels), labels) >= 0.93


def test_pixelcnn_bits(density):
    """The first 1,000 test digits cost what docs/results.md says of them."""
    args, model = density
    log_p = pixelcnn.log_probs(model, *pixelcnn.held_out(args, 1000)).mean()
    bits = pixelcnn.to_bits(log_p, args.shape)
    assert bits == pytest.approx(0.8395, abs=0.0005)


def test_pixelcnn_reads_digits_by_bayes_rule(density):
    """Of 100 test digits, by p(y | x); docs/experiments.md has the share of all."""
    args, model = density
    x, y = pixelcnn.held_out(args, 100)
    assert (pixelcnn.log_joint(args, model, x).argmax(1) == y).float().mean() >= 0.88


@pytest.fixture(scope="module")
def codes():
    """pretrained/vqvae.pt, ready to use."""
    ckpt = vqvae.load_checkpoint(ROOT / "pretrained/vqvae.pt")
    args = vqvae.parse_args(["--device", "cpu"], ckpt["config"])
    model = vqvae.build(args).eval()
    model.load_state_dict(ckpt["ema"])
    return args, model


def test_vqvae_reconstructions(codes):
    """2,000 test digits through their codes: near, read as before, and nearly all codes in use."""
    args, model = codes
    images, _ = vqvae.test_set(args, 2000)
    found = vqvae.codes_of(model.autoencoder, images)
    back = vqvae.images_of(model.autoencoder, found)
    assert (back - vqvae.to_float(images)).square().mean() < 0.0095
    assert len(found.unique()) == args.codebook_size
    assert (classes_of(images) == classes_of(vqvae.to_uint8(back))).float().mean() >= 0.98


def test_vqvae_digits_are_of_the_class_asked_for(codes):
    """200 samples at the default guidance, as docs/results.md says, within chance."""
    args, model = codes
    labels = torch.arange(200) % 10
    assert read_by_classifier(vqvae.generate(args, model, labels), labels) >= 0.95


@pytest.fixture(scope="module", params=[dalle_mini, latent_diffusion], ids=lambda m: m.NAME)
def scenes(request):
    """A file, its pretrained model, and the judge of scenes."""
    lesson = request.param
    args, model = scene_accuracy.load_model(lesson, None, ["--device", "cpu"])
    return lesson, args, model, scene_accuracy.load_judge(lesson)


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


@pytest.mark.parametrize("pairs", ["seen", "held-out"])
def test_scenes_are_what_the_caption_asks_for(scenes, pairs):
    """All of 200 scenes, within chance of docs/results.md; and the first stage can show them."""
    lesson, args, model, judge = scenes
    images, texts, facts = lesson.load_scenes(200, "test", pairs, args, single=0)
    with torch.no_grad():
        back = lesson.to_uint8(model.autoencoder.reconstruct(lesson.to_float(images)))
    assert share_right(judge, back, facts) >= 0.9
    assert share_right(judge, lesson.generate(args, model, texts), facts) >= 0.94


def load_video(name):
    """pretrained/<name>.pt, ready to use."""
    if not (ROOT / f"pretrained/{name}.pt").exists():
        pytest.skip("not trained yet")
    ckpt = video_diffusion.load_checkpoint(ROOT / f"pretrained/{name}.pt")
    args = video_diffusion.parse_args(["--device", "cpu"], ckpt["config"])
    model = video_diffusion.build(args).eval()
    model.load_state_dict(ckpt["ema"])
    return args, model


def test_spheres_roll_as_the_law_says():
    """20 clips continued from two frames: both spheres stay, where the law of motion has them."""
    args, model = load_video("video_diffusion")
    real, K, pose = video_diffusion.load_clips(args, "test", 20)
    hues = video_motion.find(real)[2]
    at, there, _ = video_motion.find(video_diffusion.generate(args, model, 20, [2]), hues)
    assert there.all(2).float().mean() >= 0.9
    assert video_motion.fit_law(at, there, K, pose).mean() <= 1.0


def test_new_views_are_where_the_camera_says():
    """Of 20 test scenes, 7 views each from one picture: closer to the truth than the empty table,
    by the decibels of docs/results.md less chance, and with the spheres in their places."""
    args, model = load_video("video_diffusion_orbit")
    scenes, K, pose = video_diffusion.random_world(
        "orbit", 20, args.frames, args.height, np.random.default_rng([args.seed, 1]))
    real, empty = (
        video_diffusion.render_clips(s, K, pose, args.height, args.height)
        for s in (scenes, video_geometry.without(scenes, "spheres")))
    drawn = video_diffusion.generate(args, model, 20, [1])
    gain = video_geometry.psnr(drawn, real)[:, 1:] - video_geometry.psnr(empty, real)[:, 1:]
    _, _, off, found, lines, _ = video_geometry.measures(drawn, real, empty, empty, scenes, K, pose)
    assert gain.mean() >= 4.5
    assert off <= 1.2 and found >= 0.95 and lines <= 0.35, (off, found, lines)
