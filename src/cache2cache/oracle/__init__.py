"""Why cache communication works: enrichment, transformation, effective rank, structure."""
