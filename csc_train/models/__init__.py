"""Model families, loading of models and tokenizers, and attention over packed documents."""
