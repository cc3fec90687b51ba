"""What a sampler returns in place of a token. The scheduler reads it, so it imports no JAX."""

NO_TOKEN = -1  # a logit is NaN
NO_AGREEMENT = -2  # the user's own sampler chose different tokens on the ranks
