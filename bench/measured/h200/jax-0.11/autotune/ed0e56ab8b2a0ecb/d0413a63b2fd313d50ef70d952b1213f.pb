
J
4
ed0e56ab8b2a0ecb d0413a63b2fd313d50ef70d952b1213f
fe9062d0fff82a66C
€@(08@X(a77e7c793abc0d0c923a9afb275058e2fe57a198