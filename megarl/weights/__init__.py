"""A model's weights: their names in every dialect, who holds which rows, and how they move."""
