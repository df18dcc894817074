"""Moves weights from trainer ranks to servers: gather, bucket, broadcast, digest, snapshot."""
