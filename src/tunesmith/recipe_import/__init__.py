"""Recipes from other tools' files: what carries over, what is translated, and what would train differently."""

from __future__ import annotations

from tunesmith.recipe_import.convert import Imported, import_recipe, migration_table
from tunesmith.recipe_import.job import LOUD, ImportedKey

__all__ = ["LOUD", "Imported", "ImportedKey", "import_recipe", "migration_table"]
