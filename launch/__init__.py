"""Many runs: a grid's cells onto a machine or a cluster, and their life cycle."""
