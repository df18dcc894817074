"""The state machine that decides: pure, no sockets, no clock, no threads."""
