"""`globenc evaluate`: attribution methods held against saliency, removed tokens and people's marks, and the report."""
