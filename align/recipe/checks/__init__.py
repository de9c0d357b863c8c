"""Finding all problems of a recipe, each with its place in the text."""
