"""What agents and agent servers need."""
