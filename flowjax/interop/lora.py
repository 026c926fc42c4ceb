"""Adapters (flowjax.train.lora) <-> the safetensors files in which others share them.

| layout      | names                                                                                | alpha                    |
|-------------|--------------------------------------------------------------------------------------|--------------------------|
| "diffusers" | transformer.<module>.lora_A.weight, .lora_B.weight, .lora_magnitude_vector           | header, else the rank    |
| "kohya"     | lora_unet_<module>.lora_down.weight, .lora_up.weight, .dora_scale; dots as "_"       | lora_unet_<module>.alpha |

Modules are named as diffusers names them ("unet." in the place of "transformer." for a U-Net; peft's own "base_model.model." is
read as well), or, for kohya's scripts and ComfyUI, as the models' own code does: FLUX.1's, SD3's, and the papers' DiT's. Theirs
are (r, in) and (out, r), and (r, in, height, width) and (out, r, 1, 1) of convolutions, which patch embeddings are there.

The models' own code holds as one matrix what we have as several: q, k and v; q, k, v and the MLP's first of FLUX's single
blocks. Of such a matrix the parts have a common A, or, where ours differ, all of them one below the other and a block-diagonal
B of n times the rank and alpha. In the same way FLUX's single blocks have one matrix for the outputs of attention and MLP,
whose parts share B.
"""

import itertools
import json
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np
from flax import traverse_util

from flowjax import storage
from flowjax.config import ConfigError, lookup
from flowjax.interop import dit, files, flux, mmdit, original, unet
from flowjax.models.dit import DiT
from flowjax.models.flux import Flux
from flowjax.models.mmdit import MMDiT
from flowjax.models.unet import UNet
from flowjax.train.lora import Lora, added, parts

FILE = "pytorch_lora_weights.safetensors"  # diffusers' name
PATCHES = "x_embed/kernel"
HEADER = "lora_adapter_metadata"
ONE_NORM = "{} is one matrix there, whose outputs have one norm, and several here: DoRA of it cannot be exchanged"
LEAVES = {
    "diffusers": {"down": "lora_A.weight", "up": "lora_B.weight", "magnitude": "lora_magnitude_vector"},
    "kohya": {"down": "lora_down.weight", "up": "lora_up.weight", "magnitude": "dora_scale", "alpha": "alpha"},
}


class Place(NamedTuple):
    """Where one of our kernels is in their module: all of it, or part `index` of `count` along its axis "in" or "out".

    swapped: the halves of its outputs are the other way round.
    """

    module: str
    axis: str = ""
    index: int = 0
    count: int = 1
    swapped: bool = False


def _ruled(rules: Mapping[str, str], name: str) -> str | None:
    """The name by the first rule (regular expression -> replacement) that fits all of it."""
    return next((re.sub(rule, new, name) for rule, new in rules.items() if re.fullmatch(rule, name)), None)


