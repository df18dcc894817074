"""The errors that a person may have to act on; their texts are written for the terminal.

Error
├── ConfigError       a setting is wrong: names the setting, its value, the rule, the remedy
├── DataError         a dataset row or a model folder cannot be used
├── EngineError       the SGLang server failed or refused a call
│   └── EngineTimeout     it did not answer in time
├── PublishError      a weight update failed on the sender's side
├── ProtocolError     a peer sent a message that the protocol does not allow
├── LedgerError       admitted != trained + dropped + pending: the run must stop
├── HookFailed        a user's function raised or returned a wrong value: has its traceback
├── ScoreUnavailable  a workflow requested a score, and scoring failed or the lease ended
├── NonFiniteStep     a training step would have written non-finite weights
├── SelftestFailed    an objective breaks a rule, or a layout computes another loss or gradient
└── Preempted         not a failure: a job received SIGTERM and saved its state

A process ends with one `error: ...` line and exit code 2 on any of them, and with 75 on Preempted
(processes.main).
"""


class Error(Exception):
    """Base of the errors above. The message is for a person: the problem, then the remedy."""

    def __init__(self, problem: str = "", remedy: str = "") -> None:
        super().__init__(f"{problem}; {remedy}" if remedy else problem)
        self.problem = problem
        self.remedy = remedy


class ConfigError(Error):
    pass


class DataError(Error):
    pass


class EngineError(Error):
    pass


class EngineTimeout(EngineError):
    pass


class PublishError(Error):
    pass


class ProtocolError(Error):
    pass


class LedgerError(Error):
    pass


class HookFailed(Error):
    pass


class ScoreUnavailable(Error):
    pass


class NonFiniteStep(Error):
    pass


class SelftestFailed(Error):
    pass


class Preempted(Error):
    pass
