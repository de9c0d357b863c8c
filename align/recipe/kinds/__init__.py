"""What a recipe may say of each kind of stage."""
