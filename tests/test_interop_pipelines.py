"""Several text encoders as one: what diffusers' pipelines of SD3 and FLUX feed their transformers, from a pipeline's folder to a prompt."""

import json

import jax
import numpy as np
import pytest
from binaries import shell_in
from nets import close, randomise

from flowjax import models
from flowjax.config import ConfigError
from flowjax.data import records, text
from flowjax.data.pipeline import arrays
from flowjax.interop import library, pipelines, tokenizers
from flowjax.train import export
from tools import parity

START, END, PAD = "<|startoftext|>", "<|endoftext|>", "!"
PROMPTS = ["A red  heart!", "", "it's 2 CAFés"]
CLIP = {**parity.TEXT, "max_position_embeddings": 16, "vocab_size": 520, "projection_dim": 6}
KINDS = {  # sizes of which no two agree
    "text_encoder": ("clip_text", {**CLIP, "hidden_size": 8, "intermediate_size": 32, "num_attention_heads": 2, "eos_token_id": 2}),
    "text_encoder_2": ("clip_text", {**CLIP, "hidden_size": 10, "intermediate_size": 40, "num_attention_heads": 2, "hidden_act": "gelu"}),
    "text_encoder_3": ("t5", {**parity.T5, "d_model": 20, "vocab_size": 60}),
}


def clip_vocabulary(folder, pad):
    """vocab.json and merges.txt of a CLIP, as files before transformers 5 have them, and what pads: every byte, two merges."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    merges = [("a", "t</w>"), ("r", "e")]
    words = [*letters, *(c + "</w>" for c in letters), *("".join(m) for m in merges), START, END]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n")
    special = {"bos_token": {"content": START, "normalized": True}, "eos_token": END, "unk_token": END, "pad_token": pad}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    return words.index(END)


def t5_vocabulary(folder):
    """tokenizer.json of a T5: letters, "</s>" behind every text."""
    import tokenizers as lib

    words = ["<pad>", "</s>", "<unk>", "▁", *"abcdehirst", "▁red", "▁heart"]
    made = lib.Tokenizer(lib.models.Unigram([(w, -float(i)) for i, w in enumerate(words)], unk_id=2))
    made.pre_tokenizer = lib.pre_tokenizers.Metaspace()
    made.add_special_tokens(["<pad>", "</s>", "<unk>"])
    made.post_processor = lib.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir(parents=True)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<pad>", "eos_token": "</s>", "tokenizer_class": "T5TokenizerFast"}))


def write_part(out, kind, config, seed, projected):
    """An encoder with random parameters, in transformers' words."""
    names = {"clip_text": "CLIPTextModelWithProjection" if projected else "CLIPTextModel", "t5": "T5EncoderModel"}
    case = parity.Case("transformers", kind, {"architectures": [names[kind]], "model_type": "t5" if kind == "t5" else "clip_text_model", **config})
    info = library.describe(*case)
    role = export.role_of(info, kind)
    params = jax.tree.map(np.asarray, randomise(export.abstract(role, info), seed))
    library.save(out, "transformers", kind, role.module, params, info)
    return case


def write_pipeline(home, model="sd3_text"):
    """A pipeline's folder with encoders of random parameters and their tokenizers."""
    parts = [("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"), ("text_encoder_3", "tokenizer_3")]
    if model == "flux_text":
        parts = [parts[0], parts[2]]
    for i, (encoder, _) in enumerate(parts):
        suffix = f"_{i + 1}" if i else ""
        kind, config = KINDS[encoder]
        write_part(home / f"text_encoder{suffix}", kind, config, i, model == "sd3_text")
        if kind == "t5":
            t5_vocabulary(home / f"tokenizer{suffix}")
        else:
            end = clip_vocabulary(home / f"tokenizer{suffix}", PAD if i else END)
            file = home / f"text_encoder{suffix}" / "config.json"
            told = json.loads(file.read_text())
            file.write_text(json.dumps({**told, "eos_token_id": 2 if told["eos_token_id"] == 2 else end}))  # 2: as old files mean it
    return home


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("sd3") / "pipeline")


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("flux") / "pipeline", "flux_text")


def ours(folder, model, **fields):
    """(sequence, pooled) of PROMPTS."""
    params, info, contents = pipelines.load(folder, model, fields)
    (folder / "made").mkdir(exist_ok=True)
    export.write_tokenizer(folder / "made", contents)
    tokens = text.build(text.stored(info["text"], folder / "made"))(PROMPTS)
    net = export.role_of(info, "text").net(params)
    return jax.jit(lambda tokens: net(tokens))(tokens)


