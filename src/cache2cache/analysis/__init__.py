"""Looking inside a pair: effective rank, gates and weights, positions, agreement, and one prompt as a page."""
