
J
4
ed0e56ab8b2a0ecb 174bf7bd6d216d8f63e4f7be803afb5e
fe9062d0fff82a66A
@€(08X(a77e7c793abc0d0c923a9afb275058e2fe57a198