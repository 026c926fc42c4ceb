"""The DiT and the KL autoencoder as plain PyTorch writes them, with their train step and sampler: what tools.bench measures against.

It is meant to be a strong opponent, not a straw man: fused q/k/v and `scaled_dot_product_attention`, fused AdamW, one fused
call for each average; on a GPU `torch.compile` and, for a bfloat16 config, autocast. It implements what most runs use and
refuses the rest by name (`check_train`, `check_sample`).
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from flowjax import config as settings
from flowjax.config import ConfigError
from flowjax.interop import dit as dit_names
from flowjax.interop import state_dict
from flowjax.interop import vae as vae_names
from flowjax.models.layers import sincos_2d

EPS = 1e-6  # of every norm


class DiT(nn.Module):
    """2212.09748 with adaLN-zero. x (B, C, H, W), t (B,) in [0, 1], label (B,) or None -> (B, C, H, W).

    `of` is a flowjax DiT, whose fields are the sizes; `shape` (H, W, C) is that of its input.
    """

    def __init__(self, of, shape):
        super().__init__()
        height, width, channels = shape
        self.of, self.channels = of, of.out_channels or channels
        self.grid = height // of.patch, width // of.patch
        self.x_embed = nn.Conv2d(channels, of.width, of.patch, of.patch)
        self.t_embed = nn.Sequential(nn.Linear(256, of.width), nn.SiLU(), nn.Linear(of.width, of.width))
        self.y_embed = nn.Embedding(of.num_classes + 1, of.width) if of.num_classes else None
        positions = sincos_2d(of.width, *self.grid) if of.sincos else np.zeros((1, of.width))
        self.register_buffer("positions", torch.tensor(positions, dtype=torch.float32), persistent=False)
        frequencies = 10000.0 ** (-np.arange(128) / (128 - of.frequency_shift))
        self.register_buffer("frequencies", torch.tensor(frequencies, dtype=torch.float32), persistent=False)
        self.blocks = nn.ModuleList(Block(of.width, of.heads, of.hidden) for _ in range(of.depth))
        self.final_adaln = nn.Linear(of.width, 2 * of.width)
        self.final = nn.Linear(of.width, of.patch**2 * self.channels * (2 if of.learn_sigma else 1))

    def forward(self, x, t, label=None):
        angles = self.of.time_scale * t[:, None] * self.frequencies
        c = self.t_embed(torch.cat([angles.cos(), angles.sin()], dim=1))
        if label is not None:
            c = c + self.y_embed(label)
        c = F.silu(c)
        h = self.x_embed(x).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            h = block(h, c)
        h = self.final(modulated_norm(h, *self.final_adaln(c).chunk(2, dim=1)))
        p, (rows, columns) = self.of.patch, self.grid
        h = h.view(len(x), rows, columns, p, p, -1).permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, rows * p, columns * p)
        return h[:, : self.channels]


class Block(nn.Module):
    """One layer of the DiT: h (B, N, D), c (B, D) after its SiLU."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.heads = heads
        self.adaln = nn.Linear(width, 6 * width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, h, c):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaln(c).chunk(6, dim=1)
        b, n, d = h.shape
        q, k, v = self.qkv(modulated_norm(h, shift_a, scale_a)).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d)
        h = h + gate_a[:, None] * self.out(y)
        y = self.fc2(F.gelu(self.fc1(modulated_norm(h, shift_m, scale_m)), approximate="tanh"))
        return h + gate_m[:, None] * y


def modulated_norm(h, shift, scale):
    """Layer norm without parameters, times (1 + scale), plus shift."""
    return F.layer_norm(h, h.shape[-1:], eps=EPS) * (1 + scale[:, None]) + shift[:, None]


class ResBlock(nn.Module):
    """GN, SiLU, conv, GN, SiLU, conv, plus the input."""

    def __init__(self, inputs: int, features: int, groups: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, inputs, EPS), nn.Conv2d(inputs, features, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups, features, EPS), nn.Conv2d(features, features, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inputs, features, 1) if inputs != features else nn.Identity()

    def forward(self, x):
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return self.conv_shortcut(x) + h


