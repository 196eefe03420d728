"""Settings of the run directory, the `run` group."""

from dataclasses import dataclass

from csc_train.errors import check_fields

IF_EXISTS = ("error", "reuse", "resume", "extend", "replace")
IGNORED_GROUPS = ("run", "tokenization", "tracking", "alerts", "on_finish", "batch", "budget")
"""Groups of a configuration that do not change the results of a run; a resumed run may change their values."""
_SERVER_LIMITS = (
    "base_url", "api_key_env", "retry_max_tokens", "timeout_s", "max_retries", "concurrency", "requests_per_minute",
    "tokens_per_minute", "price_per_million_input", "price_per_million_output",
)  # fmt: skip
RESUMABLE_KEYS = (
    "trainer.on_nonfinite", "trainer.profile", "trainer.save_in_background", "evaluation.max_failed",
    *(f"llm.{name}" for name in _SERVER_LIMITS),
)  # fmt: skip
"""Settings of other groups that a resumed run may change: what to do where it stopped, and how servers are asked."""
RESOLVED_FILE = "resolved.yaml"
"""In a run directory: the whole configuration of the run."""


def may_change(key: str) -> bool:
    """Whether a resumed run may give a setting another value."""
    return key in RESUMABLE_KEYS or key.split(".")[0] in IGNORED_GROUPS


@dataclass
class RunConfig:
    """Where a run is kept."""

    directory: str | None = None
    """The run directory; defaults to runs/<recipe>-<time>."""
    if_exists: str = "error"
    """What to do if the directory holds a run. error: stop. reuse: keep a run of the same configuration, data and code
    (continue it if it is unfinished), refuse any other. resume: continue it, also under other code, but not on other
    data. extend: continue it under this configuration, within the limits of the recipe. replace: start over;
    the old run is moved to DIR.replaced-N until the new one has finished."""
    timeout_s: int = 1800
    """Seconds after which a rank that does not answer, or a training step in which no rank makes progress, ends the
    job."""

    def __post_init__(self):
        check_fields("run.", self, "if_exists", choices=IF_EXISTS)
        check_fields("run.", self, "timeout_s", low=5)
