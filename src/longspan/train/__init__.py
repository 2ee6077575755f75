"""Training: routing queries, long-context adapters, and the small model that finds a needle."""
