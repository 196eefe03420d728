"""Ending a training early without losing it: on a signal all processes save a state together and stop."""

import signal

import torch
from transformers import TrainerCallback


class StopOnSignal(TrainerCallback):
    """On SIGTERM or SIGUSR1 to any process: save a state of training after the current optimizer step, and stop.

    SLURM sends SIGTERM to a job that is preempted or cancelled, and SIGUSR1 where it is asked to warn before the time
    limit. A second signal to the same process ends it at once.

    Attributes:
        before_the_end: whether the last training was stopped with steps left to do; the same on all processes.
    """

    def __init__(self):
        self.before_the_end = False
        self._received = False

    def on_train_begin(self, arguments, state, control, **kwargs):
        """Listen from now on: until here there is nothing to save, and a signal ends the process as ever."""
        for signum in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(signum, self._receive)

    def on_step_end(self, arguments, state, control, **kwargs):
        """Ask whether any process was told to stop: all must save, after the same step."""
        received = torch.tensor(int(self._received), device=arguments.device)
        if arguments.world_size > 1:
            torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX)
        if received.item() and state.global_step < state.max_steps:
            self.before_the_end = control.should_save = control.should_training_stop = True

    def _receive(self, signum, frame):
        self._received = True
        for each in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(each, signal.SIG_DFL)
