"""The embedded toy world: a synthetic language, the corpus that teaches it, a base model, and a checker of the truth."""
