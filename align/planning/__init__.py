"""What a run would do, with every derived value and where it comes from. Runs nothing."""
