"""Client for language models on OpenAI-compatible servers: rate limits, retries and structured answers."""
