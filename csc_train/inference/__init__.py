"""Generate replies by local models, servers and baselines, for evaluation and chat."""
