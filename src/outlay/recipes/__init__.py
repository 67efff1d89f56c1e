"""Functions that return a recipe."""
