
J
4
ed0e56ab8b2a0ecb d13246009e05e3b2c38cda0f5f884da8
fe9062d0fff82a66A
€ (08X(a77e7c793abc0d0c923a9afb275058e2fe57a198