"""What a user or we measure: each module prints a table, or one JSON object."""
