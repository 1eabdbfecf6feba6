"""Preview pictures of sparse-image datasets."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from dfq.argument_names import option
from dfq.arguments import checked
from dfq.data.dataset import SparseImageDataset
from dfq.errors import DatasetError, OutputError, SettingError
from dfq.files import make_directory
from dfq.ownership import FileFormat, check_file, write_file
from dfq.sparse import SparseImages, unpatchify

BACKGROUND = 40
"""Gray level of missing patches and margins, different from black patches."""

MARGIN = 2
HEADING = 16
"""Height in pixels of the line of headings."""

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MARK = ("Software", "dfq")
"""Keyword and text of the tEXt chunk that marks pictures as dfq's."""

HEAD = 256
"""Bytes at the beginning of a picture of dfq's that hold the mark."""

MIN_SIDE = 112


@checked
def preview(dataset: str | Path, out: str | Path, *, rows: int = 8) -> Path:
    """Draw a dataset: trajectories as rows, stages as columns, missing patches dark gray.

    Args:
        dataset: directory of a sparse-image dataset.
        out: the PNG file to write.
        rows: how many trajectories to draw.

    Raises:
        DatasetError: the dataset cannot be read.
        OutputError: the file cannot be written, does not end in ``.png``, or exists and is not a
            picture that dfq wrote.
        SettingError: ``rows`` is below 1.
    """
    if rows < 1:
        raise SettingError(f"{option('rows')} is {rows}; it must be at least 1.")
    _check_name(Path(out))
    check_file(Path(out), FILE)
    source = SparseImageDataset(dataset)
    cells: dict[tuple[int, int], np.ndarray] = {}
    drawn: set[int] = set()
    for batch in source.batches(64):
        for i in range(len(batch)):
            key = int(batch.trajectory[i]), int(batch.stage[i])
            if key[0] in drawn or len(drawn) < rows:
                drawn.add(key[0])
                cells[key] = _draw(batch[i : i + 1], source)
    if not cells:
        raise DatasetError(f"{str(dataset)!r} has no images to draw.")
    return write_png(with_headings(sheet(cells), _headings(cells)), out)


def _headings(cells: dict[tuple[int, int], np.ndarray]) -> list[str]:
    return [f"stage {stage + 1}" for stage in sorted({stage for _, stage in cells})]


def write_png(pixels: np.ndarray, out: str | Path) -> Path:
    """Write a picture uint8 ``[H, W, 3]`` atomically, marked as dfq's.

    Raises:
        OutputError: the file cannot be written, does not end in ``.png``, or holds something else.
    """
    out = Path(out)
    _check_name(out)
    make_directory(out.parent)
    buffer, mark = io.BytesIO(), PngInfo()
    mark.add_text(*MARK)
    Image.fromarray(pixels).save(buffer, format="PNG", pnginfo=mark)
    write_file(out, buffer.getvalue(), FILE)
    return out


def _check_name(out: Path) -> None:
    if out.suffix.lower() != ".png":
        raise OutputError(f"{str(out)!r} is no name of a PNG file; it must end in .png.")


def _is_own(path: Path) -> bool:
    """Whether a file is a picture that :func:`write_png` wrote."""
    with path.open("rb") as file:
        head = file.read(HEAD)
    return head.startswith(SIGNATURE) and b"tEXt" + "\0".join(MARK).encode() in head


FILE = FileFormat("a picture that dfq wrote", _is_own)


def _draw(image: SparseImages, source: SparseImageDataset) -> np.ndarray:
    canvas = unpatchify(image.patches, image.positions, source.grid, fill=BACKGROUND)[0]
    array = canvas.permute(1, 2, 0).numpy()
    array = array.repeat(3, axis=2) if array.shape[2] == 1 else array[..., :3]
    if array.shape[2] == 2:
        array = np.concatenate([array, array[..., :1]], axis=2)
    return enlarge(array)


def enlarge(array: np.ndarray) -> np.ndarray:
    """Enlarge a picture ``[H, W, 3]`` by an integer factor to at least MIN_SIDE pixels."""
    zoom = max(1, -(-MIN_SIDE // max(array.shape[:2])))
    return array.repeat(zoom, axis=0).repeat(zoom, axis=1)


def sheet(cells: dict[tuple[int, int], np.ndarray]) -> np.ndarray:
    """Arrange pictures of equal size by (row, column), with margins between them."""
    height, width = next(iter(cells.values())).shape[:2]
    rows = sorted({row for row, _ in cells})
    columns = sorted({column for _, column in cells})
    shape = (
        len(rows) * (height + MARGIN) + MARGIN,
        len(columns) * (width + MARGIN) + MARGIN,
        3,
    )
    canvas = np.full(shape, BACKGROUND // 2, dtype=np.uint8)
    for (row, column), cell in cells.items():
        top = rows.index(row) * (height + MARGIN) + MARGIN
        left = columns.index(column) * (width + MARGIN) + MARGIN
        canvas[top : top + height, left : left + width] = cell
    return canvas


def with_headings(pixels: np.ndarray, headings: list[str]) -> np.ndarray:
    """Add a line with the headings of the columns above a sheet ``[H, W, 3]``."""
    height, width = pixels.shape[:2]
    image = Image.new("RGB", (width, height + HEADING), (BACKGROUND // 2,) * 3)
    image.paste(Image.fromarray(pixels), (0, HEADING))
    draw, column = ImageDraw.Draw(image), (width - MARGIN) // len(headings)
    for index, text in enumerate(headings):
        draw.text((MARGIN + index * column + column // 2, HEADING // 2), text, anchor="mm")
    return np.asarray(image)