class SpatialAttention(nn.Module):
    """x + Linear(attention(GN(x))) over all positions, one head."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, width, EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x):
        h = self.group_norm(x).flatten(2).transpose(1, 2)
        y = self.to_out[0](F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h)))
        return x + y.transpose(1, 2).reshape(x.shape)


class Resample(nn.Module):
    """3x3 convolution that halves (zeros at the end only), or that follows a nearest-neighbour doubling."""

    def __init__(self, width: int, up: bool):
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(width, width, 3, padding=1) if up else nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0) if self.up else F.pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    """Residual blocks, then a resampling (or none)."""

    def __init__(self, inputs: int, features: int, groups: int, layers: int, resample: str, up: bool):
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(inputs if i == 0 else features, features, groups) for i in range(layers))
        if resample:
            setattr(self, resample, nn.ModuleList([Resample(features, up)]))
        self.resample = resample

    def forward(self, h):
        for block in self.resnets:
            h = block(h)
        return getattr(self, self.resample)[0](h) if self.resample else h


class Middle(nn.Module):
    """Residual block, attention (optional), residual block."""

    def __init__(self, width: int, groups: int, attention: bool):
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(width, width, groups) for _ in range(2))
        self.attentions = nn.ModuleList([SpatialAttention(width, groups)] if attention else [])

    def forward(self, h):
        h = self.resnets[0](h)
        for attention in self.attentions:
            h = attention(h)
        return self.resnets[1](h)


class Encoder(nn.Module):
    """Image -> features, one half per level but the last."""

    def __init__(self, of, channels: int):
        super().__init__()
        widths = [of.channels * m for m in of.multipliers]
        self.conv_in = nn.Conv2d(channels, of.channels, 3, padding=1)
        last = len(widths) - 1
        self.down_blocks = nn.ModuleList(
            Level(widths[max(0, i - 1)] if i else of.channels, w, of.groups, of.layers, "downsamplers" if i < last else "", up=False)
            for i, w in enumerate(widths)
        )
        self.mid_block = Middle(widths[-1], of.groups, of.mid_attention)
        self.conv_norm_out = nn.GroupNorm(of.groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * of.latent_channels, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(x)
        for level in self.down_blocks:
            h = level(h)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(h))))


class Decoder(nn.Module):
    """Latent -> image, the levels of the encoder in reverse."""

    def __init__(self, of):
        super().__init__()
        widths = [of.channels * m for m in reversed(of.multipliers)]
        self.conv_in = nn.Conv2d(of.latent_channels, widths[0], 3, padding=1)
        self.mid_block = Middle(widths[0], of.groups, of.mid_attention)
        last = len(widths) - 1
        self.up_blocks = nn.ModuleList(
            Level(widths[max(0, i - 1)], w, of.groups, of.layers + 1, "upsamplers" if i < last else "", up=True)
            for i, w in enumerate(widths)
        )
        self.conv_norm_out = nn.GroupNorm(of.groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], of.image_channels, 3, padding=1)

    def forward(self, z):
        h = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            h = level(h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))


class AutoencoderKL(nn.Module):
    """2112.10752 app. G. x (B, C, H, W), z like the latents -> (reconstruction, mean, logvar). Names as in diffusers."""

    def __init__(self, of, shape):
        super().__init__()
        self.encoder, self.decoder = Encoder(of, shape[-1]), Decoder(of)
        z = of.latent_channels
        self.quant_conv = nn.Conv2d(2 * z, 2 * z, 1) if of.quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(z, z, 1) if of.quant_conv else nn.Identity()

    def forward(self, x, z):
        mean, logvar = self.quant_conv(self.encoder(x)).float().chunk(2, dim=1)
        logvar = logvar.clamp(-30.0, 20.0)
        return self.decoder(self.post_quant_conv(mean + torch.exp(0.5 * logvar) * z)), mean, logvar


NETS = {"DiT": DiT, "AutoencoderKL": AutoencoderKL}
# Fields that change what a network computes and that the ones above have for these values only.
FIELDS = {
    "DiT": {
        "conditioning": "adaln_zero", "norm": "layer", "mlp": "gelu", "qk_norm": False, "rope": False, "dropout": 0.0,
        "return_sigma": False, "guidance_embed": False, "step_embed": False,
    },
    "AutoencoderKL": {},
}  # fmt: skip


def _weights_of_dit(of, params):
    top = {"x_embed": "x_embed", "y_embed": "y_embed", "final/adaln": "final_adaln", "final/linear": "final"}
    top |= {"t_embed/fc1": "t_embed.0", "t_embed/fc2": "t_embed.2"}
    params = dit_names.unstack(params) if of.scan else params
    kernel = params["x_embed"]["kernel"].reshape(of.patch, of.patch, -1, of.width)

    def rename(path):
        if path[0].startswith("block_"):
            return f"blocks.{path[0].removeprefix('block_')}.{path[-1]}"
        return top["/".join(path)]

    state = state_dict.to_torch(params | {"x_embed": params["x_embed"] | {"kernel": kernel}}, rename)
    for i in range(of.depth):
        for leaf in ("weight", "bias"):
            state[f"blocks.{i}.qkv.{leaf}"] = np.concatenate([state.pop(f"blocks.{i}.{name}.{leaf}") for name in "qkv"])
    return state


def build(of, shape, params) -> nn.Module:
    """The PyTorch network that equals the flowjax module `of` for inputs (H, W, C) = shape, with its parameters."""
    kind = type(of).__name__
    net = NETS[kind](of, shape)
    params = jax.tree.map(np.array, params)
    state = _weights_of_dit(of, params) if kind == "DiT" else vae_names.to_torch(of, params)
    ours, theirs = sum(v.size for v in state.values()), sum(p.numel() for p in net.parameters())
    if ours != theirs:
        raise ConfigError(f"--vs=torch: the two networks differ, {ours:,} parameters here and {theirs:,} there")
    net.load_state_dict({k: torch.from_numpy(v) for k, v in state.items()})
    return net


# --- what is refused


def _only(what: str, value, *valid):
    if value not in valid:
        raise ConfigError(f"--vs=torch: the plain PyTorch side does not implement {what} = {value!r}; it has {', '.join(map(repr, valid))}")


def _check_net(of):
    kind = type(of).__name__
    if kind not in NETS:
        raise ConfigError(f"--vs=torch: the plain PyTorch side has no {kind}; it has {', '.join(NETS)}")
    for field, value in FIELDS[kind].items():
        _only(f"model.{field}", getattr(of, field), value)


def _check_denoiser(config):
    _only("path", config["path"], {"name": "rectified"}, "rectified")
    _only("prediction", config["prediction"], "velocity")
    _only("input_scaling", config["input_scaling"], "none")


def check_train(config, of):
    """ConfigError naming the first setting of a resolved config that only flowjax implements for training `of`."""
    _check_net(of)
    name, objective = settings.split(config["objective"], "objective")
    _only("objective.name", name, *({"DiT": ("flow_matching",), "AutoencoderKL": ("vae",)}[type(of).__name__]))
    if name == "flow_matching":
        _check_denoiser(config)
        _only("objective.weight", objective.get("weight", "none"), "none")
        law, options = settings.split(objective.get("time", "uniform"), "objective.time")
        _only("objective.time.name", law, "uniform", "logit_normal")
        for key in options.keys() - {"stratified", "mean", "std"}:
            raise ConfigError(f"--vs=torch: the plain PyTorch side does not implement objective.time.{key}")
    name, optimizer = settings.split(config["optimizer"], "optimizer")
    _only("optimizer.name", name, "adamw")
    _only("optimizer.rules", list(optimizer.get("rules", [])), [])
    _only("accumulate", config["accumulate"], 1)
    _only("roles", config["roles"], {})


def check_sample(config, of, sampler):
    """The same for drawing samples with `sampler`, a name or section."""
    _check_net(of)
    _check_denoiser(config)
    _only("the sampler", sampler, "euler", "heun")
    _only("sample.guidance", settings.split(config["sample"]["guidance"], "sample.guidance")[0], "none", "cfg")
    _only("roles", config["roles"], {})


# --- training and sampling


def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronise():
    """Wait for all that was asked of the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _compiled(fn: Callable, dtype: str) -> Callable:
    """fn in the config's compute dtype, through torch.compile on a GPU."""
    where = device().type

    def cast(*inputs):
        with torch.autocast(where, torch.bfloat16, enabled=dtype == "bfloat16"):
            return fn(*inputs)

    # The full-precision products of XLA run in TF32 on a GPU, too.
    torch.set_float32_matmul_precision("high")
    return torch.compile(cast) if where == "cuda" else cast


