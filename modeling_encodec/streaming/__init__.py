"""Signals coded piece by piece, as they come."""
