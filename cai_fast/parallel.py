"""Trained models over several ranks."""
