"""Verbs with a ``LoadedModel`` as the model, which they do not change."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from api_calls import FAST, quantize
from conftest import make_vit
from timm.models.vision_transformer import VisionTransformer

import dfq
from dfq import LoadedModel
from dfq.errors import OutputError, SettingError
from dfq.vit.options import LoadOptions, WeightsOptions

Verb = Callable[[Any, Path], Any]


def invert(model: Any, place: Path, **options: Any) -> Any:
    return dfq.invert(model, images=4, settings=FAST, out=place / "images", **options)


def distill(model: Any, place: Path, **options: Any) -> Any:
    settings: dict[str, Any] = {"inversion": FAST, "distillation": {"batch": 4}}
    return dfq.distill(
        model,
        student="test_vit" if isinstance(model, LoadedModel) and model.name != "demo" else None,
        images=4,
        steps=1,
        settings=settings,
        out=place / "student",
        **options,
    )


def evaluate(model: Any, place: Path, **options: Any) -> Any:
    if not (place / "out").exists():
        quantize(model, place / "out", evaluate=False)
    data = place / "x.npz"
    if not data.exists():
        import numpy as np

        np.savez(data, x=np.zeros((2, 32, 32, 3), np.uint8))
    return dfq.evaluate(place / "out", data=data, float_model=model, **options)


VERBS: dict[str, Verb] = {
    "invert": invert,
    "quantize": lambda model, place: quantize(model, place / "out"),
    "distill": distill,
    "evaluate": evaluate,
}
every_verb = pytest.mark.parametrize("verb", VERBS)


@pytest.fixture
def loaded(small_weights: Path) -> LoadedModel:
    return dfq.load_model("test_vit", weights=small_weights, img_size=32)


@every_verb
def test_a_loaded_model_is_left_as_it_is(verb: str, loaded: LoadedModel, tmp_path: Path) -> None:
    vit, calls = loaded.vit, []
    vit.train().requires_grad_(True)
    handle = vit.block(0).register_forward_hook(lambda *_: calls.append(1))
    before = {k: v.detach().clone() for k, v in vit.state_dict().items()}
    storages = {k: p.data_ptr() for k, p in vit.named_parameters()}
    VERBS[verb](loaded, tmp_path)
    assert loaded.vit is vit
    assert all(m.training for m in vit.modules())
    assert all(p.requires_grad and p.grad is None for p in vit.parameters())
    assert {k: p.data_ptr() for k, p in vit.named_parameters()} == storages
    assert all(torch.equal(v, before[k]) for k, v in vit.state_dict().items())
    assert {(v.dtype, v.device.type) for v in vit.state_dict().values()} == {(torch.float32, "cpu")}
    assert list(vit.block(0)._forward_hooks) == [handle.id]
    assert not any(m._forward_pre_hooks for m in vit.modules())
    assert not calls, "hooks of the caller's are not run"


def test_verbs_in_turn_give_what_a_name_gives(
    loaded: LoadedModel, small_weights: Path, tmp_path: Path
) -> None:
    images = invert(loaded, tmp_path)
    name: dict[str, Any] = {"weights": small_weights, "img_size": 32}
    again = dfq.invert("test_vit", images=4, settings=FAST, out=tmp_path / "images", **name)
    assert again.cached
    assert (again.model, images.model) == ("test_vit", "test_vit")
    call: dict[str, Any] = {"calibration": tmp_path / "images", "settings": {"inversion": FAST}}
    one = dfq.quantize(loaded, out=tmp_path / "one", **call)
    two = dfq.quantize("test_vit", out=tmp_path / "two", **call, **name)
    assert one.agreement_on == two.agreement_on
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@every_verb
def test_load_arguments_beside_it_are_refused(
    verb: str, loaded: LoadedModel, tmp_path: Path
) -> None:
    function = {"quantize": quantize_with}.get(verb, VERBS[verb])
    with pytest.raises(SettingError, match=r"img_size cannot be given beside the LoadedModel"):
        function(loaded, tmp_path, img_size=32)  # type: ignore[call-arg]


def quantize_with(model: Any, place: Path, **options: Any) -> Any:
    return quantize(model, place / "out", **options)


def test_loading_it_again_gives_it_back(loaded: LoadedModel) -> None:
    assert dfq.load_model(loaded) is loaded
    with pytest.raises(SettingError, match="mean, std cannot be given"):
        dfq.load_model(loaded, mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.mark.parametrize("verb", ["load_model", *VERBS])
def test_load_arguments_are_in_every_signature(verb: str) -> None:
    known = inspect.signature(getattr(dfq, verb)).parameters
    fields = WeightsOptions if verb == "evaluate" else LoadOptions
    assert set(fields.__annotations__) <= set(known)
    assert all(known[name].default is None for name in fields.__annotations__)
    with pytest.raises(TypeError, match=r"argument 'img_sise'\. Did you mean 'img_size'"):
        getattr(dfq, verb)("demo", img_sise=3)
    with pytest.raises(SettingError, match=r"global_pool is 3, of type int; it takes str or None"):
        getattr(dfq, verb)(
            "demo", **({"data": "demo"} if verb == "evaluate" else {}), global_pool=3
        )


def test_weights_that_the_caller_changed_count(loaded: LoadedModel, tmp_path: Path) -> None:
    invert(loaded, tmp_path)
    assert loaded.fingerprint  # is kept once it was read
    with torch.no_grad():
        next(loaded.vit.head.parameters()).add_(1)
    with pytest.raises(dfq.UsageError, match="made from another model"):
        quantize(loaded, tmp_path / "out", calibration=tmp_path / "images", images=None)
    noise = dfq.fractal_noise(2, loaded.vit.arch.grid)
    written = dfq.write_dataset(tmp_path / "noise", [[noise]], loaded, origin="own")
    assert written.fingerprint == loaded.frozen().fingerprint != loaded.fingerprint


def test_half_precision_and_gradients_of_the_callers_do_not_matter(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    half = dataclasses.replace(loaded, vit=make_half(loaded))
    result = quantize(half, tmp_path / "out")
    assert {v.dtype for v in half.vit.state_dict().values()} == {torch.float16}
    assert result.agreement is not None


def make_half(loaded: LoadedModel) -> Any:
    return loaded.frozen().vit.half()


def test_freezing_shares_weights_where_it_can(loaded: LoadedModel) -> None:
    frozen = loaded.frozen()
    pairs = zip(frozen.vit.parameters(), loaded.vit.parameters(), strict=True)
    assert all(ours.data_ptr() == theirs.data_ptr() for ours, theirs in pairs)
    assert not any(p.requires_grad for p in frozen.vit.parameters())


def test_a_vit_with_other_parameters_is_refused(loaded: LoadedModel, tmp_path: Path) -> None:
    loaded.vit.head = torch.nn.Identity()
    with pytest.raises(SettingError, match=r"does not fit its architecture .*head\.weight"):
        quantize(loaded, tmp_path / "out")


def test_a_float_model_of_another_normalization_is_refused(
    tmp_path: Path, tiny: VisionTransformer, labeled_npz: Path
) -> None:
    quantize(tiny, tmp_path / "out", mean=(0.5,) * 3, std=(0.5,) * 3, evaluate=False)
    other = dfq.load_model(tiny, mean=(0.4,) * 3, std=(0.5,) * 3)
    with pytest.raises(SettingError, match="another normalization than the checkpoint: mean"):
        dfq.evaluate(tmp_path / "out", data=labeled_npz, float_model=other)


def test_a_student_is_a_loaded_teacher(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"inversion": FAST}
    call: dict[str, Any] = {"images": 4, "steps": 1, "settings": settings}
    dfq.distill("demo", depth=2, out=tmp_path / "first", **call)
    teacher = dfq.load_model(str(tmp_path / "first"))
    assert (teacher.name, teacher.directory) == (str(tmp_path / "first"), tmp_path / "first")
    result = dfq.distill(teacher, depth=1, out=tmp_path / "second", **call)
    assert (result.teacher, result.start) == (str(tmp_path / "first"), "teacher")
    with pytest.raises(OutputError, match="would replace its teacher"):
        dfq.distill(teacher, depth=1, out=tmp_path / "first", **call)


def test_a_module_and_its_loaded_model_are_called_alike(tmp_path: Path) -> None:
    model = make_vit()
    one, two = (quantize(m, tmp_path / "out") for m in (model, dfq.load_model(model)))
    assert one.model == two.model == "VisionTransformer"
