
J
4
ed0e56ab8b2a0ecb bceb41a9fdcb82ec424890a1d7c255fc
fe9062d0fff82a66=
	
 ((a77e7c793abc0d0c923a9afb275058e2fe57a198