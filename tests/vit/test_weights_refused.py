"""Files of weights that do not fit, or are something else, are named for what they are."""

from __future__ import annotations

import gzip
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from people_weights import SMALL, State, assert_same, load, timm_model, under
from safetensors.torch import save_file
from torch import nn

from dfq.errors import UnknownModelError, WeightsError
from dfq.vit.load import load_model


def without(state: State, *parts: str) -> State:
    return {k: v for k, v in state.items() if not k.startswith(parts)}


def random_vit(**changes: Any) -> State:
    return dict(timm_model(**changes).state_dict())


REFUSED: dict[str, tuple[Callable[[State], Any], str]] = {
    # architectures
    "another width": (lambda _: random_vit(embed_dim=64), "a width of 64, .* a width of 48"),
    "another depth": (lambda _: random_vit(depth=3), "it has 3 blocks, .* has 2 blocks"),
    "no class token": (
        lambda _: random_vit(class_token=False, global_pool="avg", fc_norm=False),
        "it has no class token, .* has class token",
    ),
    "registers": (lambda _: random_vit(reg_tokens=4), "it has 4 registers, .* has 0 registers"),
    "layer scale": (lambda _: random_vit(init_values=1), "layer scale, .* has no layer scale"),
    "a distilled model": (
        lambda _: random_vit(name="deit_base_distilled_patch16_224"),
        "distillation token, .* has no distillation token",
    ),
    "an MLP of another width": (lambda _: random_vit(mlp_ratio=2), "'blocks.0.mlp.fc1.weight'"),
    "no position of the class token": (
        lambda s: {**s, "pos_embed": s["pos_embed"][:, 1:]},
        "4 entries, one a patch; .* 1 more",
    ),
    "other patches": (
        lambda _: random_vit(patch_size=8),
        "patches of 8 x 8 pixels, .* has 16 x 16",
    ),
    "other patches as a linear layer": (
        lambda s: {**s, "patch_embed.proj.weight": torch.zeros(48, 192)},
        "patches of 192 values.*in_chans",
    ),
    "another image size": (
        lambda _: random_vit(img_size=48),
        r"image size .* 10 entries, the model's 197, .*img_size=48",
    ),
    "another number of classes": (
        lambda _: random_vit(num_classes=7),
        "head of 7 classes.*num_classes=7",
    ),
    "a layer before the head": (
        lambda s: {**s, "pre_logits.fc.weight": torch.zeros(48, 48)},
        "a layer before its head.*num_classes=0",
    ),
    "a head of two layers": (
        lambda s: {
            **without(s, "head."),
            "head.0.weight": s["head.weight"],
            "head.2.weight": 1.0 * s["head.weight"],
        },
        "a head of other layers than one linear one.*num_classes=0",
    ),
    "a classifier beside the backbone": (
        lambda s: {
            **under("backbone.")(None, without(s, "head.")),
            "classifier.weight": torch.zeros(5, 48),
        },
        "has 'classifier.weight' beside the model.*num_classes=0",
    ),
    "a student and its teacher": (
        lambda s: {"student": under("backbone.")(None, s), "teacher": under("backbone.")(None, s)},
        r"holds 2 models, .*'student\.backbone\.', 'teacher\.backbone\.'",
    ),
    # weights in parts
    "LoRA": (
        lambda s: {**s, "blocks.0.attn.qkv.lora_A.weight": torch.zeros(2, 48)},
        r"an adapter beside the weights.*merge_and_unload",
    ),
    "weight norm": (
        lambda s: {**s, "head.parametrizations.weight.original0": torch.zeros(5)},
        "parametrized weights",
    ),
    "pruning": (lambda s: {**s, "head.weight_mask": torch.ones(5, 48)}, "pruned"),
    "quantized linear layers": (
        lambda s: {**s, "blocks.0.mlp.fc1.SCB": torch.ones(192)},
        "quantized weights.*float model",
    ),
    "8-bit floats": (
        lambda s: {**s, "head.weight": s["head.weight"].to(torch.float8_e4m3fn)},
        "float8_e4m3fn, .*float16, bfloat16 or float32",
    ),
    "4-bit floats": (
        lambda s: {**s, "head.weight": torch.zeros(5, 24).byte().view(torch.float4_e2m1fn_x2)},
        "float4_e2m1fn_x2, .*float16, bfloat16 or float32",
    ),
    "integers": (
        lambda s: {**s, "norm.weight": s["norm.weight"].to(torch.int8)},
        "'norm.weight' is torch.int8; weights are floating-point",
    ),
    "no values": (
        lambda s: {**s, "norm.weight": torch.ones(48, device="meta")},
        "on the meta device",
    ),
    # formats of others
    "Transformers": (
        lambda _: {
            "vit.embeddings.patch_embeddings.projection.weight": torch.zeros(48, 3, 16, 16),
            "vit.encoder.layer.0.attention.attention.query.weight": torch.zeros(48, 48),
        },
        "names of Transformers.*dfq models",
    ),
    "Transformers' CLIP": (
        lambda _: {"vision_model.embeddings.patch_embedding.weight": torch.zeros(48, 3, 16, 16)},
        "names of Transformers",
    ),
    "torchvision": (
        lambda _: {
            "conv_proj.weight": torch.zeros(48, 3, 16, 16),
            "encoder.layers.encoder_layer_0.ln_1.weight": torch.zeros(48),
        },
        "names of torchvision",
    ),
    "OpenMMLab": (
        lambda _: {
            "backbone.patch_embed.projection.weight": torch.zeros(48, 3, 16, 16),
            "backbone.layers.0.ln1.weight": torch.zeros(48),
            "head.layers.head.weight": torch.zeros(5, 48),
        },
        "names of OpenMMLab",
    ),
    "vit-pytorch": (
        lambda _: {"to_patch_embedding.1.weight": torch.zeros(48, 768)},
        "names of vit-pytorch",
    ),
    "ResNet": (
        lambda _: {
            "conv1.weight": torch.zeros(64, 3, 7, 7),
            "layer1.0.conv1.weight": torch.zeros(64, 64, 3, 3),
        },
        "a convolutional network",
    ),
    "Swin": (
        lambda _: {
            "patch_embed.proj.weight": torch.zeros(96, 3, 4, 4),
            "layers.0.blocks.0.norm1.weight": torch.zeros(96),
        },
        "in stages, such as Swin",
    ),
    "names of nobody": (
        lambda _: {"a.weight": torch.zeros(2, 2), "b.weight": torch.zeros(2)},
        "no patch embedding under a name that timm knows; its names are 'a.weight', 'b.weight'",
    ),
}


