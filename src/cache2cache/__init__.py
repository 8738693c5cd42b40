"""Language models that talk through their key-value caches."""
