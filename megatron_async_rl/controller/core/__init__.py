"""The state machine of the controller: no sockets, clock or threads."""
