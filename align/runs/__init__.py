"""What a finished or broken run left in its folder, read back."""