@pytest.mark.parametrize(("made", "cause"), REFUSED.values(), ids=REFUSED.keys())
def test_weights_that_do_not_fit_are_refused_by_their_cause(
    made: Callable[[State], Any], cause: str, timm_state: State, tmp_path: Path
) -> None:
    torch.save(made(timm_state), tmp_path / "weights.pth")
    named: dict[str, Any] = {"img_size": None} if "image size" in cause else {}
    classes = 5 if "num_classes=7" in cause else None
    with pytest.raises(WeightsError, match=cause) as caught:
        load(tmp_path / "weights.pth", num_classes=classes, **named)
    assert "weights.pth" in str(caught.value)


# ---- files of something else


def as_bytes(content: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(content)

    return write


def as_zip(**files: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)

    return write


def as_tar(path: Path) -> None:
    (path.parent / "inside.pth").write_bytes(b"1")
    with tarfile.open(path, "w") as archive:
        archive.add(path.parent / "inside.pth", "inside.pth")


def as_script(path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), str(path))


def as_program(path: Path) -> None:
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),)), path)


def as_onnx(path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    helper = onnx.helper
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [], [])
    path.write_bytes(helper.make_model(graph, producer_name="p").SerializeToString())


OTHERS: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "ONNX": ("m.onnx", as_onnx, "an ONNX model"),
    "ONNX under another name": ("m.pth", as_onnx, "an ONNX model"),
    "TorchScript": ("m.pt", as_script, r"TorchScript archive.*torch\.jit\.load"),
    "torch.export": ("m.pt2", as_program, r"program of torch\.export.*torch\.export\.load"),
    "Keras": ("m.h5", as_bytes(b"\x89HDF\r\n\x1a\n" + b"\0" * 99), "an HDF5 file.*Keras"),
    "Keras 3": ("m.keras", as_zip(**{"model.weights.h5": b""}), "a Keras model"),
    "TensorFlow": ("m.ckpt.index", as_bytes(b"\0" * 99), "part of a TensorFlow checkpoint"),
    "TensorFlow's data": ("m.data-00000-of-00001", as_bytes(b"\1" * 99), "TensorFlow checkpoint"),
    "TensorFlow Lite": ("m.tflite", as_bytes(b"\x20\0\0\0TFL3" + b"\0" * 99), "TensorFlow Lite"),
    "GGUF": ("m.gguf", as_bytes(b"GGUF\3\0\0\0" + b"\0" * 99), "a GGUF file"),
    "NumPy arrays": ("m.npz", lambda p: np.savez(p, x=np.zeros(3)), "archive without the names"),
    "one NumPy array": ("m.npy", lambda p: np.save(p, np.zeros(3)), "one NumPy array"),
    "gzip": ("m.pth.gz", lambda p: p.write_bytes(gzip.compress(b"1")), "a compressed file.*Unpack"),
    "tar": ("m.pth.tar", as_tar, r"a tar archive of 1 files \('inside\.pth'\)\. Unpack it"),
    "zip": ("m.zip", as_zip(**{"a/m.pth": b"1"}), r"a zip archive of 1 files \('a/m\.pth'\)"),
    "Git LFS": (
        "m.safetensors",
        as_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "pointer to a file of Git LFS.*git lfs pull",
    ),
    "a web page": ("m.pth", as_bytes(b"<!DOCTYPE html><html>404</html>"), "a web page"),
    "a JSON file": ("m.json", as_bytes(b'{"a": 1}'), "a JSON file and no index"),
}


