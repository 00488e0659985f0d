"""What is missing, in what order it is trained, and where.

leases     which process trains what
todo       what is missing, most valuable first
clock      how long runs take, and whether they still fit into a time limit
work       what is left, and what became of what was done
executors  where groups of runs are trained
display    the bar
runner     the loop over all of it; its `run`, `train_missing` and `run_campaign` are the room's door
"""
