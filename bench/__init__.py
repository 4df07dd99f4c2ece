"""Measurements: what the hardware and our operations really do. Nothing here is imported by cai_fast."""