# diffusers' names -> FLUX's own; "#i/n" marks part i of n of the outputs.
FLUX = {
    **{rf"transformer_blocks\.(\d+)\.attn\.to_{x}": rf"double_blocks.\1.img_attn.qkv#{i}/3" for i, x in enumerate("qkv")},
    **{rf"transformer_blocks\.(\d+)\.attn\.add_{x}_proj": rf"double_blocks.\1.txt_attn.qkv#{i}/3" for i, x in enumerate("qkv")},
    r"transformer_blocks\.(\d+)\.attn\.to_out\.0": r"double_blocks.\1.img_attn.proj",
    r"transformer_blocks\.(\d+)\.attn\.to_add_out": r"double_blocks.\1.txt_attn.proj",
    r"transformer_blocks\.(\d+)\.ff\.net\.(0|2)(\.proj)?": r"double_blocks.\1.img_mlp.\2",
    r"transformer_blocks\.(\d+)\.ff_context\.net\.(0|2)(\.proj)?": r"double_blocks.\1.txt_mlp.\2",
    r"transformer_blocks\.(\d+)\.norm1\.linear": r"double_blocks.\1.img_mod.lin",
    r"transformer_blocks\.(\d+)\.norm1_context\.linear": r"double_blocks.\1.txt_mod.lin",
    **{rf"single_transformer_blocks\.(\d+)\.attn\.to_{x}": rf"single_blocks.\1.linear1#{i}/4" for i, x in enumerate("qkv")},
    r"single_transformer_blocks\.(\d+)\.proj_mlp": r"single_blocks.\1.linear1#3/4",
    r"single_transformer_blocks\.(\d+)\.proj_out": r"single_blocks.\1.linear2",
    r"single_transformer_blocks\.(\d+)\.norm\.linear": r"single_blocks.\1.modulation.lin",
    r"x_embedder": "img_in",
    r"context_embedder": "txt_in",
    **{
        rf"time_text_embed\.{theirs}_embedder\.linear_{i}": f"{own}_in.{layer}_layer"
        for theirs, own in (("timestep", "time"), ("text", "vector"), ("guidance", "guidance"))
        for i, layer in ((1, "in"), (2, "out"))
    },
    r"norm_out\.linear": "final_layer.adaLN_modulation.1",
    r"proj_out": "final_layer.linear",
}
SD3 = {
    **{
        rf"transformer_blocks\.(\d+)\.{theirs.format(x)}": rf"joint_blocks.\1.{own}.qkv#{i}/3"
        for theirs, own in ((r"attn(2?)\.to_{}", r"x_block.attn\2"), (r"attn\.add_{}_proj", "context_block.attn"))
        for i, x in enumerate("qkv")
    },
    r"transformer_blocks\.(\d+)\.attn(2?)\.to_out\.0": r"joint_blocks.\1.x_block.attn\2.proj",
    r"transformer_blocks\.(\d+)\.attn\.to_add_out": r"joint_blocks.\1.context_block.attn.proj",
    r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj": r"joint_blocks.\1.x_block.mlp.fc1",
    r"transformer_blocks\.(\d+)\.ff\.net\.2": r"joint_blocks.\1.x_block.mlp.fc2",
    r"transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj": r"joint_blocks.\1.context_block.mlp.fc1",
    r"transformer_blocks\.(\d+)\.ff_context\.net\.2": r"joint_blocks.\1.context_block.mlp.fc2",
    r"transformer_blocks\.(\d+)\.norm1\.linear": r"joint_blocks.\1.x_block.adaLN_modulation.1",
    r"transformer_blocks\.(\d+)\.norm1_context\.linear": r"joint_blocks.\1.context_block.adaLN_modulation.1",
    r"pos_embed\.proj": "x_embedder.proj",
    r"context_embedder": "context_embedder",
    r"time_text_embed\.timestep_embedder\.linear_1": "t_embedder.mlp.0",
    r"time_text_embed\.timestep_embedder\.linear_2": "t_embedder.mlp.2",
    r"time_text_embed\.text_embedder\.linear_1": "y_embedder.mlp.0",
    r"time_text_embed\.text_embedder\.linear_2": "y_embedder.mlp.2",
    r"norm_out\.linear": "final_layer.adaLN_modulation.1",
    r"proj_out": "final_layer.linear",
}


def _of_outputs(name: str) -> Place:
    """The Place of a name with "#i/n"."""
    module, _, part = name.partition("#")
    return Place(module, "out", *map(int, part.split("/"))) if part else Place(module)


def _dit_diffusers(net, path):
    name = dit.rename(path)
    if dit.EMBEDDERS in name:
        raise ValueError(f"diffusers has a copy of {'/'.join(path)} in every block")
    return Place(name)


def _dit_kohya(net, path):
    whole, part = re.fullmatch(r"(.*?)(?:\.qkv\.([qkv]))?", original.rename(path)).groups()
    return Place(f"{whole}.qkv", "out", "qkv".index(part), 3) if part else Place(whole)


def _mmdit_diffusers(net, path):
    name = mmdit.rename(path)
    return Place(name, swapped=f"{name}.weight" in mmdit.swaps(net))


def _flux_diffusers(net, path):
    name = flux.rename(net)(path)
    if part := re.fullmatch(r"(.+\.proj_out)\.(attn|mlp)", name):
        return Place(part[1], "in", int(part[2] == "mlp"), 2)
    return Place(name, swapped=f"{name}.weight" in flux.SWAPPED)


