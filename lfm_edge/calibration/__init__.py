"""A whole checkpoint quantized by a recipe, and all that is measured on a text for it."""
