
J
4
ed0e56ab8b2a0ecb 3a0dddffeeca0ce309f95ff9721eb590
fe9062d0fff82a66A
@€(08X(a77e7c793abc0d0c923a9afb275058e2fe57a198