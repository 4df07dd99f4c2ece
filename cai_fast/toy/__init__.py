"""The embedded toy world: a synthetic language, a corpus that teaches it, a base model, a checker of the truth."""
