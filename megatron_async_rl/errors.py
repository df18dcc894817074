"""Errors that may need action by the user; their texts are written for the terminal.

A process ends with one `error: ...` line and exit code 2 on any of them, and with 75 on Preempted
(processes.main).
"""


class Error(Exception):
    """Base of the errors below. The message is for a person: the problem, then the remedy."""

    def __init__(self, problem: str = "", remedy: str = "") -> None:
        super().__init__(f"{problem}; {remedy}" if remedy else problem)
        self.problem = problem
        self.remedy = remedy


class ConfigError(Error):
    """A setting is wrong: names the setting, its value, the rule, the remedy."""


class DataError(Error):
    """A dataset row or a model folder cannot be used."""


class EngineError(Error):
    """The SGLang server failed or refused a call."""


class EngineTimeout(EngineError):
    """The SGLang server did not answer in time."""


class PublishError(Error):
    """A weight update failed on the sender's side."""


class ProtocolError(Error):
    """A peer sent a message that the protocol does not allow."""


class LedgerError(Error):
    """Admitted != trained + dropped + pending: the run must stop."""


class HookFailed(Error):
    """A user's function raised or returned a wrong value: has its traceback."""


class ScoreUnavailable(Error):
    """A workflow requested a score, and scoring failed or the lease ended."""


class NonFiniteStep(Error):
    """A training step would have written non-finite weights."""


class SelftestFailed(Error):
    """An objective breaks a rule, or a layout computes another loss or gradient."""


class Preempted(Error):
    """Not a failure: a job received SIGTERM and saved its state."""
