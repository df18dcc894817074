"""PROCESS. Judges answers: a verdict, or an infrastructure error, which is never a reward."""
