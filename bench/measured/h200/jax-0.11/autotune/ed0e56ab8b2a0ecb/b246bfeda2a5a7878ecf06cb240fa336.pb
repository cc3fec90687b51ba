
J
4
ed0e56ab8b2a0ecb b246bfeda2a5a7878ecf06cb240fa336
fe9062d0fff82a66B
@ @(08@X(a77e7c793abc0d0c923a9afb275058e2fe57a198