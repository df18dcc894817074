"""What a run shows: TensorBoard, samples.jsonl, status.json and the terminal."""
