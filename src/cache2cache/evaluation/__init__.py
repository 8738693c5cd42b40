"""Measuring what a fuser is worth: accuracy by option likelihood, with a control."""
