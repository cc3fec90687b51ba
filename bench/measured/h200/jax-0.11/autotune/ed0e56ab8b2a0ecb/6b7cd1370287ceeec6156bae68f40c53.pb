
J
4
ed0e56ab8b2a0ecb 6b7cd1370287ceeec6156bae68f40c53
fe9062d0fff82a66D
€ €(08@X(a77e7c793abc0d0c923a9afb275058e2fe57a198