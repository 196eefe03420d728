"""Judge replies by a language model or by human raters."""
