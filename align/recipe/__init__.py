"""Recipes: the strict schema, the loader with file:line:col errors, and the plan. Never imports torch."""
