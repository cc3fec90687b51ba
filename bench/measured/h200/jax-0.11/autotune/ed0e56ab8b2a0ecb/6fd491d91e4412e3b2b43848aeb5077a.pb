
J
4
ed0e56ab8b2a0ecb 6fd491d91e4412e3b2b43848aeb5077a
fe9062d0fff82a66=
	
 ((a77e7c793abc0d0c923a9afb275058e2fe57a198