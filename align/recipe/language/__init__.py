"""What recipes are written in: YAML with places, and what every model of the schema is made of."""
