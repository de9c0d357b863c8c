"""Models with one number as output: reward models, classifiers and value models."""
