"""Records of a run for people: TensorBoard, samples.jsonl, status.json, the terminal."""
