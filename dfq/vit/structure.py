"""Check that every submodule of a timm model has a known class and is unmodified.

dfq copies the weights of submodules whose arithmetic it knows.  A wrapped or hooked submodule has
the same weights but another output, so classes are compared exactly.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from functools import partial
from types import NoneType
from typing import Any

import torch
from timm import layers
from timm.layers.attention import Attention, AttentionRope
from timm.models import beit, deit, eva, vision_transformer
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from dfq.errors import UnsupportedModelError, WeightsError
from dfq.failures import explained, first_line

Kinds = tuple[type[Any], ...]

LINEAR: Kinds = (nn.Linear,)
NORM: Kinds = (layers.LayerNorm, layers.LayerNormFp32, nn.LayerNorm)
NORM_OR_NONE: Kinds = (*NORM, nn.Identity)
ACTIVATION: Kinds = (nn.GELU, nn.SiLU, layers.GELU, layers.GELUTanh, layers.QuickGELU)
DROPOUT: Kinds = (nn.Dropout, nn.Identity)
DROP_PATH: Kinds = (layers.DropPath, nn.Identity)
LAYER_SCALE: Kinds = (layers.LayerScale, nn.Identity)
ATTENTION_POOL: Kinds = (layers.AttentionPoolLatent, NoneType)
HEAD: Kinds = (nn.Linear, nn.Identity, nn.Sequential)
MLP: Kinds = (layers.Mlp, layers.GluMlp, layers.SwiGLU)

_NORMS = {"norm1": NORM, "norm2": NORM}
_PATHS = {"drop_path1": DROP_PATH, "drop_path2": DROP_PATH}
_PRODUCT = {"proj": LINEAR, "attn_drop": DROPOUT, "proj_drop": DROPOUT}
_QK_NORMS = {"q_norm": NORM_OR_NONE, "k_norm": NORM_OR_NONE, "norm": NORM_OR_NONE}
_QKV_OR_PARTS = dict.fromkeys(("qkv", "q_proj", "k_proj", "v_proj"), (nn.Linear, NoneType))
_MLP = {
    "act": ACTIVATION,
    "drop1": DROPOUT,
    "norm": NORM_OR_NONE,
    "fc2": LINEAR,
    "drop2": DROPOUT,
}
_BODY: dict[str, Kinds] = {
    "patch_embed": (layers.PatchEmbed,),
    "pos_drop": DROPOUT,
    "norm": NORM_OR_NONE,
    "fc_norm": NORM_OR_NONE,
    "head_drop": DROPOUT,
    "head": HEAD,
}
_VIT: dict[str, Kinds] = {
    **_BODY,
    "patch_drop": (layers.PatchDropout, nn.Identity),
    "norm_pre": NORM_OR_NONE,
    "blocks": (nn.Sequential,),
    "attn_pool": ATTENTION_POOL,
}

SUBMODULES: dict[type[nn.Module], dict[str, Kinds]] = {
    vision_transformer.VisionTransformer: _VIT,
    deit.VisionTransformerDistilled: {**_VIT, "head_dist": HEAD},
    beit.Beit: {
        **_BODY,
        "rel_pos_bias": (beit.RelativePositionBias, NoneType),
        "blocks": (nn.ModuleList,),
    },
    eva.Eva: {
        **_BODY,
        "patch_drop": (layers.PatchDropoutWithIndices, NoneType),
        "rope": (layers.RotaryEmbeddingCat, layers.RotaryEmbeddingDinoV3, NoneType),
        "norm_pre": NORM_OR_NONE,
        "blocks": (nn.ModuleList,),
        "attn_pool": ATTENTION_POOL,
    },
    layers.PatchEmbed: {"proj": (nn.Conv2d,), "norm": NORM_OR_NONE},
    vision_transformer.Block: {
        **_NORMS,
        **_PATHS,
        "attn": (Attention,),
        "mlp": MLP,
        "ls1": LAYER_SCALE,
        "ls2": LAYER_SCALE,
    },
    beit.Block: {**_NORMS, **_PATHS, "attn": (beit.Attention,), "mlp": MLP},
    eva.EvaBlock: {**_NORMS, **_PATHS, "attn": (eva.EvaAttention, AttentionRope), "mlp": MLP},
    Attention: {**_PRODUCT, **_QK_NORMS, "qkv": LINEAR, "gate": (NoneType,)},
    beit.Attention: {**_PRODUCT, "qkv": LINEAR},
    eva.EvaAttention: {**_PRODUCT, **_QK_NORMS, **_QKV_OR_PARTS, "gate": (NoneType,)},
    AttentionRope: {**_PRODUCT, **_QK_NORMS, **_QKV_OR_PARTS, "gate": (NoneType,)},
    layers.Mlp: {**_MLP, "fc1": LINEAR},
    layers.GluMlp: {**_MLP, "fc1": LINEAR},
    layers.SwiGLU: {**_MLP, "fc1_g": LINEAR, "fc1_x": LINEAR},
    layers.AttentionPoolLatent: {
        "q": (nn.Linear, nn.Identity),
        "kv": LINEAR,
        "q_norm": NORM_OR_NONE,
        "k_norm": (nn.Identity,),
        "proj": LINEAR,
        "proj_drop": DROPOUT,
        "norm": NORM_OR_NONE,
        "mlp": (layers.Mlp,),
    },
}
"""Submodules of timm's vision transformers by class, with the classes each may have."""

