"""How fast training is (`measure`), and what the figures cost (`cost`)."""

from gstlib.bench.cost import paper_spec