def _own(diffusers, rules):
    """Names by the model's own code, whose modulations are in our order."""

    def place(net, path):
        theirs = diffusers(net, path)
        own = _of_outputs(_ruled(rules, theirs.module))
        return theirs._replace(module=own.module, swapped=False) if theirs.axis else own

    return place


def _unet_place(net, path):
    return Place(unet.rename(net)(path))


class Names(NamedTuple):
    """How a network's modules are called: by diffusers, under `prefix`, and by kohya and ComfyUI. stacks(net): {our stacked
    parameters: numbers of the layers in them}. patches: whether the patch embedding is a convolution there."""

    prefix: str
    places: Mapping[str, Callable]
    stacks: Callable = lambda net: {}
    patches: bool = False


NAMES = {
    DiT: Names(
        "transformer", {"diffusers": _dit_diffusers, "kohya": _dit_kohya},
        lambda net: {"blocks": range(net.depth)} if net.scan else {}, True,
    ),
    MMDiT: Names("transformer", {"diffusers": _mmdit_diffusers, "kohya": _own(_mmdit_diffusers, SD3)}, mmdit.groups, True),
    Flux: Names("transformer", {"diffusers": _flux_diffusers, "kohya": _own(_flux_diffusers, FLUX)}, flux.groups),
    UNet: Names("unet", {"diffusers": _unet_place, "kohya": _unet_place}),
}  # fmt: skip


class Part(NamedTuple):
    """One of our kernels' adapter in their axes: down (r, in), up (out, r), and m (out,) itself, or None."""

    down: np.ndarray
    up: np.ndarray
    magnitude: np.ndarray | None


def _names(net) -> Names:
    if type(net) not in NAMES:
        known = ", ".join(k.__name__ for k in NAMES)
        raise ConfigError(f"adapters of a {type(net).__name__} have no names elsewhere; those of these have: {known}")
    return NAMES[type(net)]


def _unrolled(net, tree):
    """A tree of parameters or of an adapter with every layer by itself."""
    for name, numbers in _names(net).stacks(net).items():
        if name in tree:
            tree = dit.unstack(tree, name, numbers[0])
    return tree


def _rolled(net, tree, where):
    """Inverse of `_unrolled`."""
    for name, numbers in _names(net).stacks(net).items():
        layers = {i: tree[f"block_{i}"] for i in numbers if f"block_{i}" in tree}
        shapes = [jax.tree.map(np.shape, layer) for layer in layers.values()]
        if layers and (len(layers) < len(numbers) or any(s != shapes[0] for s in shapes)):
            raise ConfigError(f"{where} does not adapt all layers alike, and {name} are one parameter here: set model.scan = False")
        if layers:
            tree = dit.stack(tree, name, numbers)
    return tree


def _theirs(kernel, patch: int):
    """(…, in, out) as torch has it: (out, in) or (out, in, height, width); patch > 0: of a flat kernel that is a convolution
    there."""
    if patch:
        kernel = kernel.reshape(patch, patch, -1, kernel.shape[-1])
    return np.ascontiguousarray(kernel.transpose(kernel.ndim - 1, kernel.ndim - 2, *range(kernel.ndim - 2)))


def _ours(kernel, flat: bool):
    """Inverse of `_theirs`."""
    kernel = kernel.transpose(*range(2, kernel.ndim), 1, 0)
    return np.ascontiguousarray(kernel.reshape(-1, kernel.shape[-1]) if flat else kernel)


def _norms(kernel):
    """||W0|| per output, in float64."""
    return np.sqrt(np.sum(np.square(kernel, dtype=np.float64), axis=tuple(range(kernel.ndim - 1))))


def _places(net, layout: str, kernels) -> dict[str, list]:
    """{their module: [(our path, Place), ...] in their order} of all kernels that have a counterpart."""
    found: dict[str, list] = {}
    for path in kernels:
        try:
            place = lookup(_names(net).places, layout, "layout")(net, tuple(path.split("/")[:-1]))
        except (ValueError, KeyError, AttributeError):
            continue
        found.setdefault(place.module, []).append((path, place))
    return {k: sorted(v, key=lambda each: each[1].index) for k, v in found.items()}


