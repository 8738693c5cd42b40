"""Why cache communication works: enrichment, transformation, structure."""
