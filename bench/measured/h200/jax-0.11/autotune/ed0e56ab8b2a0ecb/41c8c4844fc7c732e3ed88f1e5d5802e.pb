
J
4
ed0e56ab8b2a0ecb 41c8c4844fc7c732e3ed88f1e5d5802e
fe9062d0fff82a66D
€€@(08@X(a77e7c793abc0d0c923a9afb275058e2fe57a198