"""CSConv: dialogues rewritten from recorded calls."""
