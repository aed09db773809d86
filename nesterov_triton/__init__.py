"""Momentum neural ODEs in PyTorch."""
