"""Explanations for the warm start, and who writes them."""