def _block_diagonal(blocks):
    out = np.zeros((sum(b.shape[0] for b in blocks), sum(b.shape[1] for b in blocks)), np.float32)
    row = column = 0
    for b in blocks:
        out[row : row + b.shape[0], column : column + b.shape[1]] = b
        row, column = row + b.shape[0], column + b.shape[1]
    return out


def _same(values) -> bool:
    return all(np.array_equal(v, values[0]) for v in values)


def _joined(found: list[Part], axis: str, module: str) -> Part:
    """One adapter of a matrix of several parts."""
    downs, ups, magnitudes = zip(*found, strict=True)
    if axis == "out":
        magnitude = None if magnitudes[0] is None else np.concatenate(magnitudes)
        if _same(downs):
            return Part(downs[0], np.concatenate(ups), magnitude)
        return Part(np.concatenate(downs), _block_diagonal(ups), magnitude)
    if magnitudes[0] is not None:
        raise ConfigError(ONE_NORM.format(module))
    if _same(ups):
        return Part(np.concatenate(downs, axis=1), ups[0], None)
    return Part(_block_diagonal(downs), np.concatenate(ups, axis=1), None)


def _cut(part: Part, axis: str, sizes: list[int], module: str) -> list[Part]:
    """Inverse of `_joined`; sizes: of the parts along the axis."""
    ends = np.cumsum(sizes)[:-1]
    n, rank = len(sizes), part.down.shape[0]
    if axis == "in" and part.magnitude is not None:
        raise ConfigError(ONE_NORM.format(module))
    cut, whole = (part.up, part.down) if axis == "out" else (part.down.T, part.up.T)  # (size, r) in parts, (r, other)
    pieces = np.split(cut, ends)
    wholes = [whole] * n
    if rank % n == 0:
        ranks = [slice(i * rank // n, (i + 1) * rank // n) for i in range(n)]
        own = [p[:, r] for p, r in zip(pieces, ranks, strict=True)]
        if np.array_equal(_block_diagonal(own), cut):
            pieces, wholes = own, [whole[r] for r in ranks]
    magnitudes = [None] * n if part.magnitude is None else np.split(part.magnitude, ends)
    if axis == "out":
        return [Part(w, p, m) for w, p, m in zip(wholes, pieces, magnitudes, strict=True)]
    return [Part(p.T, w.T, None) for w, p in zip(wholes, pieces, strict=True)]


def to_file(net, params, adapter, lora: Lora, layout: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(tensors, header) of an adapter of `net`, whose (unboxed) parameters are `params`: float32, as `layout` names them.

    ConfigError names what has no counterpart there.
    """
    lookup(LEAVES, layout, "layout")
    if whole := sorted(added(adapter)):
        raise ConfigError(f"{', '.join(whole[:2])}, which the adapter holds whole, cannot be expressed in the layout of {layout}; choose flowjax")
    names = _names(net)
    host = lambda tree: jax.tree.map(np.asarray, tree)  # noqa: E731
    base = traverse_util.flatten_dict(_unrolled(net, host(params)), sep="/")
    own = parts(_unrolled(net, host(adapter)))
    places = _places(net, layout, [k for k in base if k.endswith("kernel")])
    if left := sorted(own.keys() - {path for group in places.values() for path, _ in group}):
        raise ConfigError(f"{', '.join(left[:4])} cannot be expressed in the layout of {layout}: choose a pattern without")
    tensors, ranks = {}, {}
    for module, group in places.items():
        if not (mine := [path for path, _ in group if path in own]):
            continue
        if len(mine) < len(group):
            all_ = ", ".join(path for path, _ in group)
            raise ConfigError(f"{all_} are one matrix in the layout of {layout}: adapt all of them or none")
        patch = net.patch if names.patches and mine == [PATCHES] else 0
        found = [_part_of(own[path], base[path], place, patch) for path, place in group]
        part = found[0] if len(found) == 1 else _joined(found, group[0][1].axis, module)
        ranks[module] = part.down.shape[0]
        tensors |= _named(part, module, layout, _alpha(lora, ranks[module]), names.prefix)
    return tensors, _header(ranks, lora, layout, names.prefix)


def _part_of(part, kernel, place, patch) -> Part:
    down, up = _theirs(part["down"], patch), part["up"].T
    magnitude = (_norms(kernel) + part["magnitude"]).astype(np.float32) if "magnitude" in part else None
    if place.swapped:
        up, magnitude = (v if v is None else np.concatenate(np.split(v, 2)[::-1]) for v in (up, magnitude))
    return Part(down, up, magnitude)


def _alpha(lora, rank: int) -> float:
    """The alpha of a kernel of another rank with the scale of `lora`."""
    return (lora.alpha or lora.rank) * rank / lora.rank


def _named(part, module, layout, alpha, prefix):
    ones, leaves = (1,) * (part.down.ndim - 2), LEAVES[layout]
    name = f"{prefix}.{module}." if layout == "diffusers" else f"lora_unet_{module.replace('.', '_')}."
    out = {name + leaves["down"]: part.down, name + leaves["up"]: part.up.reshape(*part.up.shape, *ones)}
    if part.magnitude is not None:
        shape = (-1, 1, *ones) if layout == "kohya" else (1, -1, *ones) if ones else (-1,)
        out[name + leaves["magnitude"]] = part.magnitude.reshape(shape)
    if "alpha" in leaves:
        out[name + leaves["alpha"]] = np.array(alpha, np.float32)
    return out


def _header(ranks, lora, layout, prefix) -> dict[str, str]:
    if layout == "kohya":
        dim, alpha = str(lora.rank), str(_alpha(lora, lora.rank))
        return {"format": "pt", "ss_network_module": "networks.lora", "ss_network_dim": dim, "ss_network_alpha": alpha}
    odd = {k: v for k, v in ranks.items() if v != lora.rank}
    told = {
        "peft_type": "LORA", "r": lora.rank, "lora_alpha": _alpha(lora, lora.rank), "use_dora": lora.dora,
        "target_modules": sorted(ranks), "rank_pattern": odd, "alpha_pattern": {k: _alpha(lora, v) for k, v in odd.items()},
    }  # fmt: skip
    return {"format": "pt", HEADER: json.dumps({f"{prefix}.{k}": v for k, v in told.items()}, indent=2, sort_keys=True)}


def write(file, net, params, adapter, lora: Lora, layout: str):
    """Write the safetensors file of an adapter."""
    if not isinstance(lora, Lora):
        raise ConfigError(f"the embedding of a new word ({lora.token!r}) has no place in layout {layout!r}; use --adapter=flowjax")
    storage.path(file).write_bytes(files.packed(*to_file(net, params, adapter, lora, layout)))


def read(file, net, params):
    """(adapter, Lora) from a safetensors file in either layout, for `net` whose (unboxed) parameters are `params`.

    ConfigError where it is of another network, where tensors are left over, or where the kernels' scales (alpha / rank) differ.
    """
    state, header = files.tensors(file), files.metadata(file)
    layout = "kohya" if any(".lora_down." in key for key in state) else "diffusers"
    leaves, names = LEAVES[layout], _names(net)
    base = traverse_util.flatten_dict(_unrolled(net, jax.tree.map(np.asarray, params)), sep="/")
    modules: dict[str, dict] = {}
    for key, value in state.items():
        leaf = next((k for k, v in leaves.items() if key.endswith(f".{v}")), None)
        if leaf is None:
            raise ConfigError(f"{file}: {key} is no part of an adapter in the layout of {layout}")
        modules.setdefault(key.removesuffix(f".{leaves[leaf]}"), {})[leaf] = np.asarray(value, np.float32)
    called = _called(net, layout, [k for k in base if k.endswith("kernel")])
    if strange := sorted(modules.keys() - called.keys()):
        some = ", ".join(strange[:4]) + " ..." * (len(strange) > 4)
        raise ConfigError(f"{file} adapts {some}, which a {type(net).__name__} of this size lacks")
    if layout == "diffusers" and HEADER not in header and any(key.startswith("base_model.model.") for key in state):
        header = header | {HEADER: _beside(file)}
    alphas = _alphas(header, layout, names.prefix, file)
    made, scales, ranks = {}, [], set()
    for name, found in modules.items():
        module, group = called[name]
        if not {"down", "up"} <= found.keys():
            raise ConfigError(f"{file}: {name} has only {', '.join(leaves[k] for k in leaves if k in found)}")
        rank = found["down"].shape[0]
        alpha = found["alpha"].item() if "alpha" in found else alphas(module, rank)
        scales.append((alpha, rank))
        up, magnitude = found["up"], found.get("magnitude")
        part = Part(found["down"], up.reshape(up.shape[:2]), None if magnitude is None else magnitude.reshape(-1))
        sizes = [base[path].shape[-1 if place.axis == "out" else -2] for path, place in group]
        pieces = [part]
        if len(group) > 1:
            wanted = part.up.shape[0] if group[0][1].axis == "out" else part.down.shape[1]
            if wanted != sum(sizes):
                needed = " + ".join(map(str, sizes))
                raise ConfigError(f"{file}: {name} has {wanted} rows or columns, not the {needed} of {group[0][0]} ...")
            pieces = _cut(part, group[0][1].axis, sizes, module)
        for (path, place), piece in zip(group, pieces, strict=True):
            flat = path == PATCHES and names.patches
            up, m = piece.up, piece.magnitude
            if place.swapped:
                up, m = (v if v is None else np.concatenate(np.split(v, 2)[::-1]) for v in (up, m))
            down = _ours(piece.down, flat)
            if (*down.shape[:-1], up.shape[0]) != base[path].shape:
                other = *down.shape[:-1], up.shape[0]
                raise ConfigError(f"{file}: {name} adapts a kernel of shape {other}, and {path} is {base[path].shape}")
            made |= {f"{path}/down": down, f"{path}/up": np.ascontiguousarray(up.T)}
            ranks.add(down.shape[-1])
            if m is not None:
                made[f"{path}/magnitude"] = (m - _norms(base[path])).astype(np.float32)
    if not scales:
        raise ConfigError(f"{file} holds no adapter")
    if odd := [s for s in scales if not np.isclose(s[0] * scales[0][1], scales[0][0] * s[1])]:
        raise ConfigError(f"{file} scales its kernels differently, and an adapter has one alpha / rank here: {scales[0]}, {odd[0]}")
    rank, dora = max(ranks), any(k.endswith("/magnitude") for k in made)
    tree = _rolled(net, traverse_util.unflatten_dict(made, sep="/"), file)
    pattern = "^(" + "|".join(sorted(re.escape(path) for path in parts(tree))) + ")$"
    return tree, Lora(pattern, rank, scales[0][0] * rank / scales[0][1], dora)


def _called(net, layout, kernels) -> dict[str, tuple]:
    """{name in a file: (module, its group of `_places`)}; of modules that diffusers' names are used for by others as well."""
    groups = _places(net, layout, kernels)
    prefixes = ("lora_unet_",) if layout == "kohya" else (f"{_names(net).prefix}.", "base_model.model.")
    spell = (lambda module: module.replace(".", "_")) if layout == "kohya" else (lambda module: module)
    return {prefix + spell(module): (module, group) for prefix, (module, group) in itertools.product(prefixes, groups.items())}


def _beside(file) -> str:
    """The settings of a file of peft itself, which are in a file of their own."""
    beside = storage.path(file).parent / "adapter_config.json"
    if not beside.exists():
        raise ConfigError(f"{file} is a file of peft, whose scale is in {beside}, which is missing")
    return beside.read_text()


def _alphas(header, layout, prefix, file) -> Callable:
    """alpha(module, rank) by the header; without one, alpha is the rank, as diffusers and kohya have it."""
    told = files.parse(header[HEADER], HEADER) if layout == "diffusers" and HEADER in header else {}
    told = {k.removeprefix(f"{prefix}."): v for k, v in told.items()}
    if told.get("use_rslora"):
        raise ConfigError(f"{file} is scaled by alpha / sqrt(rank) (use_rslora), which is not supported")
    return lambda module, rank: float((told.get("alpha_pattern") or {}).get(module, told.get("lora_alpha", rank)))
