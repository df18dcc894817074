"""PROCESS. Scores responses: a reward, or an infrastructure error, which never counts as reward."""
