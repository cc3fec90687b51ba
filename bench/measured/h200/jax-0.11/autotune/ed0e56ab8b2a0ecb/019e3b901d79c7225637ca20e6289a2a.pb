
J
4
ed0e56ab8b2a0ecb 019e3b901d79c7225637ca20e6289a2a
fe9062d0fff82a66D
€€(08@X(a77e7c793abc0d0c923a9afb275058e2fe57a198