"""The torch.export program: the reference's own numbers, without dfq."""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from itertools import cycle
from pathlib import Path

import pytest
import torch
from exported_models import MEMBERS, images_for, quantized, spread
from families import FAMILIES, Family

from dfq.exporting.program import program_bytes, reference_form

RELOAD = """
import sys, torch
program = torch.export.load(sys.argv[1]).module()
images = torch.load(sys.argv[2])
torch.save([program(images), program(images[:1])], sys.argv[3])
assert not [name for name in sys.modules if name.partition(".")[0] == "dfq"]
"""


POOLINGS = {f.pooling: f for f in FAMILIES}
POSITIONS = {f.scheme: f for f in reversed(FAMILIES)}
EXPORTED = list(dict.fromkeys([*POOLINGS.values(), *POSITIONS.values()]))
"""A family for every kind of pooling and of position encoding."""

SCHEMES: list[tuple[int, str]] = [(8, "float"), (4, "int8")]


@pytest.mark.parametrize(
    ("family", "scheme"), [*zip(EXPORTED, cycle(SCHEMES), strict=False), (EXPORTED[0], SCHEMES[1])]
)
@torch.no_grad()
def test_the_program_gives_the_same_bits_for_any_number_of_images(
    family: Family, scheme: tuple[int, str]
) -> None:
    model = quantized(family, bits=scheme[0], attention=scheme[1], depth=1)
    program = torch.export.load(io.BytesIO(program_bytes(model, {}))).module()
    images = images_for(model)
    whole = program(images)
    assert torch.equal(whole, reference_form(model)(images))
    for count in (0, 1):
        torch.testing.assert_close(program(images[:count]), whole[:count])


@pytest.mark.parametrize("family", MEMBERS)
@torch.no_grad()
def test_integer_attention_is_that_of_the_reference_backend(family: Family) -> None:
    model = quantized(family, bits=4, attention="int8")
    images = images_for(model)
    torch.testing.assert_close(reference_form(model)(images), model(images))


@pytest.mark.parametrize("family", MEMBERS[::5])
@torch.no_grad()
def test_float_attention_is_that_of_the_reference_backend_in_float32(family: Family) -> None:
    model = quantized(family, bits=8, attention="float")
    images = images_for(model)
    assert spread(reference_form(model)(images), model(images)) < 0.1


@torch.no_grad()
def test_another_process_reads_it_without_dfq(tmp_path: Path) -> None:
    model = quantized(MEMBERS[0].values[0], bits=4, attention="int8")
    images = images_for(model)
    program, given, taken = (tmp_path / name for name in ("m.pt2", "images.pt", "logits.pt"))
    program.write_bytes(program_bytes(model, {}))
    torch.save(images, given)
    command = [sys.executable, "-c", RELOAD, str(program), str(given), str(taken)]
    subprocess.run(command, check=True, cwd=tmp_path)
    several, one = torch.load(taken)
    assert torch.equal(several, model(images))
    torch.testing.assert_close(one, several[:1])


def test_weights_stay_packed_and_no_place_is_named() -> None:
    content = program_bytes(quantized(MEMBERS[0].values[0], bits=4, attention="float"), {"a": "b"})
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    assert any(name.endswith("/dfq.json") and text == b'{"a": "b"}' for name, text in parts.items())
    assert not any(str(Path(__file__).parents[2]).encode() in text for text in parts.values())
