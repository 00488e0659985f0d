"""How fast training is (`measure`), what networks compute (`operations`), and what the figures cost (`cost`)."""

from gstlib.bench.cost import benchmarks, paper_spec
