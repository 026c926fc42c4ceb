"""A reward model: one number of how good an image is as an answer to what was asked for, read off a network that was trained before."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from flowjax.conditions import need
from flowjax.config import ConfigError
from flowjax.models import layers as L
from flowjax.models.sharding import constrain

HEADLESS = {"classifier": ("logits",), "two_tower": ()}  # kinds of backbones: the parameters of each that are left behind


class Reward(nn.Module):
    """A head on an image's features f and on f * a, where the vector a stands for what was asked for.

    On two towers (two_tower, clip) a is the embedded caption, and the head adds to the scaled cosine (PickScore, 2305.01569), with
    which it begins because its last layer starts at zero. On a classifier f is the penultimate layer, a is learned for each class,
    and the reward begins at zero. What depends on the condition alone would be without effect: rewards are compared within one.

    Fields: backbone, the section of that network; num_classes of a classifier's conditions (0: whatever was asked for);
    hidden, the size of the head's hidden layer (0: a linear head, which ImageReward's 2304.05977 is too).
    """

    backbone: Mapping
    num_classes: int = 0
    hidden: int = 0

    kind = "reward"

    @nn.nowrap
    def network(self) -> nn.Module:
        """The backbone on its own."""
        from flowjax import models

        made = models.build(self.backbone, "model.backbone").clone(parent=None)
        if made.kind not in HEADLESS:
            raise ConfigError(f"model.backbone of a reward is a {made.kind}; valid: {', '.join(HEADLESS)}")
        if made.kind == "two_tower" and self.num_classes:
            raise ConfigError(f"model.num_classes = {self.num_classes} of a reward on two towers should be 0: they read captions")
        return made

    @property
    def text(self) -> Mapping:
        """Fields of the backbone's text encoder, where it has one."""
        return self.backbone.get("text", {})

    def setup(self):
        self.body = self.network()
        self.asked = L.Embed(self.num_classes, self.body.features, init=L.normal(1.0)) if self.num_classes else None
        self.head = Head(self.hidden)

    def __call__(self, x: jax.Array, cond: Mapping) -> jax.Array:
        """(B,) float32 of images x (B, H, W, C) in [-1, 1] and what they were asked for: cond["tokens"] or cond["label"]."""
        if self.body.kind == "two_tower":
            image, asked, scale = self.body(x, {"tokens": need(cond, "tokens", "a reward on two towers")})
            return self.head(image, asked) + scale * jnp.sum(image * asked, axis=1)
        t = jnp.zeros(x.shape[:1], jnp.float32) if self.body.time else None
        asked = self.asked(need(cond, "label", "a reward of classes")) if self.num_classes else None
        return self.head(self.body(x, t=t, features=True), asked)

    @nn.nowrap
    def adopt(self, module: nn.Module, params: Mapping, where: str) -> dict:
        """What of the parameters of a network of the backbone's kind is this network's; ConfigError where it is of another kind."""
        if type(module) is not type(own := self.network()):
            raise ConfigError(f"{where} is a {type(module).__name__}, and model.backbone a {type(own).__name__}")
        return {"body": {k: v for k, v in params.items() if k not in HEADLESS[own.kind]}}


class Head(nn.Module):
    """(B,) of features (B, F) and, where there is one, of the condition's vector (B, F)."""

    hidden: int

    @nn.compact
    def __call__(self, image: jax.Array, asked: jax.Array | None) -> jax.Array:
        h = image if asked is None else jnp.concatenate([image, image * asked], axis=1)
        if self.hidden:
            h = constrain(nn.silu(L.Linear(self.hidden, ("embed", "mlp"), L.lecun, name="hidden")(h)), "batch", "act_mlp")
        return constrain(L.Linear(1, ("mlp" if self.hidden else "embed", "small"), L.zeros, name="out")(h)[:, 0], "batch")
