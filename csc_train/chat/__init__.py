"""Talking to a trained model, in a terminal or on a web page."""
