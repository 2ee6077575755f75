"""Keys and values: pages, and positions given when they are read."""
