"""dalle_mini.py: scenes and captions, codes, one transformer over both, drawing with a cache."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from inprocess import call

import dalle_mini as dm


def tiny(N=3, K=5, w=3):
    """A transformer of random weights, float64: N places of text from 4 words, 2 x w codes of K."""
    torch.manual_seed(0)
    net = dm.Transformer(4, N, K, 2, w, 32, 3, 2).double().eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return net


def log_probs(net, text, codes):
    """log p(text) and log p(codes | text) in nats, (B,) each."""
    with torch.no_grad():
        pairs = zip(net(text, codes), (text, codes))
    return [-F.cross_entropy(out.mT, tokens, reduction="none").sum(1) for out, tokens in pairs]


def test_held_out_pairs_are_held_out():
    """Also in the default prompts. A fifth of all scenes has one digit, others two, opposite."""
    every = set(itertools.product(range(10), range(8)))
    held_out = {(d, c) for d, c in every if (d + c) % 8 == 0}
    for pairs, want in (("seen", every - held_out), ("held-out", held_out), ("all", every)):
        facts = dm.random_facts(5000, np.random.default_rng(0), pairs)
        assert set(map(tuple, facts.reshape(-1, 2).tolist())) - {dm.EMPTY} == want
        layouts, counts = np.unique(facts[:, :, 0] < 10, axis=0, return_counts=True)
        assert [np.flatnonzero(row).tolist() for row in layouts] == [[3, 4], [1, 2], [0]]
        assert abs(counts / 5000 - [0.4, 0.4, 0.2]).max() < 0.03
    for i, words in enumerate(map(str.split, dm.PROMPTS)):
        assert all((dm.DIGITS.index(digit) + [*dm.COLOURS].index(colour)) % 8 == 0 for colour, digit
                   in zip(words, words[1:]) if digit in dm.DIGITS) == (i >= 4)


def test_captions_and_their_tokens():
    """A caption says what stands where, and fits; each place has a pad of its own."""
    facts = np.tile(dm.EMPTY, (5, 1))
    for first, second, words in ((1, 2, "left of"), (3, 4, "above"), (2, 1, "right of"),
                                 (4, 3, "below")):
        facts[:] = dm.EMPTY
        facts[first], facts[second] = (7, 0), (2, 6)
        assert dm.caption_of(facts, first > second) == f"a red seven {words} an orange two"
    tokens, V = dm.to_tokens(["", "a Red  seven"]).tolist(), len(dm.WORDS)
    assert tokens[0] == [*range(V, V + 8)]
    assert tokens[1] == [*map(dm.WORDS.index, ("a", "red", "seven")), *tokens[0][3:]]
    facts = dm.random_facts(2000, np.random.default_rng(0), "all")
    texts = [dm.caption_of(scene, turn) for turn in (False, True) for scene in facts]
    assert dm.to_tokens(texts).unique().tolist() == [*range(V), *range(V + 3, V + 8)]


def test_scenes_show_their_facts():
    """Each is a digit of its class and colour, 14 x 14, at one of nine corners near its place."""
    labels, digits, moves = np.arange(20) % 10, np.zeros((20, 1, 28, 28), np.uint8), set()
    digits[:, :, 3:25, 3:25] = (labels * 20 + 60)[:, None, None, None]  # brightness says which
    facts = dm.random_facts(200, np.random.default_rng(0), "all")
    corners = (8, 8), (8, 0), (8, 16), (0, 8), (16, 8)  # middle, left, right, above, below
    for scene, things in zip(dm.render(facts, digits, labels, np.random.default_rng(1)), facts):
        want = torch.full((3, 32, 32), 16.0)
        for (y, x), (digit, colour) in zip(corners, things):
            if digit < 10:
                dy, dx = (scene[:, y:y + 16, x:x + 16] != 16).any(0).nonzero()[0].tolist()
                rgb = torch.tensor([*dm.COLOURS.values()][colour]).view(3, 1, 1)
                square = want[:, y + dy:y + dy + 14, x + dx:x + dx + 14]
                square += (digit * 20 + 60) / 255 * (rgb - 16)
                moves.add((dy, dx))
        assert (scene - want).abs().max() <= 1
    assert moves == set(itertools.product(range(3), repeat=2))


def test_codes_see_ten_by_ten_pixels():
    """So --complete has to hide 3 pixels; and codes hold all that the decoder gets."""
    torch.manual_seed(0)
    net = dm.LocalAutoencoder(3, 16, dm.Codebook(7, 4, 0.25)).eval()
    x = torch.randn(1, 3, 32, 32, requires_grad=True)
    net.encode(x)[0, 3, 4].sum().backward()
    rows, cols = x.grad[0].abs().sum(0).nonzero(as_tuple=True)
    assert (rows.min(), rows.max(), cols.min(), cols.max()) == (9, 18, 13, 22)
    images = torch.randint(256, (3, 3, 8, 12), dtype=torch.uint8)
    back, codes, _ = net(dm.to_float(images))
    assert codes.shape == (3, 2, 3) and torch.equal(codes, dm.codes_of(net, images))
    assert back.shape == images.shape and torch.allclose(dm.images_of(net, codes), back, atol=1e-5)


def test_block_is_pytorchs():
    """With the same weights, nn.TransformerEncoderLayer with norms first and a causal mask."""
    ours = dm.TransformerBlock(32, 4).double()
    theirs = torch.nn.TransformerEncoderLayer(32, 4, 128, 0.0, "gelu", batch_first=True,
                                              norm_first=True, dtype=torch.double)
    same = torch.nn.ModuleList([ours.qkv, ours.out, ours.mlp, ours.norm1, ours.norm2])
    for p, q in zip(theirs.parameters(), same.parameters(), strict=True):
        torch.nn.init.normal_(p, std=0.3)
        q.data.copy_(p.data)
    x, mask = torch.randn(2, 7, 32).double(), torch.ones(7, 7).triu(1).bool()
    assert torch.allclose(ours(x)[0], theirs(x, mask), atol=1e-12)


def test_no_token_sees_a_later_one():
    """All later ones see it; the loss is 1 : 7, and each row of each weight gets a gradient."""
    net, text, codes = tiny(), torch.randint(7, (64, 3)), torch.randint(5, (64, 6))
    for i in range(9):
        other = torch.cat([text, codes], dim=1)
        other[:, i] = (other[:, i] + 1) % 5
        pairs = zip(net(text, codes), net(*other.split([3, 6], dim=1)))
        change = torch.cat([(a - b).abs().amax((0, 2)) for a, b in pairs])
        assert torch.equal(change > 1e-12, torch.arange(9) > i)
    loss, nats = dm.stream_loss(net, text, codes)
    of_text, of_codes = (-log_p.mean().item() for log_p in log_probs(net, text, codes))
    assert nats.item() == pytest.approx(of_codes / 6)
    assert loss.item() == pytest.approx((of_text / 3 + 7 * of_codes / 6) / 8)
    loss.backward()
    for name, p in net.named_parameters():
        assert p.grad.isfinite().all() and (p.grad.abs().sum(-1) > 0).all(), name


def test_stream_is_two_distributions():
    """p(text) sums to 1 over all texts, p(codes | text) over all grids; at first, all are equal."""
    grids = torch.cartesian_prod(*[torch.arange(3)] * 4)
    texts = torch.cartesian_prod(torch.arange(6), torch.arange(6))  # 4 words, 2 pads
    for net in (tiny(2, 3, 2), dm.Transformer(4, 2, 3, 2, 2, 32, 2, 2)):
        of_text, _ = log_probs(net, texts, grids[:1].expand(36, -1))
        _, of_codes = log_probs(net, texts[:1].expand(81, -1), grids)
        assert [p.exp().sum().item() for p in (of_text, of_codes)] == pytest.approx([1, 1])
    assert torch.allclose(of_text, torch.tensor(-2 * math.log(4 + 2)))
    assert torch.allclose(of_codes, torch.tensor(-4 * math.log(3)))


def test_cache_changes_nothing(monkeypatch):
    """Every code is drawn, by its own random number, from the logits of the whole network with
    guidance w, also after given codes. Random numbers all over [0, 1) give each code its share."""
    net, seen, draw = tiny(), [], dm.draw
    monkeypatch.setattr(dm, "draw", lambda out, u: (seen.append(out), draw(out, u))[1])
    text, u = torch.tensor([[0, 2, 6], [3, 5, 6]]), torch.rand(2, 6)
    for w, n, cached in itertools.product((0.0, 1.0, 2.5), (0, 1, 4), (False, True)):
        known = torch.randint(5, (2, n))
        seen.clear()
        codes = dm.sample(net, text, known, u, w, cached)
        with torch.no_grad():
            cond, uncond = (net(t, codes)[1][:, n:] for t in (text, net.none.expand(2, -1)))
        want = uncond + w * (cond - uncond)
        assert torch.allclose(torch.stack(seen, dim=1), want, atol=1e-9)
        assert torch.equal(codes[:, :n], known)
        assert torch.equal(codes[:, n:].flatten(), draw(want.flatten(0, 1), u[:, n:].flatten()))
    drawn = draw(want[:1, 0].expand(1000, -1), torch.arange(1000) / 1000)
    share = drawn.bincount(minlength=5) / 1000
    assert torch.allclose(share, want[0, 0].softmax(0).float(), atol=2e-3)


def test_training_and_drawing(tmp_path, monkeypatch):
    """Training sees seen pairs, and the empty text one time in ten. --prompt implies --sample.
    --complete keeps 32 codes, and shows and knows nothing of the lower half."""
    texts, loaded, pictures, known, shown = [], [], [], [], []
    loss, load, sample, decode = dm.stream_loss, dm.load_scenes, dm.sample, dm.images_of
    monkeypatch.setattr(dm, "data_file", functools.cache(dm.data_file))

    def other(*args, **options):
        loaded.append(args[:3])
        images, *rest = load(*args, **options)
        images[:, :, 16:] = 255 * (len(loaded) % 2)
        return images, *rest

    monkeypatch.setattr(dm, "stream_loss", lambda net, text, codes: (
        texts.append(text), loss(net, text[:4], codes[:4]))[1])
    monkeypatch.setattr(dm, "save_picture", lambda path, picture: pictures.append(picture))
    monkeypatch.setattr(dm, "sample", lambda net, text, codes, *more: (
        known.append(codes), sample(net, text, codes, *more))[1])
    monkeypatch.setattr(dm, "images_of", lambda net, codes: (
        shown.append(codes), decode(net, codes))[1])
    monkeypatch.setattr(dm, "load_scenes", other)
    train = "--train --scenes 40 --codes-steps 0 --steps 1 --batch-size 2000 --codes-width 8 " \
            "--code-dim 4 --codebook-size 16 --width 32 --layers 1 --heads 2 --num 1 --device cpu"
    call(dm, *train.split(), cwd=tmp_path)
    assert loaded == [(40, "train", "seen"), (500, "test", "all"), (40, "train", "seen"),
                      (250, "test", "seen"), (250, "test", "held-out")]
    empty = (texts[0] == dm.to_tokens([""])).all(1)
    assert len(empty) == 2000 and abs(empty.double().mean() - 0.1) < 0.02
    call(dm, *"--prompt Red --prompt seven --num 3 --save x.npz".split(), cwd=tmp_path)
    saved = np.load(tmp_path / "x.npz")
    assert saved["arr_0"].shape == (6, 32, 32, 3)
    assert saved["captions"].tolist() == ["Red"] * 3 + ["seven"] * 3
    for _ in range(2):
        call(dm, "--complete", cwd=tmp_path)
    assert known[-1].shape == (64, 32) and torch.equal(*known[-2:])
    assert torch.equal(shown[-1].flatten(1)[:, :32], known[-1])
    a, b = (picture.reshape(8, 98, 10, 98, 3) for picture in pictures[-2:])
    assert (a[:, :, 1:] == b[:, :, 1:]).all() and (a[:, :, 0] != b[:, :, 0]).any()
    for prompt in ("a red horse", "a " * 9):
        said = call(dm, *train.split(), "--prompt", prompt, "--out", "other", cwd=tmp_path, code=2)
        assert said.count("\n") == 1 and not (tmp_path / "other").exists()
