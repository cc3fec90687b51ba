
J
4
ed0e56ab8b2a0ecb 091200532ec3da47c40de28ca1815885
fe9062d0fff82a66B
@ @(08@X(a77e7c793abc0d0c923a9afb275058e2fe57a198