
J
4
ed0e56ab8b2a0ecb 13a302eeaf75ba8e9ed9d9d5665406e8
fe9062d0fff82a66A
@€(08X(a77e7c793abc0d0c923a9afb275058e2fe57a198