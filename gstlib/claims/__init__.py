"""The paper's claims as data, each with a decision rule fixed before any result, and their verdicts from a store.

Verdicts on the paper come from full-width networks alone.  Reads stored runs only; imports neither torch nor training.
"""

from gstlib.claims.rules import CONTRADICTED, INCONCLUSIVE, NOT_RUN, SUPPORTED, VERDICTS
from gstlib.claims.statements import CLAIMS, Claim
from gstlib.claims.verdicts import evaluate, upheld

__all__ = ["CLAIMS", "CONTRADICTED", "INCONCLUSIVE", "NOT_RUN", "SUPPORTED", "VERDICTS", "Claim", "evaluate", "upheld"]
