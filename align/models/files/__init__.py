"""What lies in the folder of a model, read and checked before a model is made of it."""