WRAPPERS = (
    nn.DataParallel,
    nn.parallel.DistributedDataParallel,
    AveragedModel,
    ModelEmaV2,
    ModelEmaV3,
)
"""Wrappers that compute the same as their ``module``."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

SUPPORTED = (
    "timm's vision transformers with fixed-size patches: ViT, DeiT (also distilled), DeiT-III, "
    "DINOv2, DINOv3, CLIP and SigLIP towers, BEiT, EVA-02"
)

_MERGE = "Merge what was added into the weights first (peft: model.merge_and_unload())"


def unsupported(name: str, why: str, advice: str = "") -> UnsupportedModelError:
    """Return the error for an unsupported model."""
    advice = f"{advice}. " if advice else ""
    return UnsupportedModelError(
        f"{name!r} cannot be quantized: {why}. {advice}Supported: {SUPPORTED}.", reason=why
    )


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model within wrappers for training, averaging and compilation.

    Raises:
        UnsupportedModelError: a wrapper has hooks.
    """
    while (inner := _wrapped(model)) is not None:
        _check_hooks(type(model).__name__, "wrapper", model)
        model = inner
    return model


def _wrapped(model: Any) -> nn.Module | None:
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # not loaded: nothing is compiled
    if dynamo is not None and isinstance(model, dynamo.OptimizedModule):
        return model._orig_mod
    return model.module if type(model) in WRAPPERS else None


def check_kind(model: nn.Module, name: str) -> None:
    """Raise :class:`UnsupportedModelError` unless the model's class is in :data:`SUBMODULES`."""
    if type(model) in SUBMODULES and hasattr(model, "patch_embed"):
        return
    kind = type(model)
    within = [path for path, m in model.named_modules() if path and hasattr(m, "patch_embed")]
    advice = f"Its {within[0]!r} may be one: give that" if len(within) == 1 else ""
    if "peft" in kind.__module__:
        advice = _MERGE
    elif isinstance(model, torch.jit.ScriptModule):
        advice = "A scripted model has no layers to copy; give the module that was scripted"
    elif "FullyShardedDataParallel" in kind.__name__ or kind.__name__.startswith("FSDP"):
        advice = "Gather its weights into the module that was sharded first"
    raise unsupported(name, f"it is a {kind.__name__} ({kind.__module__})", advice)


def check_parts(model: nn.Module, name: str) -> None:
    """Check the class of every submodule, down to single layers.

    Raises:
        UnsupportedModelError: a submodule has another class, a forward hook or an overridden
            method.
    """
    for path, part, kinds in _parts("", model):
        if type(part) not in kinds:
            raise unsupported(name, *_wrong_class(path, part, kinds))
        if isinstance(part, nn.Module):
            _check_unmodified(name, path, part)


def _parts(path: str, module: nn.Module) -> Iterator[tuple[str, Any, Kinds]]:
    """Yield every submodule with its path and the classes that it may have."""
    if not path:
        yield "forward", module, (type(module),)
    for slot, kinds in SUBMODULES.get(type(module), {}).items():
        part, place = getattr(module, slot, None), f"{path}.{slot}".lstrip(".")
        yield place, part, kinds
        if slot == "blocks" and isinstance(part, nn.Sequential | nn.ModuleList):
            for index, block in enumerate(part):
                yield f"{place}.{index}", block, (BLOCKS[type(module)],)
                yield from _parts(f"{place}.{index}", block)
        elif kinds is HEAD and type(part) is nn.Sequential:
            for index, layer in enumerate(part):
                yield f"{place}.{index}", layer, (*LINEAR, *DROPOUT)
        elif isinstance(part, nn.Module):
            yield from _parts(place, part)


BLOCKS: dict[type[nn.Module], type[nn.Module]] = {
    vision_transformer.VisionTransformer: vision_transformer.Block,
    deit.VisionTransformerDistilled: vision_transformer.Block,
    beit.Beit: beit.Block,
    eva.Eva: eva.EvaBlock,
}
"""Class of the blocks by class of the model."""


def classifier(head: nn.Module) -> nn.Linear | None:
    """Return the only linear layer of a head, or None."""
    linear = [m for m in head.modules() if isinstance(m, nn.Linear)]
    return linear[0] if len(linear) == 1 else None


