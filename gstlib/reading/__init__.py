"""From stored rows to numbers, sentences and figures; imports no torch."""
