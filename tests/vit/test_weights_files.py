"""Files of weights as people have them: what loads is timm's own model."""

from __future__ import annotations

import argparse
import json
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from people_weights import State, assert_same, load, timm_model, under
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.models import beit, eva, vision_transformer
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from dfq.errors import WeightsError
from dfq.vit.positions import likely_grid
from dfq.vit.weights import read_weights


def zeros(state: State) -> State:
    return {key: torch.zeros_like(value) for key, value in state.items()}


def renamed(old: str, new: str) -> Callable[[Any, State], Any]:
    return lambda _, state: {key.replace(old, new): value for key, value in state.items()}


def beside(state: State) -> dict[str, Any]:
    """A training checkpoint with what scripts keep beside the weights."""
    return {
        "state_dict": state,
        "epoch": np.int64(3),
        "best": np.float64(81.2),
        "history": np.arange(6).reshape(2, 3),
        "where": Path("runs") / "1",
        "posix": PurePosixPath("runs"),
        "args": argparse.Namespace(lr=0.1, out=Path("runs"), norm=np.float32(1)),
        "config": SimpleNamespace(depth=2),
        "took": timedelta(seconds=3),
        "counts": defaultdict(list, a=[1]),
        "names": OrderedDict(a=1),
    }


PREFIXES = [
    "model.",
    "backbone.",
    "net.",
    "timm_model.",
    "teacher.backbone.",
    "module.",
    "_orig_mod.",
    "module._orig_mod.",
    "_orig_mod.module.",
    "model.module.",
    "model._orig_mod.backbone.",
    "_fsdp_wrapped_module.",
]


LOADS: dict[str, Callable[[Any, State], Any]] = {
    **{f"names after {prefix}": under(prefix) for prefix in PREFIXES},
    "a data-parallel module": lambda m, _: nn.DataParallel(m).state_dict(),
    "torch's averaged module": lambda m, _: AveragedModel(m).state_dict(),
    "timm's averaged module": lambda m, _: ModelEmaV3(m).state_dict(),
    "an averaged module in a checkpoint": lambda m, s: {
        "model": zeros(s),
        "model_ema": AveragedModel(m).state_dict(),
    },
    "averaged beside trained weights": lambda _, s: {
        **under("online_model.")(None, zeros(s)),
        **under("ema_model.")(None, s),
        "num_updates": torch.tensor(3),
    },
    "compiled blocks": renamed("blocks.1.", "blocks.1._orig_mod."),
    "checkpointed blocks": renamed("blocks.", "blocks._checkpoint_wrapped_module."),
    "a loss beside the model": under("model.", {"criterion.weight": torch.ones(5)}),
    "objects beside the weights": lambda _, s: beside(s),
    "a checkpoint in a checkpoint": lambda _, s: {"model": {"state_dict": s, "epoch": 1}},
    "a head of dropout and linear": renamed("head.", "head.1."),
    "patches as a linear layer": lambda _, s: {
        **s,
        "patch_embed.proj.weight": s["patch_embed.proj.weight"].flatten(1),
    },
    "what masked pretraining leaves": lambda _, s: {
        **s,
        "mask_token": torch.zeros(1, 48),
        "decoder_blocks.0.norm1.weight": torch.ones(8),
    },
}


@pytest.mark.parametrize("made", LOADS.values(), ids=LOADS.keys())
def test_weights_are_read_as_people_have_them(
    made: Callable[[Any, State], Any], timm_vit: Any, timm_state: State, tmp_path: Path
) -> None:
    torch.save(made(timm_vit, timm_state), tmp_path / "weights.pth")
    assert_same(load(tmp_path / "weights.pth"), timm_vit)


def test_a_head_without_a_bias_adds_nothing(tmp_path: Path) -> None:
    model = timm_model()
    model.head.bias.data.zero_()
    state = {k: v for k, v in model.state_dict().items() if k != "head.bias"}
    torch.save(state, tmp_path / "weights.pth")
    assert_same(load(tmp_path / "weights.pth"), model)


