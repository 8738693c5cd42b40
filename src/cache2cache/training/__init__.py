"""Training fusers: data, the store of sharer prefills, the loop."""
