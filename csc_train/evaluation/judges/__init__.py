"""A language model and people as judges of replies."""
