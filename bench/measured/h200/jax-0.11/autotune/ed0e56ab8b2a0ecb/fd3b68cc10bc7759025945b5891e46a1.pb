
J
4
ed0e56ab8b2a0ecb fd3b68cc10bc7759025945b5891e46a1
fe9062d0fff82a66A
€  (08X(a77e7c793abc0d0c923a9afb275058e2fe57a198