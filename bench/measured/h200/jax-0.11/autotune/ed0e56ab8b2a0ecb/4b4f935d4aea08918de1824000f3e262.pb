
J
4
ed0e56ab8b2a0ecb 4b4f935d4aea08918de1824000f3e262
fe9062d0fff82a66B
@@(08@X(a77e7c793abc0d0c923a9afb275058e2fe57a198