
J
4
ed0e56ab8b2a0ecb 3494bc9eb1b2658a3c975f9c4b77164f
fe9062d0fff82a66C
€ @(08@X(a77e7c793abc0d0c923a9afb275058e2fe57a198