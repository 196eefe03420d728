"""The command line: the entry point of every recipe, and the console script `csc-train`."""

import logging
import os
import runpy
import sys
import threading
from collections.abc import Callable
from typing import Any

from csc_train.config.explain import help_text
from csc_train.config.paths import CONF, script_of
from csc_train.config.recipes import SCHEMAS
from csc_train.errors import InputError, ResumableError, suggestion
from csc_train.runs.claim import keep_inherited, release_all
from csc_train.runs.directory import mark_failed, mark_interrupted
from csc_train.runs.distributed import exit_with_launcher, record_failure
from csc_train.runs.heartbeat import this_rank

logger = logging.getLogger(__name__)
MARK_S = 30.0
"""Seconds to note in the run directory that a rank was lost."""
HELP = ("--help", "-h")
HYDRA_FLAGS = ("--hydra-help", "--cfg", "-c", "--package", "-p", "--resolve", "--info", "-i")


class _StdoutHandler(logging.Handler):
    """Prints the log records of the main process, and records of other ranks that are marked `any_rank`."""

    def emit(self, record: logging.LogRecord) -> None:
        if os.environ.get("RANK", "0") == "0" or getattr(record, "any_rank", False):
            print(self.format(record), flush=True)


def log_to_stdout() -> None:
    """Print the package's log records from now on."""
    logger = logging.getLogger("csc_train")
    if not any(isinstance(handler, _StdoutHandler) for handler in logger.handlers):
        logger.setLevel(logging.INFO)
        logger.propagate = False  # some libraries print the root logger's records
        logger.addHandler(_StdoutHandler())


def run_recipe(recipe: str, main: Callable[[Any], None]) -> None:
    """Run a recipe's `main` on the configuration that the command line asks for.

    `--help` explains the settings; `--cfg` and `--info` are Hydra's flags; `--config-dir DIR` adds a folder of groups.
    An InputError is printed as one line, with exit status 2; an interrupt (Ctrl-C) ends with status 130.
    """
    exit_with_launcher()
    keep_inherited()
    log_to_stdout()
    try:
        arguments = join_config_dir(sys.argv[1:])
        if show_help(recipe, arguments):
            return
        if any(text.split("=")[0] in HYDRA_FLAGS for text in arguments):
            _show_config(recipe, arguments)
        else:
            if flags := [text for text in arguments if text.startswith("-") and not text.startswith("--config-dir=")]:
                raise InputError(
                    f"{flags[0]}: the flags are --help, --cfg, --info and --config-dir; all else is key=value"
                )
            from csc_train.config.compose import compose

            config = compose(recipe, arguments)
            if run := getattr(config, "run", None):
                this_rank.timeout_s, this_rank.on_lost = run.timeout_s, _end_lost
            main(config)
    except InputError as error:
        advice = mark_failed(error)
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}{advice}", file=sys.stderr)
        else:  # most often it would only repeat that; else torchrun's report says it
            record_failure(error)
        sys.exit(2)
    except KeyboardInterrupt as error:
        logger.info(f"interrupted{mark_interrupted(error)}")
        sys.exit(130)
    except Exception as error:
        mark_failed(error)
        record_failure(error)
        raise
    finally:
        release_all()
        this_rank.stop()
        distributed = sys.modules.get("torch.distributed")
        if distributed and distributed.is_initialized():
            distributed.destroy_process_group()


def _end_lost(message: str) -> None:
    """End this process for a rank that is lost; its parent ends the others."""
    threading.Timer(MARK_S, os._exit, [1]).start()  # the file system may hang as well
    try:
        raise ResumableError(message, "")
    except ResumableError as error:
        advice = mark_failed(error)
        if os.environ.get("RANK") in ("0", "1") or os.environ.get("LOCAL_RANK") == "0":  # one of them is alive
            print(f"error: {error}{advice}", file=sys.stderr, flush=True)
        record_failure(error)
    os._exit(1)


def show_help(recipe: str, arguments: list[str]) -> bool:
    """Print the help of a recipe if the arguments ask for it; returns whether they do."""
    asked = any(text in HELP for text in arguments)
    if asked:
        print(help_text(recipe), end="")
    return asked


def run_command(command: str, arguments: list[str], run: Callable[[list[str]], int]) -> int:
    """Run a script of launch/; an InputError is printed as one line.

    Returns:
        The exit status: that of `run`, 0 after `--help`, 2 after an InputError.
    """
    if show_help(command, arguments):
        return 0
    try:
        return run(arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def join_config_dir(arguments: list[str]) -> list[str]:
    """The arguments with `--config-dir DIR` as one word, `--config-dir=DIR`.

    Raises:
        InputError: DIR is missing.
    """
    joined = iter(arguments)
    try:
        return [f"{text}={next(joined)}" if text == "--config-dir" else text for text in joined]
    except StopIteration as error:
        raise InputError("--config-dir: name a folder") from error


def _show_config(recipe: str, arguments: list[str]) -> None:
    """`--cfg job` without Hydra's start-up; all other flags are Hydra's own."""
    from csc_train.config.compose import ConfigSearch, compose_untyped, register_schemas

    if arguments[:2] == ["--cfg", "job"] and not any(text.startswith("-") for text in arguments[2:]):
        from omegaconf import OmegaConf, open_dict

        config = compose_untyped(recipe, CONF, recipe, ConfigSearch.of(recipe, arguments[2:]))
        with open_dict(config):
            del config["hydra"]
        print(OmegaConf.to_yaml(config), end="")
    else:
        import hydra

        register_schemas(recipe)
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=recipe)(lambda _: None)()


def main() -> None:
    """The console script `csc-train COMMAND ...`: run the recipe, `launch` or `sweep` of that name."""
    commands = sorted(SCHEMAS)
    if not sys.argv[1:] or sys.argv[1] in HELP:
        print("usage: csc-train COMMAND [key=value ...]\n\ncommands (csc-train COMMAND --help explains one):")
        for command in commands:
            print(f"  {command:<18} {_summary(command)}")
        return
    command, *arguments = sys.argv[1:]
    if command not in commands:
        print(f"error: {command}: unknown command.{suggestion(command, commands)}", file=sys.stderr)
        sys.exit(2)
    script = str(script_of(command))
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def _summary(command: str) -> str:
    """The purpose of a script: the start of its docstring."""
    first = script_of(command).read_text(encoding="utf-8").split("\n", 1)[0]
    return first.strip('"').partition(":")[0]