def theirs(folder, model, length):
    """The same of diffusers' pipeline."""
    import diffusers
    import transformers

    clip = transformers.CLIPTextModelWithProjection if model == "sd3_text" else transformers.CLIPTextModel
    last = 3 if model == "sd3_text" else 2
    given = {}
    for i in range(1, last + 1):
        suffix = f"_{i}" if i > 1 else ""
        encoder, tokenizer = (transformers.T5EncoderModel, transformers.PreTrainedTokenizerFast) if i == last else (clip, transformers.CLIPTokenizer)
        if not (folder / f"text_encoder{suffix}").exists():
            given |= {f"text_encoder{suffix}": None, f"tokenizer{suffix}": None}
            continue
        given[f"text_encoder{suffix}"] = encoder.from_pretrained(folder / f"text_encoder{suffix}").eval()
        options = {} if i == last else {"model_max_length": 16}
        given[f"tokenizer{suffix}"] = tokenizer.from_pretrained(folder / f"tokenizer{suffix}", **options)
    if model == "flux_text":
        pipe = diffusers.FluxPipeline(scheduler=None, vae=None, transformer=None, **given)
        sequence, pooled, _ = pipe.encode_prompt(PROMPTS, None, device="cpu", max_sequence_length=length)
        return sequence, pooled
    transformer = diffusers.SD3Transformer2DModel(**parity.SD3)
    pipe = diffusers.StableDiffusion3Pipeline(transformer=transformer, scheduler=None, vae=None, **given)
    sequence, _, pooled, _ = pipe.encode_prompt(PROMPTS, None, None, device="cpu", do_classifier_free_guidance=False, max_sequence_length=length)
    return sequence, pooled


@pytest.mark.oracle
@pytest.mark.parametrize("model", ["sd3_text", "flux_text", "without_t5"])
def test_what_the_pipelines_of_diffusers_feed(model, tmp_path):
    for module in ("torch", "diffusers", "transformers"):
        pytest.importorskip(module)
    folder, absent = write_pipeline(tmp_path / "p", model.replace("without_t5", "sd3_text")), {}
    if model == "without_t5":
        (folder / "text_encoder_3").rename(tmp_path / "gone")
        absent, model = {"absent": (12, 20)}, "sd3_text"
    lengths = (16, 16, 12)[: 2 if absent else 3] if model == "sd3_text" else (16, 12)
    import torch

    with torch.no_grad():
        for mine, wanted in zip(ours(folder, model, lengths=lengths, **absent), theirs(folder, model, 12), strict=True):
            close(mine, wanted.numpy(), 2e-5)


def test_sd3_is_its_three_encoders_put_together(sd3):
    params, info, _ = pipelines.load(sd3, "sd3_text", {"lengths": (16, 16, 12)})
    net, tokens = export.role_of(info, "text").net(params), np.random.RandomState(0).randint(0, 60, (2, 44))
    sequence, pooled = net(tokens)
    each = [models.build(section).apply({"params": params[f"encoder_{i}"]}, part) for i, (section, part) in
            enumerate(zip(info["model"]["encoders"], np.split(tokens, (16, 32), axis=1), strict=True))]  # fmt: skip
    assert sequence.shape == (2, 28, 20) and pooled.shape == (2, 12)
    np.testing.assert_allclose(sequence[:, :16, :8], each[0][0], atol=1e-6)
    np.testing.assert_allclose(sequence[:, :16, 8:18], each[1][0], atol=1e-6)
    assert not sequence[:, :16, 18:].any()
    np.testing.assert_allclose(sequence[:, 16:], each[2][0], atol=1e-6)
    np.testing.assert_allclose(pooled, np.concatenate([each[0][1], each[1][1]], axis=1), atol=1e-6)


def test_tokens_of_a_prompt(sd3):
    """CLIP: start, lower-case words, end, padding of its own; a "!" is the padding where that is what pads. T5: words, end, 0."""
    _, info, contents = pipelines.load(sd3, "sd3_text", {"lengths": (16, 16, 12)})
    (sd3 / "seen").mkdir(exist_ok=True)
    export.write_tokenizer(sd3 / "seen", contents)
    row = text.build(text.stored(info["text"], sd3 / "seen"))(["RE  at!"])[0]
    vocab = json.loads((sd3 / "tokenizer" / "vocab.json").read_text())
    start, end, pad = vocab[START], vocab[END], vocab["!"]
    words = [start, vocab["r"], vocab["e</w>"], vocab["at</w>"]]
    assert row[:16].tolist() == [*words, vocab["!</w>"], end, *[end] * 10]
    assert row[16:32].tolist() == [*words, pad, end, *[pad] * 10]
    last = row[32:].tolist()
    assert last.count(1) == 1 and last.index(1) > 2 and not any(last[last.index(1) + 1 :]) and last[-1] == 0