def draw_flow_matching(batch, num_classes: int, time="uniform", label_drop: float = 0.0):
    """(x, label or None, t (B,), z): times by the law, noise, labels dropped to the extra class."""
    x, label = batch
    law = settings.keywords(time)
    if law.get("stratified"):
        u = (torch.rand((), device=x.device) + torch.randperm(len(x), device=x.device) / len(x)) % 1.0
    else:
        u = torch.rand(len(x), device=x.device)
    if law["name"] == "logit_normal":
        u = torch.sigmoid(law.get("mean", 0.0) + law.get("std", 1.0) * torch.special.ndtri(u.clamp(2.0**-24, 1 - 2.0**-24)))
    if label is not None and label_drop:
        label = torch.where(torch.rand(len(x), device=x.device) < label_drop, num_classes, label)
    return x, label, u, torch.randn_like(x)


def flow_matching(net, x, label, t, z):
    """Mean of |net(x_t, t) - (z - x)|^2 on the rectified path."""
    s = t[:, None, None, None]
    return F.mse_loss(net((1 - s) * x + s * z, t, label).float(), z - x)


def vae(net, x, z, *, reconstruction: str = "l1", kl_weight: float = 1e-6):
    """Mean reconstruction error, and KL divergence per dimension of x."""
    x_hat, mean, logvar = net(x, z)
    error = {"l1": F.l1_loss, "l2": F.mse_loss}[reconstruction](x_hat.float(), x)
    kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum() / len(x)
    return error + kl_weight * kl / x[0].numel()


