"""What a model finds, and what it forgets: measured afterwards."""
