"""The APIs that agents talk to: their JSON from and to request.py's ChatRequest and Reply."""
