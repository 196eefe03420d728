"""Language models behind OpenAI-compatible servers: requests within limits, and answers of a given form."""