def test_what_is_cut_keeps_its_end(sd3, tmp_path):
    content, pad = tokenizers.read(sd3 / "tokenizer_2")
    (tmp_path / "t.json").write_bytes(content)
    made = text.build({"name": "file", "path": str(tmp_path / "t.json"), "length": 4, "pad": 0, "truncate": True})
    vocab = json.loads((sd3 / "tokenizer" / "vocab.json").read_text())
    assert pad == vocab["!"] and made(["at at at at"])[0].tolist() == [vocab[START], vocab["at</w>"], vocab["at</w>"], vocab[END]]


def test_from_a_pipeline_to_a_prompt_and_to_stored_embeddings(sd3, tmp_path):
    run = shell_in(tmp_path)
    case = parity.CASES["sd3"]
    info = library.describe(*case)
    role = export.role_of(info, "sd3")
    params = jax.tree.map(np.asarray, randomise(export.abstract(role, info), 7))
    library.save(tmp_path / "transformer", "diffusers", "sd3", role.module, params, info)
    run("tools.convert_weights", "--from=diffusers", "--model=sd3_text", "--fields={'lengths': (16, 16, 12)}", str(sd3), "text")
    run("tools.convert_weights", "--from=diffusers", "--model=sd3", "--text=text", "transformer", "sd3")
    sample = "experiments.sample", "--checkpoint=sd3", "--prompt=a red heart", "--steps=1", "--count=2", "--guidance=4"
    run(*sample, "--out=a")
    run(*sample, "--out=b", "--negative=")  # guided away from the empty prompt either way
    run(*sample, "--out=c", "--negative=cats")
    a, b, c = (np.load(tmp_path / name / "samples.npz")["x"] for name in "abc")
    np.testing.assert_array_equal(a, b)
    assert np.isfinite(a).all() and np.abs(a - c).max() > 1e-4

    rows = (("train", f"row {i}", {"image": np.zeros((2, 2, 1), np.uint8), "caption": p}) for i, p in enumerate(PROMPTS))
    records.write(tmp_path / "images", rows, name="captioned")
    data = "{'name': 'array_record', 'path': 'images'}"
    run("tools.encode_latents", "--text=text", "--out=e", f"--data={data}", "--splits=train", "--dtype=float32")
    cond = arrays({"name": "array_record", "path": str(tmp_path / "e")}, "train")["cond"]
    for mine, wanted in zip(ours(sd3, "sd3_text", lengths=(16, 16, 12)), (cond["text"], cond["pooled"]), strict=True):
        np.testing.assert_allclose(mine, wanted, atol=1e-5)
    assert sorted(p.name for p in (tmp_path / "e").glob("tokenizer*")) == ["tokenizer_0.json", "tokenizer_1.json", "tokenizer_2.json"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lengths": (16, 16)}, "lengths = .* should be 3 numbers"),
        ({"lengths": (16, 16, 0)}, "at least 1"),
        ({"layout": "flux"}, "takes 2 encoders"),
        ({"layout": "sd4"}, "valid: flux, sd3"),
        ({"encoder_2": {"dtyp": "bfloat16"}}, "dtyp is unknown"),
        ({"depth": 3}, "depth is unknown"),
    ],
)
def test_refused(sd3, fields, message):
    with pytest.raises(ConfigError, match=message):
        pipelines.load(sd3, "sd3_text", fields)


def test_tokenizers_that_do_not_fit_are_refused(sd3):
    _, info, _ = pipelines.load(sd3, "sd3_text", {"lengths": (16, 16, 12)})
    module = export.role_of(info, "text").module
    parts = [{"name": "bytes", "length": n} for n in (16, 16, 12)]
    fit = lambda parts: text.mismatch(text.build({"name": "joined", "parts": parts}), module.vocab, module.lengths)  # noqa: E731
    assert "vocab = 60, but the tokenizer has 257" in fit(parts)
    assert "[16, 12, 16]" in fit([parts[0], parts[2], parts[1]])
    assert "3 text encoders, but 2 tokenizers" in fit(parts[:2])
