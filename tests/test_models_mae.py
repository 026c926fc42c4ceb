"""The masked autoencoder and its objective: sizes, what may be seen, and transformers' forward pass and loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nets import check_sharded, close, count, golden, random_arrays, randomise, shapes

from flowjax import objectives
from flowjax.config import ConfigError
from flowjax.interop import encoder as interop
from flowjax.interop import vit
from flowjax.models import build
from flowjax.models.dit import patchify
from flowjax.models.mae import MAE
from flowjax.models.vit import ViT
from flowjax.objectives import mae
from flowjax.train.roles import Role

VIT = {"patch": 2, "width": 24, "depth": 2, "heads": 3, "grid": 3, "positions": "sincos"}
TINY = {"name": "mae", "encoder": VIT, "decoder": {"width": 16, "depth": 2, "heads": 2}, "attention": "xla"}
X = jnp.asarray(np.random.RandomState(0).uniform(-1, 1, (2, 6, 6, 3)), jnp.float32)
ORDER = jnp.asarray([[4, 0, 7, 2, 1, 3, 5, 6, 8], [8, 1, 3, 5, 7, 2, 0, 4, 6]])
SEEN = 4


@functools.cache
def case():
    net = build(TINY)
    params = randomise(shapes(net, X))
    return net, params, jax.jit(lambda x, order: net.apply({"params": params}, x, order, SEEN))


# --- the network ------------------------------------------------------------------------------------------------------


def test_parameters_of_the_paper():
    """MAE-B/16 of 111,655,680 trained parameters."""
    net = build({"name": "mae", "preset": "B/16"})
    assert count(net, jnp.zeros((1, 224, 224, 3))) == 111_655_680
    assert set(MAE.presets) == {"B/16", "L/16", "H/14"} and net.patch == 16 and MAE.presets["L/16"]["encoder"]["depth"] == 24


def test_a_whole_image_is_encoded_by_the_vit_alone():
    net, params, _ = case()
    for ours, theirs in zip(net.apply({"params": params}, X), ViT(**VIT).apply({"params": params["encoder"]}, X), strict=True):
        close(ours, theirs, 1e-6)
    assert net.kind == ViT.kind


def test_only_seen_patches_are_read():
    _, _, apply = case()
    guess = apply(X, ORDER)
    assert guess.shape == (2, 9, 12) and guess.dtype == jnp.float32
    for rank, place in enumerate(ORDER[0]):
        row, column = divmod(int(place), 3)
        changed = apply(X.at[0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].add(0.5), ORDER)
        np.testing.assert_array_equal(changed[1], guess[1])
        assert bool(jnp.any(jnp.abs(changed[0] - guess[0]) > 1e-3)) == (rank < SEEN)


def test_the_order_within_seen_and_within_hidden_does_not_matter():
    _, _, apply = case()
    shuffled = ORDER[:, jnp.asarray([2, 0, 3, 1, 8, 6, 4, 5, 7])]
    close(apply(X, shuffled), apply(X, ORDER), 1e-5)
    assert jnp.abs(apply(X, ORDER[:, ::-1]) - apply(X, ORDER)).max() > 1e-2


def test_every_guess_stands_at_its_patch():
    """With a decoder that mixes no tokens, a seen patch changes the guess at its own place and no other."""
    net, params, _ = case()
    alone = lambda path, v: 0 * v if "'attn']['out'" in jax.tree_util.keystr(path) else v  # noqa: E731
    params = jax.tree_util.tree_map_with_path(alone, params)
    guess = lambda x: net.apply({"params": params}, x, ORDER, SEEN)  # noqa: E731
    moved = np.abs(guess(X.at[0, :2, 4:].add(0.5)) - guess(X))[0].max(-1)  # place 2, seen fourth
    np.testing.assert_array_equal(moved > 1e-4, np.arange(9) == 2)


@pytest.mark.slow
def test_sharded_equals_one_device():
    net = build({**TINY, "decoder": {"width": 16, "depth": 1, "heads": 2}, "encoder": {**VIT, "heads": 4, "depth": 1}})

    class Masked:
        init = staticmethod(lambda key, x, order: net.init(key, x))
        apply = staticmethod(lambda variables, x, order: net.apply(variables, x, order, SEEN))

    check_sharded(Masked, jnp.tile(X, (4, 1, 1, 1)), jnp.tile(ORDER, (4, 1)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"encoder": {**VIT, "size": 3}}, "model.encoder.size is unknown"),
        ({"encoder": {**VIT, "pooling": "mean"}}, "model.encoder.pooling = 'mean': the decoder is given the class token"),
        ({"decoder": {"width": 3}}, "model.decoder lacks depth, heads"),
        ({"decoder": {"width": 18, "depth": 1, "heads": 2}}, "divisible by 4"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(build({**TINY, **fields}).init, jax.random.key(0), X)


# --- the objective ----------------------------------------------------------------------------------------------------


def bound(ratio=0.5):
    return objectives.build({"name": "mae", "mask_ratio": ratio})


def test_the_order_is_drawn_anew_for_each_image():
    role = Role(build(TINY))
    out = bound().rollout({"net": role.net(None)}, {"x": jnp.zeros((400, 6, 4, 3)), "cond": {}}, jax.random.key(0))
    order = np.asarray(out["order"])
    np.testing.assert_array_equal(np.sort(order, axis=1), np.tile(np.arange(6), (400, 1)))
    first = np.bincount(order[:, 0], minlength=6)
    assert first.min() > 40 and len({tuple(row) for row in order}) > 200
    again = bound().rollout({"net": role.net(None)}, {"x": jnp.zeros((400, 6, 4, 3))}, jax.random.key(1))
    assert not np.array_equal(again["order"], order)


def test_targets_by_hand():
    """(0, 0, 0, 4) has mean 1 and unbiased variance 4; a patch of one colour becomes zero."""
    y = mae.normalised(jnp.asarray([[[0.0, 0, 0, 4], [3, 3, 3, 3]]]))
    np.testing.assert_allclose(y, [[[-0.5, -0.5, -0.5, 1.5], [0, 0, 0, 0]]], atol=1e-6)
    small = mae.normalised(jnp.asarray([[[-1e-3, 1e-3]]]))  # variance 2e-6, and 1e-6 beside it
    np.testing.assert_allclose(small, [[[-1, 1]]] / np.sqrt(3), rtol=1e-4)


class Oracle:
    """Answers with given patches, and remembers how many it might have seen."""

    module = build(TINY)

    def __init__(self, answer):
        self.answer = answer

    def __call__(self, x, order, seen):
        self.seen = seen
        return self.answer


def loss(answer, ratio=0.5):
    net = Oracle(answer)
    return float(bound(ratio).players[0].loss({"net": net}, {"x": X, "order": ORDER}, None)[0]), net.seen


def test_hidden_patches_alone_count():
    target = mae.normalised(patchify(X, 2))
    hidden = np.zeros((2, 9, 1), bool)
    np.put_along_axis(hidden, np.asarray(ORDER)[:, 4:, None], True, axis=1)
    assert loss(target) == (pytest.approx(0, abs=1e-10), 4)
    assert loss(jnp.where(hidden, target, 7.0))[0] == pytest.approx(0, abs=1e-10)
    assert loss(jnp.where(hidden, target + 2.0, target))[0] == pytest.approx(4.0, rel=1e-5)
    assert loss(jnp.zeros_like(target))[0] == pytest.approx(11 / 12, rel=1e-4)
    one = np.zeros((2, 9, 12))
    one[1, 4, 3] = 3.0  # one number of one hidden patch: 9 / (2 images, 5 patches, 12 numbers)
    assert loss(target + one)[0] == pytest.approx(9 / (2 * 5 * 12), rel=1e-5)


@pytest.mark.parametrize(("ratio", "seen"), [(0.75, 2), (0.89, 0), (0.1, 8), (0.0, 9)])
def test_as_many_patches_are_seen_as_the_ratio_says(ratio, seen):
    if 1 <= seen < 9:
        assert loss(jnp.zeros((2, 9, 12)), ratio)[1] == seen
    else:
        with pytest.raises(ConfigError, match=f"objective.mask_ratio = {ratio} leaves {seen} of 9 patches to see; valid: 1 to 8"):
            loss(jnp.zeros((2, 9, 12)), ratio)


# --- transformers -----------------------------------------------------------------------------------------------------


def rename(path):
    table = {("embed",): "decoder_embed", ("mask",): "mask_token", ("norm",): "decoder_norm", ("linear",): "decoder_pred"}
    if path in table:
        return table[path]
    return f"decoder_layers.{path[0].removeprefix('block_')}.{(vit.BLOCK | vit.VIT)[path[1:]]}"


@functools.cache
def published():
    """(state dicts of encoder and decoder in transformers' names, our parameters)."""
    net, like = build(TINY), shapes(build(TINY), X)
    zeros = jax.tree.map(lambda v: np.zeros(v.shape, np.float32), like)
    encoder = random_arrays({k: v.shape for k, v in vit.to_torch(ViT(**VIT), zeros["encoder"]).items()}, 1)
    encoder[vit.POSITIONS] = vit.to_torch(ViT(**VIT), zeros["encoder"])[vit.POSITIONS]
    decoder = random_arrays({k: v.shape for k, v in interop.to_torch(zeros["decoder"], rename).items()}, 2)
    params = {"encoder": vit.from_torch(ViT(**VIT), encoder, like["encoder"]), "decoder": interop.from_torch(decoder, like["decoder"], rename)}
    return net, encoder, decoder, params


def ours():
    net, _, _, params = published()
    guess = jax.jit(lambda p: net.apply({"params": p}, X, ORDER, SEEN))(params)
    value, _ = bound(0.5).players[0].loss({"net": Role(net).net(params)}, {"x": X, "order": ORDER}, None)
    return guess, value


def test_guess_and_loss_equal_the_stored_ones_of_transformers():
    guess, value = ours()
    stored = golden("mae")
    close(guess, stored["guess"], 1e-4)
    assert float(value) == pytest.approx(float(stored["loss"]), rel=1e-4)


@pytest.mark.oracle
def test_guess_and_loss_equal_transformers():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    _, encoder, decoder, _ = published()
    config = transformers.ViTMAEConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, image_size=6, patch_size=2,
        decoder_hidden_size=16, decoder_num_hidden_layers=2, decoder_num_attention_heads=2, decoder_intermediate_size=64,
        mask_ratio=0.5, norm_pix_loss=True, layer_norm_eps=1e-6, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.ViTMAEForPreTraining(config).eval()
    state = {f"vit.{k}": torch.tensor(v) for k, v in encoder.items()}
    state |= {f"decoder.{k}": torch.tensor(v) for k, v in decoder.items() if "mask_token" not in k}
    (mask,) = (v for k, v in decoder.items() if "mask_token" in k)
    state["decoder.mask_token"] = torch.tensor(mask.reshape(1, 1, -1))
    with torch.no_grad():
        model.decoder.initialize_weights(9)  # a freshly built model has zeros where published ones have the table
    state["decoder.decoder_pos_embed"] = model.decoder.decoder_pos_embed
    model.load_state_dict(state, strict=True)
    noise = torch.tensor(np.argsort(np.asarray(ORDER), axis=1), dtype=torch.float32)
    with torch.no_grad():
        out = model(torch.tensor(np.asarray(X)).permute(0, 3, 1, 2), noise=noise)
    guess, value = ours()
    close(guess, out.logits.numpy(), 1e-4)
    assert float(value) == pytest.approx(float(out.loss), rel=1e-4)
    golden("mae", guess=out.logits.numpy(), loss=out.loss.numpy())
