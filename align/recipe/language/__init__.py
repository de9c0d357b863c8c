"""The language of recipes: YAML with line numbers, and the base classes of the schema."""
