"""Publishing a model on the hub, with a model card."""
