"""How rows are read, said in a recipe: places, mappings, and presets."""
