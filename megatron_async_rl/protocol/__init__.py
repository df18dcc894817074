"""Messages between processes: types, encoding and sockets."""