def _wrong_class(path: str, part: Any, kinds: Kinds) -> tuple[str, str]:
    kind = type(part)
    known = sorted({k.__name__ for k in kinds if k not in (NoneType, nn.Identity)})
    wanted = f", not {' or '.join(known)}" if known else ""
    why = f"its {path} is {kind.__module__}.{kind.__qualname__}{wanted}"
    if part is None:
        return f"it has no {path}", ""
    if not isinstance(part, nn.Module):
        return why, ""
    if nn.utils.parametrize.is_parametrized(part):
        return (
            f"the weights of its {path} are parametrized",
            "Make them plain first: torch.nn.utils.parametrize.remove_parametrizations(layer, "
            "'weight')",
        )
    if _wrapped(part) is not None:
        return why, "Give the model before that, and compile or wrap what dfq.load returns"
    if any(isinstance(m, kinds) for m in part.modules() if m is not part) or isinstance(
        part, (nn.Linear, nn.Conv2d, *NORM)
    ):
        return f"{why}, which may compute something else with the same weights", _MERGE
    return why, ""


def _check_unmodified(name: str, path: str, module: nn.Module) -> None:
    """Raise if hooks or replaced methods change the forward pass of a module."""
    _check_hooks(name, path, module)
    for attribute in vars(module):
        if callable(getattr(type(module), attribute, None)):
            raise unsupported(
                name,
                f"{attribute!r} of its {path} has been replaced on the module itself",
                f"Restore the class's own first: del module.{attribute}",
            )
    own = getattr(type(module).forward, "__module__", "")
    if not own.startswith(("timm.", "torch.")):
        raise unsupported(
            name, f"the forward of {type(module).__name__} (its {path}) has been replaced by {own}"
        )


def _check_hooks(name: str, path: str, module: nn.Module) -> None:
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for hook in hooks.values():
            raise unsupported(
                name, f"its {path} has a forward hook, {_hook_name(hook)}", _unhook(hook)
            )


def _hook_name(hook: Any) -> str:
    hook = hook.func if isinstance(hook, partial) else hook
    return str(getattr(hook, "__qualname__", type(hook).__name__))


_UNHOOK = {
    "WeightNorm": "torch.nn.utils.remove_weight_norm(layer)",
    "SpectralNorm": "torch.nn.utils.remove_spectral_norm(layer)",
}


def _unhook(hook: Any) -> str:
    kind = type(hook)
    if kind.__module__.startswith("torch.nn.utils.prune"):
        return "Make pruning permanent first: torch.nn.utils.prune.remove(layer, 'weight')"
    if kind.__name__ in _UNHOOK:
        return f"Make its weights plain first: {_UNHOOK[kind.__name__]}"
    return "What a hook changes cannot be read; remove it first (handle.remove())"


def check_tensors(model: nn.Module, name: str) -> None:
    """Check that all weights are loaded and are plain floating-point tensors.

    Raises:
        WeightsError: weights are on the meta device, or of an unsupported dtype or layout.
        UnsupportedModelError: weights are of a tensor subclass.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    absent = [key for key, tensor in tensors.items() if tensor.is_meta]
    if absent:
        raise WeightsError(
            f"{name!r}: {len(absent)} of {len(tensors)} tensors are on the meta device and hold no "
            f"values, such as {absent[0]!r}. Load weights into the model first."
        )
    for key, tensor in tensors.items():
        if type(tensor) not in (nn.Parameter, Tensor, nn.Buffer):
            kind = type(tensor)
            raise unsupported(
                name,
                f"its {key!r} is a {kind.__module__}.{kind.__qualname__}, no plain tensor",
                "Give the float model, with its weights gathered and as they were trained",
            )
        plain = tensor.layout == torch.strided and not tensor.is_quantized
        if isinstance(tensor, nn.Parameter) and not (plain and tensor.dtype in FLOATS):
            raise WeightsError(
                f"{name!r}: {key!r} is {tensor.dtype}{'' if plain else f', {tensor.layout}'}; "
                "weights are plain tensors of float16, bfloat16, float32 or float64. Give the "
                "model as it was trained, or convert it (model.float())."
            )


def float_copy(model: nn.Module, name: str) -> nn.Module:
    """Return a float32 copy of a model on the CPU, in eval mode.

    Float32 weights on the CPU are shared with the model, which is not modified.

    Raises:
        UnsupportedModelError: the model cannot be copied.
    """
    known: dict[int, Any] = {}
    for parameter in model.parameters():
        values = parameter.detach().to("cpu", torch.float32)
        known[id(parameter)] = nn.Parameter(values, requires_grad=False)
    for buffer in model.buffers():
        known[id(buffer)] = _to_float32(buffer.detach().cpu())
    with explained(lambda e: unsupported(name, f"it cannot be copied ({first_line(e)})")):
        plain = copy.deepcopy(model, known)
    for module in plain.modules():
        if "grad_checkpointing" in vars(module):
            module.__dict__["grad_checkpointing"] = False
    return plain.eval()


def _to_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
