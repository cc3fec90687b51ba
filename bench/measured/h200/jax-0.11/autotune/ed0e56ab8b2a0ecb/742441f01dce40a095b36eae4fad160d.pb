
J
4
ed0e56ab8b2a0ecb 742441f01dce40a095b36eae4fad160d
fe9062d0fff82a66A
@€(08X(a77e7c793abc0d0c923a9afb275058e2fe57a198