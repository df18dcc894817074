"""What crosses a process border: types, messages, their encoding, and the sockets."""
