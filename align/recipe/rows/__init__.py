"""The part of the recipe schema about reading rows: places, mappings, and presets."""
