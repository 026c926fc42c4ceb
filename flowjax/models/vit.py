"""ViT (2010.11929), DINOv2 (2304.07193; registers 2309.16588) and the encoder of MAE (2111.06377), as encoders of images."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flowjax.config import ConfigError, lookup
from flowjax.models import layers as L
from flowjax.models.dit import patchify
from flowjax.models.encoder import transformer
from flowjax.models.sharding import constrain

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}  # of pixels in [0, 1]
POSITIONS = ("learned", "sincos")
POOLINGS = ("class", "mean")


def resize_matrix(old: int, new: int, antialias: bool = False) -> np.ndarray:
    """Bicubic interpolation of `old` samples at `new` places, as a matrix (new, old); samples stand for pixels, not corners.

    As torch has it: without antialias, Keys' kernel with a = -3/4 and repeated edges; with, a = -1/2, widened where there are
    fewer places than samples, its weights inside the image normalised.
    """
    a, width = (-0.5, max(old / new, 1.0)) if antialias else (-0.75, 1.0)
    centre = (np.arange(new) + 0.5) * old / new - 0.5
    margin = int(np.ceil(2 * width)) + 1
    taps = np.arange(-margin, old + margin)
    d = np.abs(taps - centre[:, None]) / width
    near = ((a + 2) * d - (a + 3)) * d**2 + 1  # Keys 1981, eq. 4 with a free
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    weights = np.where(d <= 1, near, np.where(d < 2, far, 0.0))
    matrix = np.zeros((new, old))
    if antialias:
        matrix[:] = weights[:, margin:-margin]
        return matrix / matrix.sum(1, keepdims=True)
    np.add.at(matrix, (slice(None), np.clip(taps, 0, old - 1)), weights)
    return matrix


class Embeddings(nn.Module):
    """Image -> tokens with positions: class token, registers (without positions), patches row by row.

    Fields as those of ViT; bias, whether the patch embedding has one.
    """

    width: int
    patch: int
    grid: int
    bias: bool = True
    positions: str = "learned"
    registers: int = 0
    mask_token: bool = False
    antialias: bool = False
    mean: tuple = (0.5, 0.5, 0.5)
    std: tuple = (0.5, 0.5, 0.5)
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None, keep: jax.Array | None = None) -> jax.Array:
        """Tokens (B, 1 + registers + N, width) of x (B, H, W, C) in [-1, 1]; mask and keep as ViT's."""
        _, height, width, _ = x.shape
        if height % self.patch or width % self.patch:
            raise ConfigError(f"model.patch = {self.patch} does not divide the image, {height} x {width}")

        def vectors(rows, name, init=L.normal(0.02)):
            return L.Embed(rows, self.width, init=init, name=name)(jnp.arange(rows))

        pixels = ((x + 1) / 2 - jnp.asarray(self.mean, x.dtype)) / jnp.asarray(self.std, x.dtype)
        project = L.Linear(self.width, ("small", "embed"), bias=self.bias, dtype=self.dtype, name="patch")
        h = project(patchify(pixels, self.patch)).astype(jnp.promote_types(x.dtype, jnp.float32))
        if self.mask_token:
            token = vectors(1, "mask", L.zeros)
            h = h if mask is None else jnp.where(mask[..., None], token, h)
        first = vectors(1, "class")
        place_of_first, places = self._places(vectors, height // self.patch, width // self.patch)
        h, first = h + places, first + place_of_first
        if keep is not None:
            h = jnp.take_along_axis(h, keep[..., None], axis=1)
        prefix = [first, vectors(self.registers, "registers", L.zeros)] if self.registers else [first]
        prefix = [jnp.broadcast_to(v, (x.shape[0], *v.shape)) for v in prefix]
        return constrain(jnp.concatenate([*prefix, h], axis=1).astype(self.dtype), "batch", "seq", "act")

    def _places(self, vectors, rows, columns):
        """Positions of the class token (1, width) and of the patches (rows * columns, width)."""
        if self.positions == "sincos":
            return 0.0, jnp.asarray(L.sincos_2d(self.width, rows, columns), jnp.float32)
        table = vectors(1 + self.grid**2, "positions")
        places = table[1:]
        if (rows, columns) != (self.grid, self.grid):
            down, across = (jnp.asarray(resize_matrix(self.grid, n, self.antialias), places.dtype) for n in (rows, columns))
            places = jnp.einsum("ri,cj,ijd->rcd", down, across, places.reshape(self.grid, self.grid, -1)).reshape(rows * columns, -1)
        return table[:1], places


def _presets():
    sizes = {"Ti": (192, 12, 3), "S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "H": (1280, 32, 16), "g": (1536, 40, 24)}
    size = {name: dict(zip(("width", "depth", "heads"), values)) for name, values in sizes.items()}
    patches = {"Ti": 16, "S": 16, "B": 16, "L": 16, "H": 14}
    presets = {f"{name}/{patch}": {**size[name], "patch": patch, "grid": 224 // patch} for name, patch in patches.items()}
    presets |= {f"mae-{name}": {**presets[name], **IMAGENET, "positions": "sincos"} for name in ("B/16", "L/16", "H/14")}
    for name in ("S", "B", "L", "g"):
        dino = {**size[name], **IMAGENET, "patch": 14, "grid": 37, "layerscale": 1e-5, "mask_token": True}
        dino |= {"mlp": "swiglu"} if name == "g" else {}
        presets[f"dinov2-{name}/14"] = dino
        presets[f"dinov2-{name}/14-registers"] = {**dino, "registers": 4, "antialias": True}
    return presets


class ViT(nn.Module):
    """Pre-norm transformer over patches; any height and width that `patch` divides.

    Fields:
      patch, width, depth, heads, mlp_ratio: sizes; the MLP's hidden size is mlp_ratio * width, for "swiglu" two thirds of it,
        rounded up to a multiple of 8.
      grid: patches per side of the images that the learned positions are for; for other images they are interpolated.
      positions: "learned", or "sincos" for the fixed table of MAE.   antialias: of the interpolation (DINOv2 with registers).
      mlp: "gelu" (exact), "gelu_tanh", "quick_gelu" or "swiglu".
      eps: of the norms; weights that come with the transformers library's ViT or MAE want its 1e-12.
      layerscale: the start of a learned scale of each branch, 0 for none.
      registers: tokens beside the class token that stand for no patch.   mask_token: has a token for patches left out.
      pooling: "class", the class token's state, or "mean", the mean over the patches.
      mean, std: of the pixels in [0, 1], by channel; the defaults leave [-1, 1] as it is.
      dtype, remat, attention: see `flowjax.models.dit.DiT`.
    """

    patch: int
    width: int
    depth: int
    heads: int
    grid: int = 14
    mlp_ratio: float = 4.0
    mlp: str = "gelu"
    eps: float = 1e-6
    positions: str = "learned"
    antialias: bool = False
    layerscale: float = 0.0
    registers: int = 0
    mask_token: bool = False
    pooling: str = "class"
    mean: tuple = (0.5, 0.5, 0.5)
    std: tuple = (0.5, 0.5, 0.5)
    dtype: str = "float32"
    remat: str = "none"
    attention: str = "auto"

    kind = "image_encoder"
    presets = _presets()

    @property
    def hidden(self) -> int:
        """Hidden size of the MLP."""
        hidden = int(self.mlp_ratio * self.width)
        return (int(hidden * 2 / 3) + 7) // 8 * 8 if self.mlp == "swiglu" else hidden

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None, keep: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """(states of the patches (B, N, width), pooled (B, width)), float32, of x (B, H, W, C) in [-1, 1].

        mask (B, N), boolean, True where the mask token takes the place of a patch; keep (B, K), the indices of the patches
        that the encoder sees (MAE), whose states are then what is returned.
        """
        lookup(dict.fromkeys(POSITIONS), self.positions, "model.positions")
        lookup(dict.fromkeys(POOLINGS), self.pooling, "model.pooling")
        if mask is not None and not self.mask_token:
            raise ConfigError("a ViT was given a mask, which needs model.mask_token = True")
        h = Embeddings(
            self.width, self.patch, self.grid, positions=self.positions, registers=self.registers, mask_token=self.mask_token,
            antialias=self.antialias, mean=self.mean, std=self.std, dtype=self.dtype, name="embed",
        )(x, mask, keep)  # fmt: skip
        h, _ = transformer(
            h, depth=self.depth, heads=self.heads, hidden=self.hidden, mlp=self.mlp, eps=self.eps, layerscale=self.layerscale,
            dtype=self.dtype, remat=self.remat, attention=self.attention,
        )  # fmt: skip
        h = constrain(L.LayerNorm(self.eps, True, name="norm")(h), "batch", "seq", "act")
        tokens = h[:, 1 + self.registers :]
        pooled = h[:, 0] if self.pooling == "class" else jnp.mean(tokens, axis=1)
        return constrain(tokens, "batch", "seq", "act"), constrain(pooled, "batch", "act")