def test_what_lies_beside_the_model_is_said(timm_state: State, tmp_path: Path) -> None:
    torch.save(
        under("model.", {"loss.weight": torch.ones(5)})(None, timm_state), tmp_path / "w.pth"
    )
    (note,) = load(tmp_path / "w.pth").notes
    assert "'loss.weight'" in note
    torch.save(timm_state, tmp_path / "w.pth")
    assert load(tmp_path / "w.pth").notes == ()


def test_sharded_weights_are_read_by_their_index(
    timm_vit: Any, timm_state: State, tmp_path: Path
) -> None:
    keys = sorted(timm_state)
    names = {key: f"model-0000{1 + (i > 9)}-of-00002.safetensors" for i, key in enumerate(keys)}
    for name in set(names.values()):
        save_file({k: timm_state[k] for k in keys if names[k] == name}, tmp_path / name)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    assert_same(load(index), timm_vit)
    with pytest.raises(WeightsError, match=r"one of several files.*index\.json"):
        load(tmp_path / "model-00001-of-00002.safetensors")
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"'model-00002-of-00002\.safetensors'.* is missing"):
        load(index)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "no index of sharded weights"),
        ([1], "no index of sharded weights"),
        ({"weight_map": {"a": "../other.safetensors"}}, "is no file beside it"),
        ({"weight_map": {"a": 1}}, "is no file beside it"),
    ],
    ids=str,
)
def test_an_index_names_files_beside_it_alone(content: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(WeightsError, match=message):
        read_weights(tmp_path / "model.safetensors.index.json")


def test_an_index_whose_files_lack_a_tensor_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "a.safetensors", "b": "a.safetensors"}}))
    with pytest.raises(WeightsError, match=r"lacks 1 tensors that .*, such as 'b'"):
        read_weights(index)


