"""Models whose parts are not what timm built: adapters, hooks, parametrizations, wrappers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
from conftest import make_vit
from families import FAMILIES, VARIANTS, Family
from timm.models.vision_transformer import VisionTransformer
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel

from dfq.errors import UnsupportedModelError, WeightsError
from dfq.vit.convert import convert, describe
from dfq.vit.load import load_model, model_name

members = pytest.mark.parametrize(
    "family", [pytest.param(f, id=f.name) for f in [*FAMILIES, *VARIANTS]]
)


class LowRank(nn.Module):
    """An adapter as peft makes it: the layer, and two factors of which one begins as zeros."""

    def __init__(self, layer: nn.Linear, scale: float = 0.0) -> None:
        super().__init__()
        self.base_layer = layer
        self.lora_A = nn.Linear(layer.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, layer.out_features, bias=False)
        nn.init.constant_(self.lora_B.weight, scale)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor:
        return self.base_layer.bias

    @property
    def in_features(self) -> int:
        return self.base_layer.in_features

    @property
    def out_features(self) -> int:
        return self.base_layer.out_features

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x) + self.lora_B(self.lora_A(x))
        return y


def leaves(model: nn.Module) -> list[str]:
    return [path for path, m in model.named_modules() if not list(m.children())]


@members
def test_no_part_may_have_a_forward_of_its_own(family: Family) -> None:
    model = family.make()
    for path in leaves(model):
        part = model.get_submodule(path)
        kind = type(part)
        part.__class__ = type("Other", (kind,), {})
        with pytest.raises(UnsupportedModelError, match=rf"its {path} is \S*Other\b"):
            describe(model, "m")
        part.__class__ = kind
    describe(model, "m")


@members
def test_no_part_may_have_a_forward_hook(family: Family) -> None:
    model = family.make()
    for path, part in model.named_modules():
        for register in (part.register_forward_hook, part.register_forward_pre_hook):
            handle = register(lambda *_: None)
            with pytest.raises(UnsupportedModelError, match=rf"{path or 'forward'} has a forward"):
                describe(model, "m")
            handle.remove()
    describe(model, "m")


@pytest.mark.parametrize("scale", [0.0, 1e-4, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("path", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
def test_adapters_are_refused_whatever_their_effect(
    path: str, dtype: torch.dtype, scale: float
) -> None:
    model: Any = make_vit()
    parent, _, name = path.rpartition(".")
    block = model.blocks[1]
    setattr(block.get_submodule(parent), name, LowRank(block.get_submodule(path), scale))
    with pytest.raises(UnsupportedModelError, match=rf"blocks\.1\.{path}.*merge_and_unload"):
        convert(model.to(dtype), "m")


def test_merged_adapters_are_taken() -> None:
    model: Any = make_vit()
    plain, adapter = copy.deepcopy(model), LowRank(model.blocks[0].attn.qkv, 0.1)
    model.blocks[0].attn.qkv = adapter
    with torch.no_grad():
        plain.blocks[0].attn.qkv.weight += adapter.lora_B.weight @ adapter.lora_A.weight
        x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(convert(plain, "m")(x), model(x), rtol=1e-4, atol=1e-4)


_QAT = torch.ao.quantization.QConfig(
    activation=torch.ao.quantization.MinMaxObserver,
    weight=torch.ao.quantization.MinMaxObserver,
)


def _instance_forward(model: Any) -> None:
    layer = model.blocks[0].mlp.fc2
    layer.forward = partial(lambda own, x: own(x), layer.forward)


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "spectral norm": (
        lambda m: parametrizations.spectral_norm(m.blocks[0].attn.proj),
        r"blocks\.0\.attn\.proj are parametrized.*remove_parametrizations",
    ),
    "weight norm": (
        lambda m: parametrizations.weight_norm(m.head),
        r"head are parametrized.*remove_parametrizations",
    ),
    "a parametrization of a bias": (
        lambda m: parametrize.register_parametrization(m.norm, "bias", nn.Identity()),
        r"its norm are parametrized",
    ),
    "weight norm by hook": (
        lambda m: torch.nn.utils.weight_norm(m.blocks[1].mlp.fc1),
        r"blocks\.1\.mlp\.fc1 has a forward hook, WeightNorm.*remove_weight_norm",
    ),
    "spectral norm by hook": (
        lambda m: torch.nn.utils.spectral_norm(m.patch_embed.proj),
        r"patch_embed\.proj has a forward hook, SpectralNorm.*remove_spectral_norm",
    ),
    "pruning": (
        lambda m: prune.l1_unstructured(m.blocks[0].attn.qkv, "weight", amount=0.5),
        r"blocks\.0\.attn\.qkv has a forward hook.*prune\.remove",
    ),
    "a forward on the instance": (
        _instance_forward,
        r"'forward' of its blocks\.0\.mlp\.fc2 has been replaced",
    ),
    "another method on the instance": (
        lambda m: setattr(m, "forward_head", m.forward_head),
        r"'forward_head' of its forward has been replaced",
    ),
    "linear layers of a quantizer": (
        lambda m: setattr(m.blocks[0].mlp, "fc1", torch.ao.nn.qat.Linear(64, 256, qconfig=_QAT)),
        r"blocks\.0\.mlp\.fc1 is torch\.ao\.nn\.qat",
    ),
    "torch's attention": (
        lambda m: setattr(m.blocks[0], "attn", nn.MultiheadAttention(64, 2)),
        r"blocks\.0\.attn is torch\S*MultiheadAttention, not Attention",
    ),
    "no norm": (
        lambda m: setattr(m.blocks[0], "norm1", nn.Identity()),
        r"blocks\.0\.norm1 is torch\S*Identity, not LayerNorm",
    ),
    "overlapping patches": (
        lambda m: setattr(m.patch_embed, "proj", nn.Conv2d(3, 64, 4, stride=3)),
        "patches overlap",
    ),
    "a layer of its own kind after the blocks": (
        lambda m: setattr(m, "blocks", nn.Sequential(*m.blocks, nn.Linear(64, 64))),
        r"blocks\.2 is torch\S*Linear, not Block",
    ),
    "a head of two layers": (
        lambda m: setattr(m, "head", nn.Sequential(nn.Linear(64, 9), nn.Linear(9, 5))),
        "its head is 2 layers",
    ),
    "a norm before the head": (
        lambda m: setattr(m, "head", nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 5))),
        r"its head\.0 is torch\S*LayerNorm",
    ),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*deprecated.*")
@pytest.mark.parametrize(("change", "named"), CHANGES.values(), ids=CHANGES.keys())
def test_a_changed_part_is_named_with_a_way_out(
    change: Callable[[VisionTransformer], Any], named: str
) -> None:
    model = make_vit()
    change(model)
    with pytest.raises(UnsupportedModelError, match=named):
        convert(model, "m")


def test_a_subclass_of_a_tensor_is_refused() -> None:
    class Odd(Tensor):
        pass

    model: Any = make_vit()
    weight = model.blocks[0].mlp.fc1.weight.detach().as_subclass(Odd)
    model.blocks[0].mlp.fc1.weight = nn.Parameter(weight)
    with pytest.raises(UnsupportedModelError, match=r"'blocks\.0\.mlp\.fc1\.weight' is a \S*Odd"):
        convert(model, "m")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_arithmetic_that_no_class_shows_is_measured(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, embed = make_vit().to(dtype), VisionTransformer._pos_embed
    monkeypatch.setattr(VisionTransformer, "_pos_embed", lambda self, x: 1.005 * embed(self, x))
    with pytest.raises(UnsupportedModelError, match="the output of block 0 differs from what its"):
        convert(model, "m")


def test_a_forward_replaced_on_the_class_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = nn.LayerNorm.forward
    monkeypatch.setattr(nn.LayerNorm, "forward", lambda self, x: forward(self, x))
    with pytest.raises(UnsupportedModelError, match=r"forward of LayerNorm .* has been replaced"):
        convert(make_vit(norm_layer=nn.LayerNorm), "m")


# ---- what is harmless


@torch.no_grad()
def test_dropout_before_the_head_changes_nothing() -> None:
    model = make_vit()
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = model(x)
    model.head = nn.Sequential(nn.Dropout(0.5), model.head)  # type: ignore[assignment]
    loaded = load_model(model)
    assert loaded.vit.arch.num_classes == 5
    torch.testing.assert_close(loaded.vit(x), expected, rtol=1e-4, atol=1e-4)


def test_hooks_of_the_backward_pass_and_of_state_dicts_are_no_matter() -> None:
    model = make_vit()
    model.blocks[0].register_full_backward_hook(lambda *_: None)
    model.register_state_dict_post_hook(lambda *_: None)
    expected = convert(make_vit(), "m").state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in convert(model, "m").state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@members
def test_the_model_stays_as_it_is(family: Family, dtype: torch.dtype) -> None:
    model = family.make().to(dtype).train()
    model.requires_grad_(True)
    before = {k: (v.clone(), v.data_ptr()) for k, v in model.state_dict().items()}
    modules = {name: dict(vars(m)) for name, m in model.named_modules()}
    convert(model, "m")
    after = {k: (v, v.data_ptr()) for k, v in model.state_dict().items()}
    assert all(torch.equal(after[k][0], v) and after[k][1] == at for k, (v, at) in before.items())
    assert all(p.requires_grad and p.dtype == dtype for p in model.parameters())
    for name, module in model.named_modules():
        assert vars(module).keys() == modules[name].keys()
        assert module.training


def test_mixed_types_become_float32() -> None:
    model, expected = make_vit(), make_vit()
    model.blocks[0].bfloat16()
    model.head.double()
    with torch.no_grad():
        for name, parameter in expected.named_parameters():
            parameter.copy_(model.get_parameter(name).float())
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(convert(model, "m")(x), expected(x), rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing_is_no_matter() -> None:
    model = make_vit()
    model.set_grad_checkpointing(True)
    convert(model, "m")
    assert model.grad_checkpointing


# ---- types


def test_weights_on_the_meta_device_are_refused_by_name() -> None:
    with torch.device("meta"):
        model = timm.create_model("test_vit")
    with pytest.raises(WeightsError, match=r"on the meta device.*'cls_token'.*Load weights"):
        load_model(model)


def test_a_single_weight_on_the_meta_device_is_named() -> None:
    model = make_vit()
    model.head.to("meta")
    with pytest.raises(WeightsError, match=r"2 of \d+ tensors are on the meta.*'head\.weight'"):
        load_model(model)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_weights_of_8_bits_are_refused_by_name(dtype: torch.dtype) -> None:
    model: Any = make_vit()
    model.blocks[0].mlp.fc1.to(dtype)
    with pytest.raises(WeightsError, match=rf"blocks\.0\.mlp\.fc1\.weight' is {dtype}.*float16"):
        load_model(model)


# ---- wrappers


def compiled(model: nn.Module) -> nn.Module:
    wrapped: Any = torch.compile(model, backend="eager")
    return wrapped


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DataParallel": nn.DataParallel,
    "AveragedModel": AveragedModel,
    "ModelEmaV2": ModelEmaV2,
    "ModelEmaV3": ModelEmaV3,
    "torch.compile": compiled,
    "compiled and parallel": lambda m: nn.DataParallel(compiled(m)),
    "parallel and averaged": lambda m: AveragedModel(nn.DataParallel(m)),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_wrappers_are_taken_off(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = timm.create_model("test_vit", img_size=32, num_classes=5)
    wrapped = wrap(model)
    assert model_name(wrapped) == "test_vit"
    assert load_model(wrapped).fingerprint == load_model(model).fingerprint


def test_distributed_modules_are_taken_off(tmp_path: Any) -> None:
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        model = make_vit()
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert load_model(wrapped).fingerprint == load_model(model).fingerprint
    finally:
        torch.distributed.destroy_process_group()


def test_compiled_in_place_is_no_matter() -> None:
    model = make_vit()
    expected = load_model(model).fingerprint
    model.blocks[0].compile(backend="eager")
    assert load_model(model).fingerprint == expected


def test_a_wrapper_with_a_hook_is_refused() -> None:
    wrapped = nn.DataParallel(make_vit())
    wrapped.register_forward_hook(lambda _m, _i, output: output * 2)
    with pytest.raises(UnsupportedModelError, match="wrapper has a forward hook"):
        load_model(wrapped)


def test_a_compiled_block_is_refused() -> None:
    model = make_vit()
    model.blocks[0] = compiled(model.blocks[0])
    with pytest.raises(UnsupportedModelError, match=r"blocks\.0 is \S*OptimizedModule.*before"):
        load_model(model)


@pytest.mark.filterwarnings("ignore")
def test_a_scripted_model_is_refused() -> None:
    scripted = torch.jit.trace(make_vit(), torch.zeros(1, 3, 16, 16), check_trace=False)
    with pytest.raises(UnsupportedModelError, match="module that was scripted"):
        load_model(scripted)


def test_what_is_around_a_model_is_not_dropped() -> None:
    with pytest.raises(UnsupportedModelError, match=r"is a Sequential.*Its '1' may be one"):
        load_model(nn.Sequential(nn.Tanh(), make_vit()))


class PeftModel(nn.Module):
    __module__ = "peft.peft_model"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = model


def test_a_peft_model_is_told_to_merge() -> None:
    with pytest.raises(UnsupportedModelError, match=r"is a PeftModel.*merge_and_unload"):
        load_model(PeftModel(make_vit()))
