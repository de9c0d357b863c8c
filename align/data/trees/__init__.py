"""From records to encoded trees, kept on disk."""
