"""Reading and checking the files of a model's folder before the model is loaded."""
