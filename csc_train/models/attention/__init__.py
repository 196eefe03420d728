"""Attention implementations for packed documents."""
