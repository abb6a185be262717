"""What watches a run without touching it: progress, speed, pictures, kNN, and the loggers."""
