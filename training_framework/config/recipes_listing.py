"""The shipped recipes and what their opening lines say of them."""

from pathlib import Path

from training_framework.config.inheritance import shipped_configs

__all__ = ["NOT_RUN", "recipe_opening", "shipped_recipes"]

NOT_RUN = "Not run to its end by this project"
"""How the first line of a recipe begins for which there is no result."""


def shipped_recipes() -> dict[str, Path]:
    """The recipes by name. `train --config NAME` finds each."""
    return {name: path for name, path in shipped_configs().items() if path.parent.name == "recipes"}


def recipe_opening(path: Path) -> list[str]:
    """The comment that opens a recipe, without its marks: claim, n, machine, time, command."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" ").rstrip())
    return lines
