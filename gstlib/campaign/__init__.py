"""What is missing, in what order it is trained, and where.

leases     which process trains what
todo       what is missing, most valuable first
work       what is left and fits into a time limit, what became of what was done, the bar that shows it
executors  where groups of runs are trained
audit      a stored run trained again, its rows compared
runner     the loop over all of it; its `run`, `train_missing` and `run_campaign` are the room's door
"""