@pytest.mark.parametrize(("name", "write", "what"), OTHERS.values(), ids=OTHERS.keys())
@pytest.mark.filterwarnings("ignore")
def test_files_of_something_else_are_named(
    name: str, write: Callable[[Path], Any], what: str, tmp_path: Path
) -> None:
    write(tmp_path / name)
    with pytest.raises(WeightsError, match=what) as caught:
        load_model("test_vit", weights=tmp_path / name)
    assert repr(str(tmp_path / name)) in str(caught.value)


FOLDERS: dict[str, tuple[dict[str, str], str]] = {
    "Transformers": ({"config.json": '{"model_type": "vit"}'}, r"folder of Transformers \(vit\)"),
    "timm": ({"config.json": '{"architecture": "test_vit"}'}, "folder that timm saved.*local-dir:"),
    "peft": ({"adapter_config.json": "{}"}, "an adapter without its model"),
    "TensorFlow": ({"saved_model.pb": ""}, "SavedModel of TensorFlow"),
    "nothing": ({}, "does not exist or is not a file"),
}


@pytest.mark.parametrize(("files", "what"), FOLDERS.values(), ids=FOLDERS.keys())
def test_folders_in_the_place_of_a_file_are_named(
    files: dict[str, str], what: str, tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(WeightsError, match=what):
        load_model("test_vit", weights=tmp_path)


# ---- folders that timm saved


def saved_folder(path: Path, model: Any, **changes: Any) -> str:
    timm.models.save_for_hf(model, str(path), safe_serialization=True, **changes)
    return f"local-dir:{path}"


def test_a_folder_that_timm_saved_is_a_model(timm_vit: Any, tmp_path: Path) -> None:
    name = saved_folder(tmp_path / "saved", timm_vit, model_args=SMALL)
    loaded = load_model(name)
    assert_same(loaded, timm_vit)
    assert (loaded.name, loaded.timm_name) == (name, "vit_base_patch16_224")


def test_a_folder_that_timm_saved_needs_its_prefix(timm_vit: Any, tmp_path: Path) -> None:
    saved_folder(tmp_path / "saved", timm_vit, model_args=SMALL)
    with pytest.raises(UnknownModelError, match=r"a folder that timm saved.*local-dir:"):
        load_model(str(tmp_path / "saved"))


def test_a_folder_without_weights_asks_for_some(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no file of weights.*with weights"):
        load_model(f"local-dir:{tmp_path}")
    with pytest.raises(UnknownModelError, match="names no folder"):
        load_model(f"local-dir:{tmp_path / 'nothing'}")


def test_a_folder_of_transformers_is_named(timm_vit: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    save_file(timm_vit.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(UnknownModelError, match=r"Transformers.*dfq models"):
        load_model(f"local-dir:{tmp_path}")
