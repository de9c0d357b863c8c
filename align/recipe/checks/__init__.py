"""From the text of a recipe to all of its problems, each with its place."""
