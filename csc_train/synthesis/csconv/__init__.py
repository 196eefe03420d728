"""CSConv: dialogues rewritten by a language model from recorded calls."""
