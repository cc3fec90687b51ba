
J
4
ed0e56ab8b2a0ecb fc03f35f541d85b3799ff07354db7237
fe9062d0fff82a66B
@@(08@X(a77e7c793abc0d0c923a9afb275058e2fe57a198