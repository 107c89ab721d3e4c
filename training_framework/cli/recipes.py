"""The `recipes` command: the configurations that are shipped to train with."""

import argparse
from typing import Any

__all__ = ["add_recipes"]


def add_recipes(commands: Any) -> None:
    """Add the command to a parser's subcommands, as `add_subparsers` gives them."""
    summary = "list the shipped recipes: what each reached, where, and its command"
    parser = commands.add_parser("recipes", help=summary, description=summary, allow_abbrev=False)
    parser.set_defaults(run=_recipes, parser=parser)


def _recipes(options: argparse.Namespace) -> None:
    from training_framework.config.recipes_listing import recipe_opening, shipped_recipes

    for name, path in shipped_recipes().items():
        print(name)
        for line in recipe_opening(path):
            print(f"  {line}")