def test_a_tensor_is_read_from_the_file_that_the_index_says(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1), "extra": torch.ones(1)}, tmp_path / "1.safetensors")
    save_file({"b": torch.ones(1), "a": torch.zeros(1)}, tmp_path / "2.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    state = read_weights(index)
    assert (set(state), float(state["a"])) == ({"a", "b"}, 1.0)


def test_an_index_of_an_odd_form_is_refused(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    for content in ("[" * 100_000, json.dumps({"weight_map": {"a": "y" * 300}})):
        index.write_text(content)
        with pytest.raises(WeightsError, match=r"no index of sharded weights|is missing"):
            read_weights(index)


def test_two_names_of_one_parameter_are_refused(timm_state: State, tmp_path: Path) -> None:
    other = {"blocks._orig_mod.0.norm1.bias": timm_state["blocks.0.norm1.bias"] + 5}
    torch.save(timm_state | other, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"two tensors for .*_orig_mod"):
        load(tmp_path / "w.pth")


def test_objects_beside_the_weights_are_never_made(tmp_path: Path) -> None:
    class Marked(dict):  # type: ignore[type-arg]
        """Pickled under the name of a class that is read over."""

        def __init__(self, *_: Any) -> None:
            (tmp_path / "marker").touch()

    Marked.__module__, Marked.__qualname__, Marked.__name__ = "yacs.config", "CfgNode", "CfgNode"
    import sys

    sys.modules["yacs"] = sys.modules["yacs.config"] = SimpleNamespace(CfgNode=Marked)  # type: ignore[assignment]
    try:
        torch.save({"state_dict": {"a": torch.ones(1)}, "cfg": Marked()}, tmp_path / "w.pth")
        (tmp_path / "marker").unlink()
        assert list(read_weights(tmp_path / "w.pth")) == ["a"]
    finally:
        del sys.modules["yacs"], sys.modules["yacs.config"]
    assert not (tmp_path / "marker").exists()


# ---- fine-tuned with mean pooling


@pytest.mark.parametrize("masked", [False, True])
def test_a_fine_tuned_mae_is_told_by_its_norm(masked: bool, tmp_path: Path) -> None:
    model = timm_model(global_pool="avg")
    left = {"mask_token": torch.zeros(1, 48)} if masked else {}
    torch.save({"model": {**model.state_dict(), **left}}, tmp_path / "mae.pth")
    loaded = load(tmp_path / "mae.pth")
    assert (loaded.vit.arch.pool, loaded.vit.arch.pooled_norm) == ("avg", True)
    assert_same(loaded, model)


def test_a_norm_elsewhere_than_the_models_needs_the_pooling(tmp_path: Path) -> None:
    name = "vit_base_patch16_siglip_gap_224"  # pooled by the mean, then normed
    model = timm_model(name, global_pool="avg", fc_norm=False)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    assert_same(load(tmp_path / "w.safetensors", name, global_pool="avg"), model)
    other = timm_model("beit_base_patch16_224", use_fc_norm=False)
    save_file(other.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"norm lies before the pooling.*global_pool"):
        load(tmp_path / "w.safetensors", "beit_base_patch16_224")
    for pool in ("avg", "token"):
        expected = timm_model("beit_base_patch16_224", global_pool=pool, use_fc_norm=False)
        assert_same(
            load(tmp_path / "w.safetensors", "beit_base_patch16_224", global_pool=pool), expected
        )


@pytest.mark.parametrize("channels", [1, 2, 4, 6])
def test_channels_are_told_from_the_file(channels: int, tmp_path: Path) -> None:
    model = timm_model(in_chans=channels)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    half = [0.5] * channels
    assert_same(load(tmp_path / "w.safetensors", mean=half, std=half), model)


# ---- CLIP's towers


def clip_tower(name: str) -> Any:
    return timm_model(name, num_classes=7)


def in_open_clip(model: Any) -> State:
    """A timm tower as open_clip saves it, beside a text tower."""
    state = model.state_dict()
    trunk = {f"visual.trunk.{k}": v for k, v in state.items() if not k.startswith("head.")}
    text = {"logit_scale": torch.ones(()), "transformer.resblocks.0.ln_1.weight": torch.ones(8)}
    return {**trunk, "visual.head.proj.weight": state["head.weight"], **text}


def in_openai_names(model: Any) -> State:
    """The same in the names of CLIP's own code."""
    swaps = [
        ("patch_embed.proj", "conv1"),
        ("norm_pre", "ln_pre"),
        ("blocks.", "transformer.resblocks."),
        ("norm1", "ln_1"),
        ("norm2", "ln_2"),
        ("attn.qkv.", "attn.in_proj_"),
        ("attn.proj", "attn.out_proj"),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
    ]
    renamed: State = {}
    for key, value in model.state_dict().items():
        name = key
        for ours, theirs in swaps:
            name = name.replace(ours, theirs)
        name = name.replace("norm.", "ln_post.") if name.startswith("norm.") else name
        special = {
            "cls_token": ("class_embedding", value.reshape(-1)),
            "pos_embed": ("positional_embedding", value[0]),
        }
        name, value = special.get(key, (name, value))
        if key == "head.weight":
            name, value = "proj", value.T.contiguous()
        if key != "head.bias":
            renamed[name] = value
    return renamed


CLIP = "vit_base_patch16_clip_224"


@pytest.mark.parametrize("prefix", ["", "module.", "model."])
@pytest.mark.parametrize("layout", ["open_clip", "openai", "openai tower alone"])
def test_a_clip_towers_projection_is_its_head(layout: str, prefix: str, tmp_path: Path) -> None:
    model = clip_tower(CLIP)
    model.head.bias.data.zero_()
    if layout == "open_clip":
        state = in_open_clip(model)
    else:
        tower = "visual." if layout == "openai" else ""
        text = {"ln_final.weight": torch.ones(8)} if tower else {}
        state = {f"{tower}{k}": v for k, v in in_openai_names(model).items()} | text
    torch.save({f"{prefix}{k}": v for k, v in state.items()}, tmp_path / "clip.pt")
    loaded = load(tmp_path / "clip.pt", CLIP)
    assert_same(loaded, model)
    assert "projection to 7 values is loaded as the head" in loaded.notes[0]
    model.head = nn.Identity()
    features = load(tmp_path / "clip.pt", CLIP, num_classes=0)
    assert features.notes == ()
    assert_same(features, model)


def test_a_projection_of_several_layers_is_refused(tmp_path: Path) -> None:
    state = in_open_clip(clip_tower(CLIP))
    state["visual.head.mlp.fc1.weight"] = state.pop("visual.head.proj.weight")
    torch.save(state, tmp_path / "clip.pt")
    with pytest.raises(WeightsError, match=r"projection of other layers.*num_classes=0"):
        load(tmp_path / "clip.pt", CLIP)
    assert load(tmp_path / "clip.pt", CLIP, num_classes=0).vit.arch.num_classes == 0


# ---- names that timm translates


def test_metas_names_of_dinov2_registers(tmp_path: Path) -> None:
    name = "vit_small_patch14_reg4_dinov2"
    model = timm_model(name, num_classes=0, img_size=28)
    state = dict(model.state_dict())
    state["register_tokens"] = state.pop("reg_token")
    first = torch.full((1, 1, 48), 0.25)
    state["pos_embed"] = torch.cat([first, state["pos_embed"]], 1)
    state["cls_token"] = state["cls_token"] - first
    torch.save(state, tmp_path / "dinov2.pth")
    assert_same(load(tmp_path / "dinov2.pth", name, img_size=28), model)


# ---- JAX


def in_jax_names(model: Any, layout: str) -> dict[str, Any]:
    """A timm model in the names and layouts of Flax: kernels ``[in, out]``, convolutions
    ``[H, W, in, out]``, attention ``[in, heads, head_dim]`` and back."""
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    heads, dim = model.blocks[0].attn.num_heads, model.embed_dim
    attention, mlp, second = (1, 3, 2) if layout == "augreg" else (0, 0, 1)
    renamed = {
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "head/kernel": state["head.weight"].T,
        "head/bias": state["head.bias"],
        "cls": state["cls_token"],
    }
    table = "Transformer/posembed_input/pos_embedding" if layout == "augreg" else "pos_embedding"
    renamed[table] = state["pos_embed"]
    blocks: list[dict[str, np.ndarray]] = []
    for index in range(len(model.blocks)):
        ours = {k: state[f"blocks.{index}.{k}"] for k in dict(model.blocks[0].state_dict())}
        multi = f"MultiHeadDotProductAttention_{attention}"
        block = {
            f"{multi}/out/kernel": ours["attn.proj.weight"].T.reshape(heads, -1, dim),
            f"{multi}/out/bias": ours["attn.proj.bias"],
        }
        for part, name in enumerate(("query", "key", "value")):
            rows = slice(part * dim, (part + 1) * dim)
            kernel = ours["attn.qkv.weight"][rows].T.reshape(dim, heads, -1)
            block[f"{multi}/{name}/kernel"] = kernel
            block[f"{multi}/{name}/bias"] = ours["attn.qkv.bias"][rows].reshape(heads, -1)
        for norm, number in (("norm1", 0), ("norm2", second)):
            block[f"LayerNorm_{number}/scale"] = ours[f"{norm}.weight"]
            block[f"LayerNorm_{number}/bias"] = ours[f"{norm}.bias"]
        for number in range(2):
            dense = f"MlpBlock_{mlp}/Dense_{number}"
            block[f"{dense}/kernel"] = ours[f"mlp.fc{number + 1}.weight"].T
            block[f"{dense}/bias"] = ours[f"mlp.fc{number + 1}.bias"]
        blocks.append(block)
    if layout == "one stack":
        for key in blocks[0]:
            renamed[f"Transformer/encoderblock/{key}"] = np.stack([block[key] for block in blocks])
    else:
        for index, block in enumerate(blocks):
            renamed |= {f"Transformer/encoderblock_{index}/{k}": v for k, v in block.items()}
    return renamed


@pytest.mark.parametrize("prefix", ["", "opt/target/"])
def test_jaxs_vision_transformers_are_read(prefix: str, timm_vit: Any, tmp_path: Path) -> None:
    arrays = in_jax_names(timm_vit, "augreg")
    np.savez(tmp_path / "w.npz", **{f"{prefix}{key}": value for key, value in arrays.items()})
    assert_same(load(tmp_path / "w.npz"), timm_vit)
    with pytest.raises(WeightsError, match=r"patches of 16 x 16 pixels, .* has 32 x 32"):
        load(tmp_path / "w.npz", "vit_base_patch32_224")


@pytest.mark.parametrize("prefix", ["", "params/", "params/img/"])
@pytest.mark.parametrize("layout", ["big vision", "one stack"])
def test_big_visions_transformers_are_read(layout: str, prefix: str, tmp_path: Path) -> None:
    model = timm_model(no_embed_class=True)
    arrays = in_jax_names(model, layout)
    np.savez(tmp_path / "w.npz", **{f"{prefix}{key}": value for key, value in arrays.items()})
    actual, expected = read_weights(tmp_path / "w.npz"), model.state_dict()
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key


def test_jaxs_layer_before_the_head_is_not_left_out_without_a_word(tmp_path: Path) -> None:
    arrays = in_jax_names(timm_model(), "augreg")
    extra: dict[str, Any] = {"pre_logits/kernel": np.eye(48), "pre_logits/bias": np.zeros(48)}
    np.savez(tmp_path / "w.npz", **arrays, **extra)
    with pytest.raises(WeightsError, match=r"a layer before its head.*num_classes=0"):
        load(tmp_path / "w.npz")


@pytest.mark.parametrize("missing", ["embedding/kernel", "head/kernel", "cls"])
def test_other_numpy_archives_are_named(missing: str, tmp_path: Path) -> None:
    arrays = in_jax_names(timm_model(), "augreg")
    np.savez(tmp_path / "w.npz", **{k: v for k, v in arrays.items() if k != missing})
    with pytest.raises(WeightsError, match=r"w\.npz' is a NumPy archive|no class token|entries"):
        load(tmp_path / "w.npz")


# ---- image sizes

SIZES = [(48, 48), (32, 64), (64, 32), (80, 16)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("vit_base_patch16_224", vision_transformer),
        ("deit3_base_patch16_224", vision_transformer),
        ("eva02_base_patch14_224", eva),
        ("beit_base_patch16_224", beit),
    ],
)
def test_positions_are_resampled_as_timm_does(
    name: str, module: Any, size: tuple[int, int], tmp_path: Path
) -> None:
    patch = 14 if "14" in name else 16
    height, width = (side // 16 * patch for side in size)
    trained = timm_model(name, img_size=3 * patch)
    model = timm_model(name, img_size=(height, width))
    state = dict(trained.state_dict())
    torch.save(state, tmp_path / "w.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm's own
        model.load_state_dict(module.checkpoint_filter_fn(state, model), strict=False)
    assert_same(load(tmp_path / "w.pth", name, img_size=[height, width]), model)


def smooth_positions(grid: tuple[int, int], width: int = 48, prefix: int = 1) -> Tensor:
    """Position embeddings ``[1, prefix + N, width]`` whose neighbors resemble each other, as
    training makes them."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, prefix + 16, width, generator=generator)
    return resample_abs_pos_embed(coarse, list(grid), [4, 4], num_prefix_tokens=prefix)


@pytest.mark.parametrize("grid", [(8, 8), (4, 16), (16, 4)], ids=str)
def test_the_grid_of_learned_positions_is_told(grid: tuple[int, int]) -> None:
    assert likely_grid(smooth_positions(grid)[0, 1:], (8, 8)) == grid
    assert likely_grid(torch.randn(64, 48), grid) == grid


def with_positions(grid: tuple[int, int]) -> State:
    size = (16 * grid[0], 16 * grid[1])
    return {**timm_model(img_size=size).state_dict(), "pos_embed": smooth_positions(grid)}


def test_another_grid_of_as_many_patches_is_not_taken_for_the_models(tmp_path: Path) -> None:
    torch.save(with_positions((7, 28)), tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"7 x 28 patches, not 14 x 14.*img_size=\(112, 448\)"):
        load(tmp_path / "w.pth", img_size=None)
    for size in ([112, 448], 224):  # a size that is named is what it is
        loaded = load(tmp_path / "w.pth", img_size=size).vit
        assert torch.equal(loaded.pos_embed, smooth_positions((7, 28))[0, 1:])


def test_a_grid_that_is_not_square_is_not_resampled_as_if_it_were(tmp_path: Path) -> None:
    torch.save(with_positions((4, 16)), tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"4 x 16 patches, not 8 x 8.*img_size=\(64, 256\)"):
        load(tmp_path / "w.pth", img_size=224)
    torch.save(with_positions((6, 9)), tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"55 entries.*not square.*img_size=\(96, 144\) or"):
        load(tmp_path / "w.pth", img_size=224)
    assert load(tmp_path / "w.pth", img_size=[96, 144]).vit.arch.image_size == (96, 144)
