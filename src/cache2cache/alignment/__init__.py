"""Which sharer token goes with each receiver token, and which sharer layer with each receiver layer."""
