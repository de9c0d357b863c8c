"""Loading, attention, adapters and saving of transformers models."""
