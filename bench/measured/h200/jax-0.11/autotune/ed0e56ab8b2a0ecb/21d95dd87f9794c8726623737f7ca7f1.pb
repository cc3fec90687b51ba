
J
4
ed0e56ab8b2a0ecb 21d95dd87f9794c8726623737f7ca7f1
fe9062d0fff82a66D
€€@(08@X(a77e7c793abc0d0c923a9afb275058e2fe57a198