"""Recipe files: the user's by path, shipped ones by name."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from dfq.errors import RecipeError, nearest

SUFFIX = ".toml"
NAME = re.compile(r"[^./\\]+")
SHIPPED = Path(__file__).parent / "recipes"
"""Recipes that ship with dfq; in a checkout a link to ``recipes/`` at its top."""


def shipped_recipes() -> dict[str, Path]:
    """Return the files of the recipes that ship with dfq, by name, in alphabetical order."""
    return dict(sorted((path.stem, path) for path in SHIPPED.glob(f"*{SUFFIX}")))


def recipe_file(recipe: str | Path) -> Path:
    """Return the file of a recipe.  Text without a dot and a separator names a shipped one.

    Raises:
        RecipeError: no recipe of this name ships with dfq.
    """
    if isinstance(recipe, Path) or not NAME.fullmatch(recipe):
        return Path(recipe)
    shipped = shipped_recipes()
    if recipe not in shipped:
        raise RecipeError(
            f"No recipe {recipe!r} ships with dfq; it has {', '.join(shipped)}. "
            f"A file is given by its path, such as {recipe + SUFFIX!r} or './{recipe}'."
            f"{nearest(recipe, shipped)}"
        )
    return shipped[recipe]


def read_toml(recipe: str | Path) -> dict[str, Any]:
    """Read the content of a recipe's file.

    Raises:
        RecipeError: there is no such recipe, or its file cannot be read.
    """
    path = recipe_file(recipe)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        close = nearest(path.stem, shipped_recipes())
        raise RecipeError(f"Recipe {str(path)!r} does not exist.{close}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"Recipe {str(path)!r} cannot be read: {error}.") from error
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"Recipe {str(path)!r} is not valid TOML: {error}.") from error


def summary(path: Path) -> str:
    """Return the first sentence of the comment at the start of a recipe."""
    comment = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("# "):
            break
        comment.append(line.removeprefix("# "))
    return " ".join(comment).partition(". ")[0].rstrip(".")
