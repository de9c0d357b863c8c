"""What a run looks at before its first stage."""
