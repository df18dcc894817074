"""Every error of ours that a person may have to act on.

Error
├── ConfigError      a setting is wrong: names the setting, its value, the rule, the remedy
├── DataError        a dataset row or a model folder cannot be used
├── EngineError      the inference server failed, or refused a call
│   └── EngineSilent     it did not answer in time
├── PublishError     a weight update failed on the sender's side
├── ProtocolError    a peer sent what the protocol does not allow
├── ConservationError  the ledger does not add up: the run must not go on
├── NoVerdict        a workflow asked for a verdict, and none could be had
├── StepRefused      a training step would have written non-finite weights
├── SelftestFailed   a parallel layout does not compute what one without parallelism does
└── Preempted        no failure: the job was told to end, saved what it had, and asks to be run again (exit code 75)

A process ends with exit code 2 and one `error: ...` line on any of them (processes.main).
"""


class Error(Exception):
    """Base of the above; its text is meant for a person."""


class ConfigError(Error):
    pass


class DataError(Error):
    pass


class EngineError(Error):
    pass


class EngineSilent(EngineError):
    pass


class PublishError(Error):
    pass


class ProtocolError(Error):
    pass


class ConservationError(Error):
    pass


class NoVerdict(Error):
    pass


class StepRefused(Error):
    pass


class SelftestFailed(Error):
    pass


class Preempted(Error):
    pass
