"""``vlmamba train RECIPE``: train, or show what would be trained."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from vlmamba.config import describe, dump_yaml, list_recipes, load_recipe
from vlmamba.training.config import TrainConfig


def run(words: Sequence[str]) -> int:
    """Run the verb."""
    parser = argparse.ArgumentParser(
        prog="vlmamba train",
        description="Train a recipe. Further flags are dotted overrides (--optim.lr 1e-5) or keyword arguments of "
        "the recipe's function (--connector qmamba).",
        allow_abbrev=False,
    )
    parser.add_argument(
        "recipe",
        nargs="?",
        help="train/NAME.py:FUNCTION, NAME:FUNCTION, or the config.yaml of a run, to repeat it",
    )
    parser.add_argument("--resume", action="store_true", help="continue the run in its output folder")
    parser.add_argument(
        "--dry-run", action="store_true", help="sizes, steps and missing files; needs no weights"
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved config as YAML")
    parser.add_argument("--help-config", action="store_true", help="print every setting and what it means")
    arguments, overrides = parser.parse_known_args(words)
    if arguments.help_config:
        print(describe(TrainConfig))
        return 0
    if arguments.recipe is None:
        parser.error(f"name a recipe; in train/ there are: {', '.join(list_recipes()) or 'none'}")
    recipe = load_recipe(arguments.recipe, overrides)
    if arguments.print_config:
        print(dump_yaml(recipe.config), end="")
        return 0
    print(f"recipe {recipe.path}{':' + recipe.function if recipe.function else ''}")
    for change in recipe.changes:
        print(f"  {change}")
    if arguments.dry_run:
        from vlmamba.training.dry_run import dry_run

        print(dry_run(recipe.config))
        return 0
    from vlmamba.training.run import run as train

    result = train(recipe.config, resume=arguments.resume)
    if result.export is not None:
        print(f"done: {result.step} steps; the model is in {result.export}")
        return 0
    print(f"stopped at step {result.step}; continue with the same command and --resume")
    return 0
