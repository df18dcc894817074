"""What the controller observes of the run: progress, scores, lengths and stalls."""
