
J
4
ed0e56ab8b2a0ecb 38da57ec9c51ee93fe5d8f38a4ad989c
fe9062d0fff82a66A
@€(08X(a77e7c793abc0d0c923a9afb275058e2fe57a198