class Trainer:
    """The train step of a resolved config: draw, loss, gradients, clipping, AdamW, averages.

    rates[n] is the learning rate of step n, decays[i][n] the decay of average i at that step; past their end the last holds.
    """

    def __init__(self, net, config, of, rates: Sequence[float], decays: Sequence[Sequence[float]]):
        self.net, self.rates, self.decays, self.done = net.to(device()), rates, decays, 0
        name, objective = settings.split(config["objective"], "objective")
        if name == "flow_matching":
            drawn = {k: objective[k] for k in ("time", "label_drop") if k in objective}
            self.draw = lambda batch: draw_flow_matching(batch, of.num_classes, **drawn)
            self.loss = _compiled(lambda *inputs: flow_matching(self.net, *inputs), of.dtype)
        else:
            shape = lambda x: (len(x), of.latent_channels, *(n // of.factor for n in x.shape[2:]))  # noqa: E731
            self.draw = lambda batch: (batch[0], torch.randn(shape(batch[0]), device=device()))
            self.loss = _compiled(lambda *inputs: vae(self.net, *inputs, **objective), of.dtype)
        _, optimizer = settings.split(config["optimizer"], "optimizer")
        self.clip, decay = optimizer.get("clip", 0.0), optimizer.get("decay", 0.0)
        kernels = [m.weight for m in net.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        rest = [p for p in net.parameters() if all(p is not k for k in kernels)]
        self.optimizer = torch.optim.AdamW(
            [{"params": kernels, "weight_decay": decay}, {"params": rest, "weight_decay": 0.0}],
            betas=(optimizer.get("b1", 0.9), optimizer.get("b2", 0.999)), eps=optimizer.get("eps", 1e-8), fused=True,
        )  # fmt: skip
        self.params = list(net.parameters())
        self.averages = [[p.detach().clone() for p in self.params] for _ in decays]

    def step(self, batch):
        """One step on batch = (x (B, C, H, W), label (B,) or None); returns the loss."""
        return self.update(*self.draw(batch))

    def update(self, *drawn):
        """One step on what was drawn."""
        now = lambda values: values[min(self.done, len(values) - 1)]  # noqa: E731
        loss = self.loss(*drawn)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.clip:
            nn.utils.clip_grad_norm_(self.params, self.clip, foreach=True)
        for group in self.optimizer.param_groups:
            group["lr"] = now(self.rates)
        self.optimizer.step()
        with torch.no_grad():
            for average, decay in zip(self.averages, self.decays):
                torch._foreach_lerp_(average, self.params, 1.0 - now(decay))
        self.done += 1
        return loss.detach()


def place(x, label):
    """(x (B, H, W, C), label or None) in NumPy -> what a Trainer takes, on the device."""
    x = torch.from_numpy(np.array(np.moveaxis(np.asarray(x), -1, 1), order="C")).to(device())
    return x, None if label is None else torch.from_numpy(np.array(label, np.int64)).to(device())


class Sampler:
    """Euler or Heun on the rectified flow, with classifier-free guidance `scale` (None: none), at the `times` from 1 to 0."""

    def __init__(self, net, of, method: str, times: Sequence[float], scale: float | None):
        self.method, self.times, self.scale, self.null = method, times, scale, of.num_classes
        net = net.to(device())
        self.velocity = _compiled(lambda x, t, label: self._guided(net, x, t, label), of.dtype)

    def _guided(self, net, x, t, label):
        if self.scale in (None, 1):
            return net(x, t, label).float()
        null = torch.full_like(label, self.null)
        if self.scale == 0:
            return net(x, t, null).float()
        conditional, free = net(torch.cat([x, x]), torch.cat([t, t]), torch.cat([label, null])).float().chunk(2)
        return free + self.scale * (conditional - free)

    @torch.inference_mode()
    def __call__(self, x, label):
        """Noise (B, C, H, W) at the first time -> samples."""
        at = lambda t: torch.full((len(x),), t, device=x.device)  # noqa: E731
        for t, s in zip(self.times[:-1], self.times[1:]):
            h, slope = t - s, self.velocity(x, at(t), label)
            if self.method == "heun":
                slope = (slope + self.velocity(x - h * slope, at(s), label)) / 2
            x = x - h * slope
        return x
