"""What sits round a layer in anybody's network, so that its units can be removed.

surroundings  what lies behind a layer, and where the network must be silenced
masking       the masks: conditions by which the forward pass selects
proof         what masks promise, tried on invented numbers
compact       the smaller network, its removed channels cut out
"""
