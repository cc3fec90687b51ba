
J
4
ed0e56ab8b2a0ecb 374c8b9055b50b2a22438e7f063b46fb
fe9062d0fff82a66C
@€(08@X(a77e7c793abc0d0c923a9afb275058e2fe57a198