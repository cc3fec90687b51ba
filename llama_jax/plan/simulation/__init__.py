"""The engine's own scheduler on a logical clock: what a deployment will do with its requests.

No wall time enters, so the same inputs give the same figures, bit for bit. `replica` says what is
simulated, `load` and `traces` what it is asked, `engine` runs it, and `simulated` and `figures`
hold what came out.
"""
