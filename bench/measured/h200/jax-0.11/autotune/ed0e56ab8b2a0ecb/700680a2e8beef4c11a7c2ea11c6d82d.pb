
J
4
ed0e56ab8b2a0ecb 700680a2e8beef4c11a7c2ea11c6d82d
fe9062d0fff82a66C
€@(08@X(a77e7c793abc0d0c923a9afb275058e2fe57a198