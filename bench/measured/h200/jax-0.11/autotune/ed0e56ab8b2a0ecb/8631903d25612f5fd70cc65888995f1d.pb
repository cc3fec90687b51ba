
J
4
ed0e56ab8b2a0ecb 8631903d25612f5fd70cc65888995f1d
fe9062d0fff82a66D
€€(08@X(a77e7c793abc0d0c923a9afb275058e2fe57a198