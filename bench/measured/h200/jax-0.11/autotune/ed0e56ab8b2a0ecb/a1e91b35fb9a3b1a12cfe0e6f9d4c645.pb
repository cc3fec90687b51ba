
J
4
ed0e56ab8b2a0ecb a1e91b35fb9a3b1a12cfe0e6f9d4c645
fe9062d0fff82a66D
€€@(08@X(a77e7c793abc0d0c923a9afb275058e2fe57a198