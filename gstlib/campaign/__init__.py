"""What is missing, in what order it is trained, and where."""
